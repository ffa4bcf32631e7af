"""The private file tree of one Firecracker: which files it sees, under which names.

The names inside (``/memory``, ``/disk0`` ...) are the same in every VM. ``/run`` is a directory of
the VM that host and VMM share: sockets, and what a snapshot writes. ``vmm/isolation`` makes it.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from stillframe.model.errors import HostFailure
from stillframe.vmm.isolation.command import apart

_PROBE_SCRATCH = 1 << 20  # bytes
_PROGRAM_INTERPRETER = 3  # PT_INTERP, elf(5)
# What a dynamically linked VMM needs; the official one is static. Of a merged /usr the others are
# symbolic links.
_LIBRARIES = ("/usr", "/lib", "/lib64")
_DEVICES = ("/dev/kvm", "/dev/urandom", "/dev/null")
_NETWORK_DEVICES = ("/dev/net/tun",)


@dataclass(frozen=True, slots=True)
class Seen:
    """A file (or directory) of the host that the VMM sees as ``name``."""

    name: str
    path: Path
    readonly: bool = True


class SharedDirectory:
    """``/run`` of a VM as the host sees it: ``jail`` in the VM's directory.

    Names in capitals are the VMM's, the others are ours for the same.
    """

    API = "/run/api.sock"
    AGENT = "/run/vsock.sock"
    LOG = "/run/log"
    STATE = "/run/state"
    MEMORY = "/run/memory"
    SCRATCH = "/scratch/memory"  # not shared, and gone with the VMM

    def __init__(self, vm: Path) -> None:
        """``vm`` is the VM's directory."""
        self.path = vm / "jail"
        self.api = self.path / "api.sock"
        self.agent = self.path / "vsock.sock"
        self.log = self.path / "log"
        self.state = self.path / "state"
        self.memory = self.path / "memory"

    def make(self) -> None:
        """An empty directory, whatever an earlier VMM left. Raises HostFailure."""
        self.remove()
        try:
            self.path.mkdir(mode=0o700)
            self.log.touch(mode=0o600)  # older Firecrackers do not make it
        except OSError as error:
            raise HostFailure(f"the VM's directory cannot be made: {error.strerror}") from error

    def remove(self) -> None:
        """Remove it with what it holds; no error when it is gone."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)


def confined(
    binary: str,
    arguments: list[str],
    shared: Path,
    files: list[Seen],
    *,
    scratch_bytes: int = _PROBE_SCRATCH,
    console: Path | None = None,
    uplink: str | None = None,
) -> list[str]:
    """The command that runs ``binary`` with ``arguments`` in a file tree of its own.

    It sees ``files``, the devices a VMM needs, ``shared`` as ``/run``, and a ``/scratch`` in memory
    of at most ``scratch_bytes``. Its standard output is appended to ``console``. With ``uplink`` it
    has a network of its own too (``vmm/isolation``). The process carries the VM's directory in its
    name, by which it is found when nobody knows its pid any more.
    """
    devices = _DEVICES + (_NETWORK_DEVICES if uplink else ())
    inside = [Seen("/vmm", Path(binary)), *files]
    inside += [Seen(name, Path(name), readonly=False) for name in devices if Path(name).exists()]
    tree = ["tree", str(shared), str(scratch_bytes)]
    for library in map(Path, _LIBRARIES if _is_dynamic(Path(binary)) else ()):
        if library.is_symlink():
            tree += ["link", str(library), str(library.readlink())]
        elif library.is_dir():
            inside.append(Seen(str(library), library))
    for seen in inside:
        tree += ["ro" if seen.readonly else "rw", seen.name, str(seen.path)]
    return apart(
        "/vmm", f"{shared.parent}/firecracker", arguments,
        uplink=uplink, console=console, tree=tree,
    )  # fmt: skip


def _is_dynamic(binary: Path) -> bool:
    """Whether the ELF file names an interpreter (64 bit, little endian; else no)."""
    try:
        head = binary.read_bytes()[:4096]
        if head[:6] != b"\x7fELF\x02\x01":
            return False
        offset, size, count = (
            struct.unpack_from("<Q", head, 32)[0],
            *struct.unpack_from("<HH", head, 54),
        )
        kinds = (struct.unpack_from("<I", head, offset + i * size)[0] for i in range(count))
        return _PROGRAM_INTERPRETER in kinds
    except (OSError, struct.error):
        return False
