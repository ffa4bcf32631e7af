"""Rows about what snapshots and forks take: bytes on disk, memory of the host."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.lab import SMALL, USED, Json, Lab, open_lab
from bench.monitor import HandStarted
from bench.peer import remove
from bench.results import Row, figure, number, slope
from bench.server import NoVolume, xfs_volume

KEYS = ("second-snapshot", "fork-memory")
_REWRITTEN_MIB = 64
_MIB = 1 << 20
_ATTEMPTS = 2
_NEVER_RUN = 5
_TOLERATED_MIB = 3.0
_STEADY_MIB = 2.0


def measure(lab: Lab, wanted: set[str]) -> list[Row]:
    """The wanted rows of ``KEYS``."""
    makers = {"second-snapshot": _second_row, "fork-memory": _memory_row}
    return [makers[key](lab) for key in KEYS if key in wanted]


# -- the second snapshot --------------------------------------------------------------------------
def _second_row(lab: Lab) -> Row:
    row = Row(
        "second-snapshot",
        "second snapshot of the same VM, bytes stored / bytes the guest changed (XFS)",
        "<= 1.3", limit=1.3,
    )  # fmt: skip
    try:
        with (
            xfs_volume(lab.directory) as root,
            open_lab(root, runs=lab.runs, quick=lab.quick) as there,
        ):
            _second_snapshots(there, root, row)
    except NoVolume as error:
        row.not_run = str(error)
    return row


def _second_snapshots(lab: Lab, root: Path, row: Row) -> None:
    """Each snapshot of one VM beside the one before it, between which the guest rewrote memory.

    Stored is what the file system has less after the snapshot than before it, so that nothing is
    forgotten and nothing shared is counted. Changed are the bytes the writer rewrote; what the
    guest's kernel changed besides counts against us.
    """
    instance = lab.boot(USED)["id"]
    previous = lab.snapshot(instance).body
    stored, told = list[float](), list[float]()
    for run in range(lab.runs):
        lab.client.must_run(instance, "dirty", "ask", f"rewrite={_REWRITTEN_MIB}")
        before = _free_bytes(root)
        taken = lab.snapshot(instance).body
        stored.append(before - _free_bytes(root))
        told.append(taken["stored_bytes"])
        lab.client.delete_snapshot(previous["id"])
        previous = taken
        if (run + 1) % 5 == 0:
            lab.say(f"{run + 1} of {lab.runs}")
    lab.verify_fork(previous)
    changed = _REWRITTEN_MIB * _MIB
    row.value = statistics.median(stored) / changed
    row.details = [
        f"the guest rewrote {_REWRITTEN_MIB} MiB",
        f"less free on the file system {figure([b / _MIB for b in stored], 'MiB')}",
        f"the server's stored_bytes {figure([b / _MIB for b in told], 'MiB')}",
    ]
    row.samples = {"stored bytes": stored, "stored_bytes told": told}
    row.phases = {"second snapshot on XFS": previous.get("timings_ms", {})}


def _free_bytes(root: Path) -> int:
    """Free bytes of a file system, after all is written and XFS has returned what it reserved."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        # os.sync would wait for every other file system too.
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs failed")
        # XFS reserves space beyond what is written, for some minutes (xfs_spaceman(8), prealloc).
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(
                ["xfs_spaceman", "-c", "prealloc -s", str(root)], capture_output=True, check=False
            )
        facts = os.fstatvfs(descriptor)
    finally:
        os.close(descriptor)
    return facts.f_bfree * facts.f_bsize


# -- memory of idle forks -------------------------------------------------------------------------
@dataclass
class _Growth:
    """Available memory (MiB) after each VM of a series, and what each VMM holds for itself."""

    available: list[tuple[float, float]] = field(default_factory=list)
    guest_mib: list[float] = field(default_factory=list)  # private pages of the memory image
    other_mib: list[float] = field(default_factory=list)  # private pages of the VMM itself

    @property
    def each_mib(self) -> float:
        """MiB less available for each VM."""
        return -slope(self.available)

    @property
    def held_mib(self) -> float:
        """MiB that each VMM holds for itself, by its own page tables."""
        return statistics.mean(a + b for a, b in zip(self.guest_mib, self.other_mib, strict=True))

    def hold(self, pids: Sequence[int]) -> None:
        """Look at what each VMM holds, once all have been idle for a while."""
        time.sleep(5)
        for pid in pids:
            guest, other = private_mib(Path(f"/proc/{pid}/smaps").read_text())
            self.guest_mib.append(guest)
            self.other_mib.append(other)

    def agrees_with(self, other: _Growth) -> bool:
        """Whether two series can be compared: beside what the VMMs hold, each VM costs the same.

        That rest is tables, stacks and buffers of the kernel. The available memory also moves with
        whatever else the host does; then the rests differ.
        """
        ours, theirs = self.each_mib - self.held_mib, other.each_mib - other.held_mib
        return min(ours, theirs) > -_TOLERATED_MIB and abs(ours - theirs) < _TOLERATED_MIB


def _memory_row(lab: Lab) -> Row:
    """Idle forks beside the same QEMU run by hand from the same state, which idles too.

    The VMM's own is what that one holds beside the pages its guest has written: program, heap,
    devices, and under emulation the code that it made of the guest's. What is over it is the
    fork's: pages its guest wrote, and whatever our way of running it adds. What a VMM holds whose
    guest never ran is shown beside.
    """
    row = Row(
        "fork-memory", "memory of an idle fork beyond the VMM's own", "<= 10 MiB",
        limit=10.0, unit="MiB",
    )  # fmt: skip
    count = 6 if lab.quick else max(20, lab.runs)
    snapshot = lab.snapshot_of(SMALL)
    hand = lab.hand_for(SMALL)
    for _ in range(1 if lab.quick else _ATTEMPTS):
        forks = _series(lab, count, lambda stack: _idle_fork(lab, snapshot, stack))
        base = _series(lab, count, lambda stack: _by_hand(lab, snapshot, stack, go=True))
        if forks.agrees_with(base):
            row.value = forks.each_mib - (base.each_mib - statistics.mean(base.guest_mib))
            break
    else:
        row.not_run = "other work on this host moves its available memory, see below"
    never_run = _Growth()
    with contextlib.ExitStack() as stack:
        never_run.hold([_by_hand(lab, snapshot, stack, go=False) for _ in range(_NEVER_RUN)])
    row.details = [
        f"{count} forks of a guest with {hand.spec.memory_bytes // _MIB} MiB: "
        f"{number(forks.each_mib)} MiB less available for each; run by hand: "
        f"{number(base.each_mib)} MiB",
        f"guest's own pages {figure(forks.guest_mib, 'MiB')}; run by hand "
        f"{figure(base.guest_mib, 'MiB')}; never run {figure(never_run.guest_mib, 'MiB')}",
        f"VMM's private pages {figure(forks.other_mib, 'MiB')}; run by hand "
        f"{figure(base.other_mib, 'MiB')}; never run {figure(never_run.other_mib, 'MiB')}",
    ]
    row.samples = {
        "available with forks (MiB)": [y for _, y in forks.available],
        "available with baseline (MiB)": [y for _, y in base.available],
        "guest pages of a fork (MiB)": forks.guest_mib,
        "VMM pages of a fork (MiB)": forks.other_mib,
        "VMM pages of the baseline (MiB)": base.other_mib,
    }
    return row


def _series(lab: Lab, count: int, start: Callable[[contextlib.ExitStack], int]) -> _Growth:
    """Start ``count`` VMs one after another, then end them."""
    with contextlib.ExitStack() as stack:
        growth = _grow(count, lambda: start(stack), 25 if lab.quick else 60)
    lab.say(f"{count} VMs, {number(growth.each_mib)} MiB each, {number(growth.held_mib)} held")
    return growth


def _grow(count: int, start: Callable[[], int], seconds: float) -> _Growth:
    growth, pids = _Growth(), list[int]()
    await_steady_memory(seconds)
    for started in range(count + 1):
        if started:
            pids.append(start())
            time.sleep(0.5)
        growth.available.append((started, available_mib()))
    growth.hold(pids)
    return growth


def _idle_fork(lab: Lab, snapshot: Json, stack: contextlib.ExitStack) -> int:
    fork, pid = lab.fork_and_pid(snapshot)
    stack.callback(lab.client.delete, fork)
    return pid


def _by_hand(lab: Lab, snapshot: Json, stack: contextlib.ExitStack, *, go: bool) -> int:
    directory = lab.directory / lab.name("waiting")
    stack.callback(remove, directory)
    state = lab.hand_for(SMALL).prepare_fork(snapshot["id"], directory)
    machine = HandStarted(lab.hand_for(SMALL).command(directory, state), directory, state)
    stack.callback(machine.kill)
    machine.load()
    if go:
        machine.go()
    return machine.process.pid


def await_steady_memory(seconds: float) -> None:
    """Return when available memory no longer moves, or after ``seconds``.

    A host that is itself a guest may get back what ended processes held only bit by bit.
    """
    deadline = time.monotonic() + seconds
    seen = [available_mib()]
    while time.monotonic() < deadline:
        time.sleep(1)
        seen = [*seen, available_mib()][-4:]
        if len(seen) == 4 and max(seen) - min(seen) < _STEADY_MIB:
            return


def available_mib() -> float:
    """The host's available memory (MemAvailable of proc(5))."""
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) / 1024


def private_mib(smaps: str) -> tuple[float, float]:
    """Anonymous memory of a VMM (MiB): of its guest's memory image, and all other.

    ``smaps`` is /proc/PID/smaps. A page of a private mapping becomes anonymous when written.
    """
    guest = other = 0
    in_guest = False
    for line in smaps.splitlines():
        key, _, value = line.partition(":")
        if " " in key:  # "7f00...-7f01... rw-p ... /path": a new mapping
            in_guest = line.endswith("/memory")
        elif key == "Anonymous":
            size = int(value.split()[0])
            guest, other = (guest + size, other) if in_guest else (guest, other + size)
    return guest / 1024, other / 1024
