"""A process told apart from later ones with its number, and its end waited for, on macOS.

libproc's proc_pidinfo (bsd/sys/proc_info.h), sysctl(3), kqueue(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import sys

_PROC_PIDTBSDINFO = 3
# struct proc_bsdinfo: status is its second word; the start in seconds and microseconds ends it.
_BSDINFO_SIZE, _STATUS_OFFSET, _START_OFFSET = 136, 4, 120
_STATUS, _START = struct.Struct("=I"), struct.Struct("=QQ")
_ZOMBIE = 5  # sys/proc.h: SZOMB
_MICROSECONDS = 1_000_000


def started(info: bytes) -> int | None:
    """When the process of a ``proc_bsdinfo`` started, in microseconds; None if it has ended."""
    if len(info) != _BSDINFO_SIZE or _STATUS.unpack_from(info, _STATUS_OFFSET)[0] == _ZOMBIE:
        return None
    seconds, rest = _START.unpack_from(info, _START_OFFSET)
    return int(seconds) * _MICROSECONDS + int(rest)


def start_time(pid: int) -> int:
    """Microseconds since 1970. Raises ProcessLookupError."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_BSDINFO_SIZE)
    flavor, argument = ctypes.c_int(_PROC_PIDTBSDINFO), ctypes.c_uint64(0)
    got = libc.proc_pidinfo(ctypes.c_int(pid), flavor, argument, buffer, _BSDINFO_SIZE)
    time = started(buffer.raw[: max(0, got)])
    if time is None:
        raise ProcessLookupError(pid)
    return time


def boot_session() -> str:
    """This boot of the host (kern.bootsessionuuid). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(64)
    size = ctypes.c_size_t(len(buffer))
    name = b"kern.bootsessionuuid"
    if libc.sysctlbyname(name, buffer, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return buffer.value.decode("ascii")


def open_exit(pid: int) -> int:
    """A descriptor that becomes readable when the process ends. Raises ProcessLookupError, OSError.

    A kqueue with one event, so it can be waited for like a pidfd.
    """
    if sys.platform == "darwin":
        queue = select.kqueue()
        try:
            event = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            queue.control([event], 0)
            return os.dup(queue.fileno())
        finally:
            queue.close()
    raise OSError("kqueue is a thing of macOS")


def reap(pid: int) -> None:
    """Take a dead child's remains; no error for a process that is none of ours."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
