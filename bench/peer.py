"""The peers' way on the same kind of VM: QEMU writes all memory to a file while the guest stands.

Stop; ``migrate`` of all RAM to a file; a sparse copy of the VM's directory; for a fork, a new
process with ``-incoming`` from that file. It is given every advantage that costs nothing: plain
anonymous memory, no limit on the migration's speed, no fsync, no control plane, and a source that
goes on in the process it had.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from bench.echo import GATEWAY
from bench.hand import Hand, plain_memory
from bench.monitor import HandStarted, Monitor
from stillframe.host.files import data_extents

_STATE = "ram"
_NETWORK = [
    ("network", "1"), ("address", "10.0.2.15/24"), ("gateway", "10.0.2.2"), ("dns", "10.0.2.3"),
]  # fmt: skip
_UNLIMITED = 1 << 50  # bytes a second; QEMU's default is 128 MiB/s


@dataclass(frozen=True, slots=True)
class PeerSnapshot:
    """A snapshot the peers' way: milliseconds, and where the copy lies."""

    pause_ms: float  # from stop to cont, of which:
    migrate_ms: float
    copy_ms: float
    copy: Path


class PeerVm:
    """A VM started by hand, with plain memory. It stands still unless it is being measured."""

    def __init__(
        self, hand: Hand, directory: Path, *, used_mib: int, rate_mib: int, token: int, port: int
    ) -> None:
        """Boot it; ``used_mib`` are filled and rewritten at ``rate_mib`` a second, it ticks.

        The guest may still be booting on return; its first tick says that it is ready.
        """
        self._hand, self.directory = hand, directory
        work = f"dirty {used_mib} {rate_mib} && " if used_mib else ""
        script = f"{work}ticks {token} {GATEWAY} {port} && exec sleep 1000000"
        hand.prepare_boot(
            directory,
            [("arg", "/bin/sh"), ("arg", "-c"), ("arg", script), ("nonce", "peer"), *_NETWORK],
        )
        self._machine = HandStarted(plain_memory(hand.command(directory, None)), directory)
        self._machine.greet()
        monitor = self._machine.monitor
        monitor.run(
            "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
        )
        monitor.run("migrate-set-parameters", **{"max-bandwidth": _UNLIMITED})

    def go(self) -> None:
        """Let the guest run."""
        self._machine.monitor.run("cont")

    def stand(self) -> None:
        """Let the guest stand still."""
        self._machine.monitor.run("stop")

    def close(self) -> None:
        """End it."""
        self._machine.kill()

    def snapshot(self, copy: Path, *, resume: bool) -> PeerSnapshot:
        """Snapshot the running guest into the new directory ``copy``."""
        state = self.directory / _STATE
        state.unlink(missing_ok=True)
        monitor = self._machine.monitor
        began = time.perf_counter()
        monitor.run("stop")
        _migrate(monitor, state)
        migrated = time.perf_counter()
        copy_directory(self.directory, copy)
        copied = time.perf_counter()
        if resume:
            monitor.run("cont")
        ended = time.perf_counter()
        return PeerSnapshot(
            (ended - began) * 1000, (migrated - began) * 1000, (copied - migrated) * 1000, copy
        )

    def fork(self, snapshot: PeerSnapshot) -> float:
        """Run a new process from a snapshot until its guest runs, end it; milliseconds."""
        state = snapshot.copy / _STATE
        command = plain_memory(self._hand.command(snapshot.copy, state))
        machine = HandStarted(command, snapshot.copy, state)
        try:
            machine.load()
            return machine.go()
        finally:
            machine.kill()


def _migrate(monitor: Monitor, state: Path) -> None:
    descriptor = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        monitor.send("getfd", descriptor, fdname="state")
        monitor.receive()
    finally:
        os.close(descriptor)
    monitor.run("migrate", uri="fd:state")
    monitor.await_migration()


def copy_directory(source: Path, destination: Path) -> None:
    """Copy a VM's directory, holes kept and nothing shared, as ``cp -r --sparse=always`` does."""
    destination.mkdir()
    for path in sorted(source.rglob("*")):
        target = destination / path.relative_to(source)
        if path.is_dir():
            target.mkdir()
        elif path.is_file():
            with path.open("rb") as a, target.open("xb") as b:
                _copy_file(a.fileno(), b.fileno())


def _copy_file(source: int, destination: int) -> None:
    size = os.fstat(source).st_size
    os.ftruncate(destination, size)
    for start, end in data_extents(source, size):
        position = os.lseek(destination, start, os.SEEK_SET)
        while position < end:
            # Not copy_file_range, which would share blocks where the file system can.
            position += os.sendfile(destination, source, position, end - position)


def remove(copy: Path) -> None:
    """Remove a copy, outside of any clock.

    The peers' way flushes nothing: what it wrote must not hold up whoever flushes next.
    """
    shutil.rmtree(copy, ignore_errors=True)
    os.sync()
