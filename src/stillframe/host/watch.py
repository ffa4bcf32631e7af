"""Waiting for a file to change, by inotify(7): following a log polls nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import AsyncIterator
from pathlib import Path

# linux/inotify.h
IN_MODIFY, IN_DELETE_SELF, IN_MOVE_SELF, IN_ATTRIB, IN_CREATE = 0x2, 0x400, 0x800, 0x4, 0x100
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC


@contextlib.asynccontextmanager
async def file_changes(path: Path) -> AsyncIterator[asyncio.Event]:
    """An event that is set whenever ``path`` was written to or removed, or, if it is a directory,
    a file was made in it; clear it before waiting.

    Raises OSError when the file cannot be watched.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def drain() -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(fd, 65536):
                pass
        changed.set()

    try:
        mask = IN_MODIFY | IN_DELETE_SELF | IN_MOVE_SELF | IN_ATTRIB | IN_CREATE
        if libc.inotify_add_watch(fd, os.fsencode(path), mask) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        loop.add_reader(fd, drain)
        try:
            yield changed
        finally:
            loop.remove_reader(fd)
    finally:
        os.close(fd)
