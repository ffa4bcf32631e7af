"""Every path in the data directory is a method here; nobody joins strings.

DATA/                          0700
  stillframe.db                records (SQLite)
  lock, jwt-secret, server.json
  system/<digest>/             kernel and initrd pairs
  images/<digest>/             root disks
  templates/                   empty formatted disks by size
  instances/<id>/              one VM: deleting the directory deletes the VM
    memory, memory.blake3      the memory image it maps (hard link into a snapshot, or its own)
    overlay.raw, config.raw    its writable disk, its boot configuration
    devices                    device state while it is being loaded
    standby/                   memory and device state of an instance in Standby
    logs/{app,vmm,hypeman}.log
  snapshots/<id>/              write-once payloads: manifest.json, memory, devices, overlay.raw,
                               digest tables (*.blake3), memory.zst or memory.lz4 for memory
  snapshots/.<id>.new/         a payload being built
  expanded/<digest>            memory images expanded from compressed ones; instances link them
  expanded/.<digest>.*         one being expanded, or going
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from stillframe.host.files import storage_errors
from stillframe.model.errors import HostFailure, NotFound
from stillframe.model.units import is_id
from stillframe.model.values import CompressionAlgorithm

log = logging.getLogger("stillframe.paths")
_PRIVATE = 0o700

_SUFFIXES = {CompressionAlgorithm.ZSTD: "zst", CompressionAlgorithm.LZ4: "lz4"}


@dataclass(frozen=True, slots=True)
class Payload:
    """A directory that holds captured state: a snapshot's, or an instance's standby image."""

    directory: Path

    @property
    def memory(self) -> Path:
        """The complete guest memory image."""
        return self.directory / "memory"

    @property
    def devices(self) -> Path:
        """Device state as the VMM wrote it."""
        return self.directory / "devices"

    @property
    def overlay(self) -> Path:
        """The writable disk."""
        return self.directory / "overlay.raw"

    @property
    def manifest(self) -> Path:
        """What the payload must consist of; written last."""
        return self.directory / "manifest.json"

    def table(self, name: str) -> Path:
        """The digest table of one of its files."""
        return self.directory / f"{name}.blake3"

    def compressed(self, algorithm: CompressionAlgorithm) -> Path:
        """The memory image in compressed form."""
        return self.directory / f"memory.{_SUFFIXES[algorithm]}"

    def being_built(self, path: Path) -> Path:
        """Where another representation is written before it gets the name ``path``."""
        return self.directory / f".{path.name}.new"


@dataclass(frozen=True, slots=True)
class InstancePaths:
    """The files of one instance."""

    directory: Path

    @property
    def memory(self) -> Path:
        """The memory image its VMM maps privately."""
        return self.directory / "memory"

    @property
    def memory_table(self) -> Path:
        """The digest table of that image, if it was captured."""
        return self.directory / "memory.blake3"

    @property
    def overlay(self) -> Path:
        """Its writable disk."""
        return self.directory / "overlay.raw"

    @property
    def config(self) -> Path:
        """Its boot configuration disk."""
        return self.directory / "config.raw"

    @property
    def restored(self) -> Path:
        """Marks a state that was put in place of another, until that is given up."""
        return self.directory / ".restored"

    @property
    def unidentified(self) -> Path:
        """Marks a fork that still has the random numbers of what it was forked from.

        It need not be durable: what ends with the host is the fork's VMM too.
        """
        return self.directory / ".unidentified"

    @property
    def standby(self) -> Payload:
        """Memory and devices while in Standby."""
        return Payload(self.directory / "standby")

    @property
    def standby_new(self) -> Payload:
        """A standby image being built."""
        return Payload(self.directory / "standby.new")

    def log(self, source: str) -> Path:
        """One of its logs: app (console), vmm or hypeman (operations)."""
        return self.directory / "logs" / f"{source}.log"


@dataclass(frozen=True, slots=True)
class DataDirectory:
    """The layout of a server's data directory."""

    root: Path

    @property
    def database(self) -> Path:
        """The records."""
        return self.root / "stillframe.db"

    @property
    def images(self) -> Path:
        """Root disks by digest."""
        return self.root / "images"

    @property
    def system(self) -> Path:
        """Kernel and initrd pairs by digest."""
        return self.root / "system"

    @property
    def templates(self) -> Path:
        """Empty formatted disks by size, to be cloned."""
        return self.root / "templates"

    @property
    def instances(self) -> Path:
        """All instance directories."""
        return self.root / "instances"

    @property
    def snapshots(self) -> Path:
        """All snapshot payloads."""
        return self.root / "snapshots"

    @property
    def expanded(self) -> Path:
        """Memory images expanded from compressed payloads, by digest."""
        return self.root / "expanded"

    def instance(self, instance_id: str) -> InstancePaths:
        """The files of an instance. Raises NotFound for what is no id (path traversal)."""
        return InstancePaths(self.instances / _checked(instance_id))

    def instance_staged(self, instance_id: str) -> InstancePaths:
        """The other state of an instance during a restore in place.

        First the new one is prepared there; then the two are swapped, and the old one waits there
        until the restored one runs. Which is which tells ``InstancePaths.restored``.
        """
        return InstancePaths(self.instances / f".{_checked(instance_id)}.restoring")

    def snapshot(self, snapshot_id: str) -> Payload:
        """The payload of a snapshot. Raises NotFound for what is no id (path traversal)."""
        return Payload(self.snapshots / _checked(snapshot_id))

    def snapshot_new(self, snapshot_id: str) -> Payload:
        """A snapshot payload being built."""
        return Payload(self.snapshots / f".{_checked(snapshot_id)}.new")

    def own(self) -> None:
        """Make the directory, or close one that others may enter; it must be ours.

        Raises HostFailure when it belongs to somebody else or cannot be used.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.root.stat()
            if status.st_uid != os.geteuid():
                raise HostFailure(
                    f"the data directory belongs to user {status.st_uid}, the server runs as "
                    f"{os.geteuid()}",
                    hint="its owner could read all guests' memory; chown it, or choose another "
                    "with --data-dir or STILLFRAME_DATA_DIR",
                    data_dir=str(self.root),
                )
            if stat.S_IMODE(status.st_mode) != _PRIVATE:
                mode = stat.S_IMODE(status.st_mode)
                log.warning("%s had mode %04o, it is given %04o", self.root, mode, _PRIVATE)
            self.root.chmod(_PRIVATE)
        except OSError as error:
            raise HostFailure(
                f"cannot use the data directory: {error.strerror}",
                hint="choose a writable one with --data-dir or STILLFRAME_DATA_DIR",
                data_dir=str(self.root),
            ) from error

    def create(self) -> None:
        """Make the directories that are missing, all for the owner only. Raises HostFailure."""
        self.own()
        with storage_errors("make the data directory"):
            for directory in (
                self.images, self.system, self.templates, self.instances, self.snapshots,
                self.expanded,
            ):  # fmt: skip
                directory.mkdir(mode=_PRIVATE, exist_ok=True)
                directory.chmod(_PRIVATE)


def _checked(identifier: str) -> str:
    if not is_id(identifier):
        raise NotFound("resource not found")
    return identifier
