"""Waiting for a file to change, by inotify(7): following a log polls nothing.

A user may have few inotify descriptors (fs.inotify.max_user_instances is often 128), so all who
wait share one, which tells their files apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from weakref import WeakKeyDictionary

from stillframe.model.errors import HostFailure

# linux/inotify.h
IN_MODIFY, IN_DELETE_SELF, IN_MOVE_SELF, IN_ATTRIB, IN_CREATE = 0x2, 0x400, 0x800, 0x4, 0x100
_MASK = IN_MODIFY | IN_DELETE_SELF | IN_MOVE_SELF | IN_ATTRIB | IN_CREATE
_NONBLOCK, _CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_EVENT = struct.Struct("=iIII")  # struct inotify_event: watch, mask, cookie, length of the name
_OVERFLOW = -1  # the watch of the event that says that others were lost


@contextlib.asynccontextmanager
async def file_changes(path: Path) -> AsyncIterator[asyncio.Event]:
    """An event that is set whenever ``path`` was written to or removed, or, if it is a directory,
    a file was made in it; clear it before waiting.

    Raises OSError when the file cannot be watched, HostFailure when this host lets nobody watch any
    more files.
    """
    loop = asyncio.get_running_loop()
    watches = _open.get(loop)
    if watches is None:
        watches = _open[loop] = _Watches()
        loop.add_reader(watches.fd, watches.tell)
    changed = asyncio.Event()
    try:
        watch = watches.add(path, changed)
        try:
            yield changed
        finally:
            watches.remove(watch, changed)
    finally:
        if not watches.waiting:
            del _open[loop]
            loop.remove_reader(watches.fd)
            os.close(watches.fd)


class _Watches:
    """An inotify descriptor, and who waits for what it tells."""

    def __init__(self) -> None:
        """Raises HostFailure."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._libc.inotify_init1(_NONBLOCK | _CLOEXEC)
        if self.fd < 0:
            raise _no_more("fs.inotify.max_user_instances or the limit of open files")
        self.waiting: dict[int, list[asyncio.Event]] = {}  # by watch: one for each file

    def add(self, path: Path, changed: asyncio.Event) -> int:
        """Set ``changed`` at every change of ``path``; the watch. Raises OSError, HostFailure."""
        watch: int = self._libc.inotify_add_watch(self.fd, os.fsencode(path), _MASK)
        if watch < 0:
            code = ctypes.get_errno()
            if code == errno.ENOSPC:
                raise _no_more("fs.inotify.max_user_watches")
            raise OSError(code, os.strerror(code), str(path))
        self.waiting.setdefault(watch, []).append(changed)
        return watch

    def remove(self, watch: int, changed: asyncio.Event) -> None:
        """Undo ``add``."""
        self.waiting[watch].remove(changed)
        if not self.waiting[watch]:
            del self.waiting[watch]
            self._libc.inotify_rm_watch(self.fd, watch)  # fails if the file has gone: as well

    def tell(self) -> None:
        """Read what has happened and set the events of those who wait for it."""
        with contextlib.suppress(BlockingIOError):
            while events := os.read(self.fd, 65536):
                place = 0
                while place < len(events):
                    watch, _, _, length = _EVENT.unpack_from(events, place)
                    place += _EVENT.size + length
                    for waited in [watch] if watch != _OVERFLOW else self.waiting:
                        for changed in self.waiting.get(waited, ()):
                            changed.set()


_open: WeakKeyDictionary[asyncio.AbstractEventLoop, _Watches] = WeakKeyDictionary()


def _no_more(limit: str) -> HostFailure:
    reason = os.strerror(ctypes.get_errno())
    return HostFailure(f"no more files can be watched: {reason}", hint=f"raise {limit}")
