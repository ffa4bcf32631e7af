"""Faults in a server's calls on its data directory: a preloaded library, armed from outside.

A library between the server and the C library (``inject.c``) was chosen after trying the others.
``strace -e inject`` stops every thread at every call. Wrapping Python's own
calls misses what SQLite writes, and that is where the commits are. This reaches every call of both,
costs nothing until it is armed, and the product needs no hook for it. VMMs do not inherit it, for
the server gives them an environment of their own.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import subprocess
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_ALLOCATES, _WRITES, _SYNCS, _REMOVES, _TALKS = 1, 2, 4, 8, 16
_FOR_EVER = 0xFFFFFFFF
_SOON = 7  # calls: amid undoing what was begun
_SOURCE = Path(__file__).with_name("inject.c")


class Fault(StrEnum):
    """What happens at a call."""

    KILL = "kill -9"
    NO_SPACE = "ENOSPC"  # once
    FULL = "ENOSPC from there on"
    EIO_WRITE = "EIO on write"
    EIO_FSYNC = "EIO on fsync"
    EIO_FSYNC_KILL = "EIO on fsync, kill -9 soon after"
    READ_ONLY = "EROFS"
    QUOTA = "EDQUOT"


_MASKS = {
    Fault.KILL: _ALLOCATES | _WRITES | _SYNCS | _REMOVES | _TALKS,
    Fault.NO_SPACE: _ALLOCATES | _WRITES,
    Fault.FULL: _ALLOCATES | _WRITES,
    Fault.EIO_WRITE: _ALLOCATES | _WRITES | _REMOVES,
    Fault.EIO_FSYNC: _SYNCS,
    Fault.EIO_FSYNC_KILL: _SYNCS,
    Fault.READ_ONLY: _ALLOCATES | _WRITES | _REMOVES,
    Fault.QUOTA: _ALLOCATES | _WRITES,
}
_ERRORS = {
    Fault.KILL: 0,
    Fault.NO_SPACE: errno.ENOSPC,
    Fault.FULL: errno.ENOSPC,
    Fault.EIO_WRITE: errno.EIO,
    Fault.EIO_FSYNC: errno.EIO,
    Fault.EIO_FSYNC_KILL: errno.EIO,
    Fault.READ_ONLY: errno.EROFS,
    Fault.QUOTA: errno.EDQUOT,
}


class _Plan(ctypes.Structure):
    """``struct plan`` of inject.c."""

    _fields_ = (
        ("armed", ctypes.c_uint32),
        ("mask", ctypes.c_uint32),
        ("error", ctypes.c_int32),
        ("first", ctypes.c_uint32),
        ("last", ctypes.c_uint32),
        ("deadly", ctypes.c_uint32),
        ("calls", ctypes.c_uint32),
        ("fired", ctypes.c_uint32),
        ("since", ctypes.c_uint32),
        ("only", ctypes.c_char * 128),
        ("where", ctypes.c_char * 232),
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an armed fault: calls counted, whether it struck, and where first."""

    calls: int
    struck: bool
    where: str


class Injector:
    """Arms and disarms faults in the server that is started with ``environment``."""

    def __init__(self, directory: Path, data_dir: Path) -> None:
        """Build the library in ``directory``, for calls below ``data_dir``."""
        library, plan = directory / "inject.so", directory / "plan"
        subprocess.run(
            ["gcc", "-std=gnu11", "-O2", "-fPIC", "-shared", "-o", str(library), str(_SOURCE)],
            check=True, timeout=60,
        )  # fmt: skip
        plan.write_bytes(bytes(mmap.PAGESIZE))
        with plan.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.environment = {
            "LD_PRELOAD": str(library),
            "STILLFRAME_INJECT": str(plan),
            "STILLFRAME_INJECT_BELOW": str(data_dir.resolve()),
        }

    def arm(self, fault: Fault, number: int, only: str = "") -> None:
        """Have the ``number``th call from now that is of the fault's kind strike.

        ``only`` is a shell pattern for those that count: what the call is called, and its path.
        """
        last = _FOR_EVER if fault is Fault.FULL else number
        deadly = _SOON if fault is Fault.EIO_FSYNC_KILL else 0
        plan = _Plan(1, _MASKS[fault], _ERRORS[fault], number, last, deadly, 0, 0, 0, only.encode())
        self._map[: ctypes.sizeof(plan)] = bytes(plan)

    @property
    def stays(self) -> bool:
        """Whether a fault has struck that strikes at every further call, until it is disarmed."""
        plan = self._plan()
        return bool(plan.fired) and bool(plan.last == _FOR_EVER)

    def disarm(self) -> Outcome:
        """Stop counting; what happened since ``arm``."""
        plan = self._plan()
        self._map[: ctypes.sizeof(_Plan)] = bytes(ctypes.sizeof(_Plan))
        where = plan.where.decode(errors="replace")
        return Outcome(plan.calls, plan.fired > 0, where)

    def _plan(self) -> _Plan:
        return _Plan.from_buffer_copy(self._map[: ctypes.sizeof(_Plan)])

    def close(self) -> None:
        """Unmap the plan."""
        self._map.close()
