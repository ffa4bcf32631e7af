"""Files: clones, sparse files, durable writes. One clone primitive serves every hypervisor."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import stat
import struct
import sys
import threading
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from stillframe.host.darwin.files import clone_file
from stillframe.model.errors import HostFailure, StorageFull

FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
# linux/fs.h: struct fsxattr (flags, extsize, nextents, projid, cowextsize, padding).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_FSGETXATTR, _FSSETXATTR, _XFLAG_COWEXTSIZE = 0x801C581F, 0x401C5820, 0x10000
_FSXATTR = struct.Struct("=5L8x")
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h
_CANNOT_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EBADF}
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Descriptors, memory, permissions, a server of files that does not answer (open(2), read(2)).
_NOT_THE_FILE = _NO_DESCRIPTORS | {
    errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EACCES, errno.EPERM, errno.ESTALE,
    errno.ETIMEDOUT,
}  # fmt: skip
# What has to be undone can then be when no descriptors are left.
_KEPT_BACK = 8  # removing a tree takes two for each level of it
_kept: list[int] = []
_guard = threading.Lock()
_BLOCK = 4096
_PIECE = 1 << 20  # bytes copied by hand at once
_ZEROS = bytes(_BLOCK)
_MANY_ZEROS = memoryview(bytes(1 << 20))


class CloneKind(StrEnum):
    """How a file was cloned."""

    REFLINK = "reflink"  # shares blocks, costs nothing
    SPARSE_COPY = "sparse copy"  # data copied, holes kept


@contextlib.contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Translate OSError raised inside into StorageFull (no space, quota) or HostFailure.

    ``action`` completes the sentence "could not ...".
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL:
            raise StorageFull(
                f"could not {action}: {reason}",
                hint="free space in the data directory, or delete snapshots",
            ) from error
        raise HostFailure(f"could not {action}: {reason}", code="storage_error") from error


def is_host_trouble(error: OSError) -> bool:
    """Whether a file could not be read for a want of the host's, whatever the file holds."""
    return error.errno in _NOT_THE_FILE


def clone(source: Path, destination: Path) -> CloneKind:
    """Clone ``source`` to the new file ``destination`` (mode 0600), never densely.

    Uses FICLONE (ioctl_ficlonerange(2)) where the file system can, else copies data extents only.
    A partial destination is removed on failure. Raises OSError.
    """
    if begin_clone(source, destination):
        return CloneKind.REFLINK
    try:
        copy_into(source, destination)
    except BaseException:
        destination.unlink(missing_ok=True)
        raise
    return CloneKind.SPARSE_COPY


def begin_clone(source: Path, destination: Path) -> bool:
    """Reflink ``source`` to the new file ``destination``; true when that made it whole.

    Else it is a hole of the source's size, to be filled with ``copy_into``. Raises OSError.
    """
    if sys.platform == "darwin" and clone_file(source, destination):  # keeps the source's mode
        destination.chmod(0o600)
        return True
    in_fd = open_regular(source)
    try:
        with new_file(destination) as fd:
            whole = _shares(in_fd, fd)
            if not whole:
                os.ftruncate(fd, os.fstat(in_fd).st_size)
            return whole
    finally:
        os.close(in_fd)


def copy_into(source: Path, destination: Path) -> int:
    """Copy the data extents of ``source`` into an existing, empty file; bytes copied.

    The source may be written meanwhile. Raises OSError.
    """
    with source.open("rb") as reading, destination.open("r+b") as writing:
        return copy_data(reading.fileno(), writing.fileno())


def clone_into(source: Path, fd: int) -> CloneKind:
    """Clone ``source`` into an empty open file, as ``clone`` does. Raises OSError."""
    in_fd = open_regular(source)
    try:
        if _shares(in_fd, fd):
            return CloneKind.REFLINK
        copy_data(in_fd, fd)
        return CloneKind.SPARSE_COPY
    finally:
        os.close(in_fd)


def _shares(in_fd: int, out_fd: int) -> bool:
    """Share all blocks of one open file with another, if the file system can. Raises OSError.

    macOS shares by name only (``begin_clone``).
    """
    if sys.platform == "darwin":
        return False
    try:
        fcntl.ioctl(out_fd, FICLONE, in_fd)
    except OSError as error:
        if error.errno not in _CANNOT_CLONE:
            raise
        return False
    return True


def copy_data(in_fd: int, out_fd: int) -> int:
    """Copy the data extents between two open files, keeping holes; bytes copied. Raises OSError."""
    size = os.fstat(in_fd).st_size
    os.ftruncate(out_fd, size)
    copied = 0
    for start, end in data_extents(in_fd, size):
        position = start
        while position < end:
            done = _copy_range(in_fd, out_fd, position, end - position)
            if done == 0:
                raise OSError(errno.EIO, "file shrank while it was copied")
            position += done
        copied += end - start
    return copied


def _copy_range(in_fd: int, out_fd: int, offset: int, length: int) -> int:
    """Copy some of a range to the same place; bytes copied, 0 at the end. Raises OSError."""
    try:
        return os.copy_file_range(in_fd, out_fd, length, offset, offset)
    except OSError as error:  # copy_file_range(2): not between all file systems
        if error.errno not in _CANNOT_CLONE:
            raise
    data = os.pread(in_fd, min(length, _PIECE), offset)
    write_fully(out_fd, data, offset)
    return len(data)


def data_extents(fd: int, size: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield ``(start, end)`` byte ranges that hold data (lseek(2) SEEK_DATA, SEEK_HOLE).

    Only ranges between ``start`` and ``size`` are named.
    """
    position = start
    while position < size:
        try:
            begin = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        if begin >= size:
            return
        position = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        yield begin, position


def open_regular(path: Path | str, *, flags: int = os.O_RDONLY, dir_fd: int | None = None) -> int:
    """Open a regular file, to read unless ``flags`` say else; never a link, a device or a pipe.

    Raises OSError.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, flags, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def create_new(path: Path | str, *, dir_fd: int | None = None) -> int:
    """Open a new file (mode 0600) for reading and writing. Raises OSError (EEXIST too)."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(path, flags, 0o600, dir_fd=dir_fd)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A new file, open for reading and writing; removed unless the block ends well.

    Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        fd = create_new(path)
        stack.callback(os.close, fd)
        undo = stack.enter_context(contextlib.ExitStack())
        undo.callback(path.unlink, missing_ok=True)
        yield fd
        undo.pop_all()


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """``length`` bytes at ``offset``. Raises OSError, also when the file ends before."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    missing = length - len(data)
    while missing:
        data = os.pread(fd, missing, offset + length - missing)
        if not data:
            raise OSError(errno.EIO, "the file is shorter than expected")
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def write_fully(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``. Raises OSError."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(fd, rest, offset)
        rest, offset = rest[done:], offset + done


def write_sparse(fd: int, data: bytes, offset: int) -> None:
    """Write ``data`` into a range that is still a hole; whole blocks of zeros stay holes.

    Raises OSError.
    """
    begin, view = None, memoryview(data)
    for position in range(0, len(data), _BLOCK):
        if data[position : position + _BLOCK] == _ZEROS[: len(data) - position]:
            if begin is not None:
                write_fully(fd, view[begin:position], offset + begin)
            begin = None
        elif begin is None:
            begin = position
    if begin is not None:
        write_fully(fd, view[begin:], offset + begin)


def supports_reflink(directory: Path) -> bool:
    """Whether files in ``directory`` can share blocks, found by trying.

    Raises OSError when it cannot be tried, as on a full disk: only a refused clone means no.
    """
    source, target = directory / ".reflink-probe", directory / ".reflink-probe-clone"
    try:
        source.write_bytes(b"\0" * 4096)
        if sys.platform == "darwin":
            return clone_file(source, target)
        with source.open("rb") as a, target.open("wb") as b:
            return _shares(a.fileno(), b.fileno())
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


def create_sparse(path: Path, size: int) -> None:
    """Make a new file of ``size`` bytes without any data (mode 0600). Raises OSError."""
    fd = create_new(path)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Deallocate a range so that it reads as zeros; writes zeros where that is unsupported.

    Raises OSError.
    """
    try:
        _fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        for start in range(offset, offset + length, len(_MANY_ZEROS)):
            write_fully(fd, _MANY_ZEROS[: offset + length - start], start)


def share_by_page(fd: int) -> None:
    """Have a reflinked file give up sharing page by page, where the file system would do more.

    XFS sets aside 128 KiB for every first write into a shared extent, and gives back what was not
    written half an hour later (ioctl_xfs_fsgetxattr(2), fsx_cowextsize). Fine elsewhere.
    """
    attributes = bytearray(_FSXATTR.size)
    with contextlib.suppress(OSError):  # another file system, or larger blocks
        fcntl.ioctl(fd, _FSGETXATTR, attributes)
        flags, extent_size, extents, project, _ = _FSXATTR.unpack(attributes)
        wanted = (flags | _XFLAG_COWEXTSIZE, extent_size, extents, project, mmap.PAGESIZE)
        fcntl.ioctl(fd, _FSSETXATTR, _FSXATTR.pack(*wanted))


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step (renameat2(2), RENAME_EXCHANGE); both must be there.

    It needs no space, so it works on a full disk too. Not durable yet. Raises OSError, also where
    the file system cannot (it is in ext4, XFS, btrfs, tmpfs and overlayfs).
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def atomic_write(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path`` durably: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_file(path: Path) -> None:
    """Flush a file's data and metadata to the device. Raises OSError (never retried)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_data(path: Path) -> None:
    """Flush a file's data to the device (fdatasync(2)). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def allocated_bytes(path: Path) -> int:
    """Bytes a file takes on disk (st_blocks), shared blocks included."""
    return path.stat(follow_symlinks=False).st_blocks * 512


def remove_tree(path: Path) -> None:
    """Remove a directory tree; absent is fine. Never follows symbolic links.

    What cannot be removed does not keep the rest, and is tried once more; for want of descriptors,
    with those kept back. Raises OSError.
    """
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno not in _NO_DESCRIPTORS:
                raise
            with _descriptors_lent():
                shutil.rmtree(path)


def keep_descriptors() -> None:
    """Keep some descriptors back for the whole process; again is fine. Never raises."""
    with _guard, contextlib.suppress(OSError):
        while len(_kept) < _KEPT_BACK:
            _kept.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


@contextlib.contextmanager
def _descriptors_lent() -> Iterator[None]:
    """The descriptors kept back are free meanwhile."""
    with _guard:
        while _kept:
            os.close(_kept.pop())
    try:
        yield
    finally:
        keep_descriptors()


def remove_at_once(path: Path, doomed: Path) -> None:
    """Remove a tree that gets the name ``doomed`` first, so that a crash leaves no part of it.

    Absent is fine. On a full disk even that may not be possible: then as ``remove_tree``. Raises
    OSError.
    """
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    except OSError:
        doomed = path
    remove_tree(doomed)


def available_bytes(path: Path) -> int:
    """Bytes an unprivileged writer may still use on the file system of ``path``."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def total_bytes(path: Path) -> int:
    """Size of the file system of ``path``."""
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize
