"""Which bytes of a file are its own: what deleting it would give back to the file system.

A file shares bytes in two ways: whole, by hard links, and in part, by reflinked extents. The first
is told by the link count, the second by FIEMAP (Linux Documentation/filesystems/fiemap.rst): an
extent bears FIEMAP_EXTENT_SHARED when another file, or another place of this one, uses its blocks.
A file system without FIEMAP has no reflinks; there ``st_blocks`` says it all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

FS_IOC_FIEMAP = 0xC020660B  # linux/fs.h: _IOWR('f', 11, struct fiemap)
FIEMAP_EXTENT_LAST, FIEMAP_EXTENT_SHARED = 0x1, 0x2000  # linux/fiemap.h
# struct fiemap: start, length, flags, mapped extents, room for extents, reserved.
_HEADER = struct.Struct("=QQLLLL")
# struct fiemap_extent: logical, physical, length, two reserved, flags, three reserved.
_EXTENT = struct.Struct("=QQQ16xL12x")
_EXTENTS_AT_ONCE = 512
_WHOLE_FILE = 2**64 - 1
_NO_FIEMAP = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EBADR, errno.ENOSYS}
_BLOCK = 512  # the unit of st_blocks, whatever the file system's own


def exclusive_bytes(path: Path) -> int:
    """Bytes on disk that belong to this file alone: allocated, and shared with no other file.

    A file with several hard links shares everything, so it has none; a directory or a symbolic link
    has none either. Blocks; call it from a thread. Raises OSError.
    """
    status = path.stat(follow_symlinks=False)
    return _exclusive(path, status) if status.st_nlink == 1 else 0


def freed_by_deleting(paths: Iterable[Path]) -> int:
    """Bytes the file system gets back when all of ``paths`` are deleted together.

    Counts a file whose every hard link is among them. Extents reflinked between two of them are
    not counted, so this is a lower bound where files share extents. A path that is gone counts as
    nothing. Blocks; call it from a thread. Raises OSError.
    """
    found: dict[tuple[int, int], tuple[Path, os.stat_result, int]] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat(follow_symlinks=False)
            inode = (status.st_dev, status.st_ino)
            links = found[inode][2] if inode in found else 0
            found[inode] = (path, status, links + 1)
    freed = 0
    for path, status, links in found.values():
        if links >= status.st_nlink:
            with contextlib.suppress(FileNotFoundError):
                freed += _exclusive(path, status)
    return freed


def shared_bytes(path: Path, other: Path) -> int:
    """Bytes on disk that two files have in common: all, by a hard link, or extents, by reflinks.

    None when the other is not there. Blocks; call it from a thread. Raises OSError.
    """
    status = path.stat(follow_symlinks=False)
    try:
        beside = other.stat(follow_symlinks=False)
    except FileNotFoundError:
        return 0
    if (status.st_dev, status.st_ino) == (beside.st_dev, beside.st_ino):
        return status.st_blocks * _BLOCK
    with contextlib.suppress(FileNotFoundError):
        return _common(_shared_runs(path), _shared_runs(other))
    return 0


def _shared_runs(path: Path) -> list[tuple[int, int]]:
    """Where on the device the shared extents of a file begin and end, in order."""
    with path.open("rb") as file:
        try:
            return sorted(
                (physical, physical + length)
                for _, length, flags, physical in extents(file.fileno())
                if flags & FIEMAP_EXTENT_SHARED
            )
        except OSError as error:
            if error.errno not in _NO_FIEMAP:
                raise
            return []


def _common(one: list[tuple[int, int]], two: list[tuple[int, int]]) -> int:
    """How much two lists of runs overlap."""
    common, i, j = 0, 0, 0
    while i < len(one) and j < len(two):
        common += max(0, min(one[i][1], two[j][1]) - max(one[i][0], two[j][0]))
        if one[i][1] < two[j][1]:
            i += 1
        else:
            j += 1
    return common


def allocated_in(directory: Path, seen: set[tuple[int, int]]) -> int:
    """Bytes on disk of all files below a directory, those in ``seen`` (device, inode) left out.

    Counts each file once however many links it has, and adds it to ``seen``. Blocks.
    """
    total = 0
    for path in files_in(directory):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat(follow_symlinks=False)
            if (inode := (status.st_dev, status.st_ino)) not in seen:
                seen.add(inode)
                total += status.st_blocks * _BLOCK
    return total


def files_in(directory: Path) -> list[Path]:
    """All files below a directory, for ``freed_by_deleting``; none when it is gone."""
    return [
        Path(parent) / name for parent, _, names in os.walk(directory) for name in names
    ]  # os.walk follows no symbolic links


def _exclusive(path: Path, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode) or not status.st_blocks:
        return 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        shared = sum(length for _, length, flags, _ in extents(fd) if flags & FIEMAP_EXTENT_SHARED)
    except OSError as error:
        if error.errno not in _NO_FIEMAP:
            raise
        shared = 0
    finally:
        os.close(fd)
    return max(0, status.st_blocks * _BLOCK - shared)


def extents(fd: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(offset, length, FIEMAP flags, place)`` of an open file's extents, in order.

    In bytes; the place is that on the device.

    Raises OSError; EOPNOTSUPP where the file system has no FIEMAP.
    """
    start = 0
    while True:
        buffer = bytearray(_HEADER.size + _EXTENTS_AT_ONCE * _EXTENT.size)
        length = _WHOLE_FILE - start
        _HEADER.pack_into(buffer, 0, start, length, 0, 0, _EXTENTS_AT_ONCE, 0)
        fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer, True)
        page = list(parse_extents(buffer))
        yield from page
        if not page or page[-1][2] & FIEMAP_EXTENT_LAST:
            return
        start = page[-1][0] + page[-1][1]


def parse_extents(buffer: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(offset, length, flags, place)`` of a ``struct fiemap`` that the kernel filled."""
    mapped = _HEADER.unpack_from(buffer)[3]
    for number in range(mapped):
        logical, physical, length, flags = _EXTENT.unpack_from(
            buffer, _HEADER.size + number * _EXTENT.size
        )
        yield logical, length, flags, physical
