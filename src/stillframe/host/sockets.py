"""Unix sockets with paths of any length, bound before whoever listens on them is started."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from stillframe.model.errors import VmmFailure


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for ``path`` that fits into sun_path (108 bytes, unix(7)): by its directory's fd.

    macOS (104 bytes) has no such names; there a long path is refused by the kernel.
    """
    if len(os.fsencode(path)) < 100 or sys.platform == "darwin":
        yield str(path)
        return
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def bind_unix(path: Path) -> socket.socket:
    """A listening socket at ``path`` (0600; a stale one is replaced), to be passed to a VMM.

    Whoever connects before the VMM accepts is queued by the kernel: nobody has to poll.
    Raises OSError.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as name:
            listener.bind(name)
        path.chmod(0o600)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


def open_socket(path: Path) -> int:
    """A descriptor of the socket at ``path``; ``/proc/self/fd/N`` is a short name for it.

    Never through a link: a VMM may put one there that leads to another VM's socket. Raises OSError.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    return fd


def connect_socket(path: Path) -> socket.socket:
    """A connected non-blocking socket. Raises VmmFailure when nobody listens there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        if sys.platform == "darwin":
            connection.connect(str(path))
            return connection
        fd = open_socket(path)
        try:
            connection.connect(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
    except OSError as error:
        connection.close()
        raise VmmFailure(f"cannot connect to {path.name}: {error.strerror}") from error
    return connection


async def connect_unix(
    path: Path, *, limit: int = 1 << 16
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream connection to the socket at ``path``. Raises VmmFailure."""
    connection = connect_socket(path)
    return await asyncio.open_unix_connection(sock=connection, limit=limit)
