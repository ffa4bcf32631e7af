"""Capturing the memory of a running VM: only the pages that differ from the image below it.

A VMM maps its guest's memory image privately (MAP_PRIVATE), so a page the guest has written is an
anonymous page and an untouched one still belongs to the file. The kernel tells which is which:

* ``PAGEMAP_SCAN`` (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst) returns ranges at once;
* ``/proc/PID/pagemap`` works everywhere: bit 63 present, 62 swapped, 61 file-backed.

The pages are copied into an anonymous buffer while the guest stands still (memory speed), and
from there into the new image after it runs again (disk speed).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stillframe.host.files import punch_hole
from stillframe.model.errors import HostFailure, MissingComponent

PAGE = mmap.PAGESIZE
_ZERO_PAGE = bytes(PAGE)
_BUFFER_RESERVE = 8 << 20
_MADV_POPULATE_WRITE = 23  # linux/mman.h, Linux 5.14
_PAGEMAP_SCAN = 0xC0606610  # linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), 96 bytes
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_SCAN_ARGUMENT = struct.Struct("<12Q")
_REGION = struct.Struct("<3Q")
_REGIONS_PER_CALL = 8192
# Top byte of a pagemap entry -> 1 when the page is private to the process (see module docstring).
_PRIVATE = bytes(int(bool(top & 0xC0) and not top & 0x20) for top in range(256))
_PRIVATE_RUN = re.compile(rb"\x01+")
_MAPS_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$", re.M
)


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where a process maps an image: addresses ``start`` to ``end``, image offset of ``start``."""

    start: int
    end: int
    offset: int


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of image bytes, both in bytes and page-aligned."""

    offset: int
    length: int


@dataclass(slots=True)
class DirtyPages:
    """Guest pages copied out of a VMM: ``runs`` lie in ``buffer`` one after another."""

    runs: list[Run] = field(default_factory=list)
    buffer: mmap.mmap | None = None

    @property
    def length(self) -> int:
        """Bytes held."""
        return sum(run.length for run in self.runs)

    def close(self) -> None:
        """Give the buffer back to the host."""
        if self.buffer is not None:
            self.buffer.close()
            self.buffer = None


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What writing dirty pages into an image did, in bytes: data written, zero pages made holes."""

    written: int
    zeroed: int


def find_mappings(pid: int, image: Path) -> list[Mapping]:
    """Where process ``pid`` maps ``image`` privately, found by device and inode in /proc/PID/maps.

    Raises HostFailure when it does not, MissingComponent when we may not look.
    """
    status = image.stat()
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    except PermissionError as error:
        raise _may_not_read(pid) from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise HostFailure(f"the VMM (process {pid}) is gone") from error
    path = os.fsencode(image)
    found: list[Mapping] = []
    for match in _MAPS_LINE.finditer(maps):
        start, end, flags, offset, major, minor, inode, name = match.groups()
        if not flags.endswith(b"p") or int(inode) != status.st_ino:
            continue
        device = os.makedev(int(major, 16), int(minor, 16))
        # Some file systems (btrfs, overlayfs) show another device number here than stat does.
        if device == status.st_dev or name == path:
            found.append(Mapping(int(start, 16), int(end, 16), int(offset, 16)))
    if not found:
        raise HostFailure(f"the VMM (process {pid}) does not map its memory image", pid=pid)
    return found


def dirty_runs(pid: int, mappings: list[Mapping]) -> list[Run]:
    """The image ranges that process ``pid`` has written, merged, in ascending order.

    The guest should stand still. Raises HostFailure, MissingComponent.
    """
    try:
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise _may_not_read(pid) from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise HostFailure(f"the VMM (process {pid}) is gone") from error
    try:
        runs = [
            Run(start - mapping.start + mapping.offset, end - start)
            for mapping in mappings
            for start, end in _private_ranges(fd, mapping)
        ]
    finally:
        os.close(fd)
    return sorted(runs, key=lambda run: run.offset)


def _private_ranges(pagemap: int, mapping: Mapping) -> Iterator[tuple[int, int]]:
    try:
        return iter(list(scan_ioctl(pagemap, mapping.start, mapping.end)))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
            raise HostFailure(f"page scan failed: {os.strerror(error.errno or 0)}") from error
        return scan_pagemap(pagemap, mapping.start, mapping.end)


def scan_ioctl(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Private address ranges by PAGEMAP_SCAN. Raises OSError (ENOTTY before Linux 6.7)."""
    vector = ctypes.create_string_buffer(_REGIONS_PER_CALL * _REGION.size)
    position = start
    while position < end:
        argument = bytearray(
            _SCAN_ARGUMENT.pack(
                _SCAN_ARGUMENT.size, 0, position, end, 0,
                ctypes.addressof(vector), _REGIONS_PER_CALL, 0,
                _IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_FILE,
            )
        )  # fmt: skip
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        for low, high, _ in _REGION.iter_unpack(vector.raw[: count * _REGION.size]):
            yield low, high
        position = _SCAN_ARGUMENT.unpack(argument)[4]  # walk_end


def scan_pagemap(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Private address ranges by reading /proc/PID/pagemap, 8 bytes a page."""
    position = start
    while position < end:
        pages = min((end - position) // PAGE, 1 << 17)
        entries = os.pread(pagemap, pages * 8, position // PAGE * 8)
        if len(entries) < 8:
            raise HostFailure("the page map ended early")
        marks = entries[7::8].translate(_PRIVATE)
        for run in _PRIVATE_RUN.finditer(marks):
            yield position + run.start() * PAGE, position + run.end() * PAGE
        position += len(marks) * PAGE


def prepare_buffer(pid: int, image: Path) -> mmap.mmap:
    """Memory for the pages ``pid`` has dirtied so far, already backed by the host.

    Meant for the time before the pause: faulting the buffer in costs as much as filling it. The
    guest runs on meanwhile, so a reserve is added. Raises HostFailure, MissingComponent.
    """
    expected = sum(run.length for run in dirty_runs(pid, find_mappings(pid, image)))
    size = expected + expected // 16 + _BUFFER_RESERVE
    buffer = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # before Linux 5.14 the pause pays for it instead
        buffer.madvise(_MADV_POPULATE_WRITE)
    return buffer


def read_dirty_pages(pid: int, image: Path, buffer: mmap.mmap | None = None) -> DirtyPages:
    """Copy every page of ``image`` that process ``pid`` has written into memory.

    Meant for the pause: it does no disk input or output. ``buffer`` (see ``prepare_buffer``) is
    taken over, and used if it is large enough. Raises HostFailure, MissingComponent.
    """
    pages = DirtyPages(buffer=buffer)
    try:
        mappings = find_mappings(pid, image)
        pages.runs = runs = dirty_runs(pid, mappings)
    except BaseException:
        pages.close()
        raise
    if not runs:
        pages.close()
        return pages
    if pages.buffer is None or len(pages.buffer) < pages.length:
        pages.close()
        pages.buffer = mmap.mmap(-1, pages.length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        _read_runs(pid, mappings, runs, pages.buffer)
    except BaseException:
        pages.close()
        raise
    return pages


def _read_runs(pid: int, mappings: list[Mapping], runs: list[Run], buffer: mmap.mmap) -> None:
    try:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise _may_not_read(pid) from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise HostFailure(f"the VMM (process {pid}) is gone") from error
    position = 0
    try:
        with memoryview(buffer) as view:
            for run in runs:
                address = _address(mappings, run.offset)
                done = 0
                while done < run.length:
                    with view[position + done : position + run.length] as part:
                        count = os.preadv(fd, [part], address + done)
                    if count == 0:
                        raise HostFailure(f"the VMM (process {pid}) is gone")
                    done += count
                position += run.length
    except OSError as error:
        raise HostFailure(f"reading guest memory failed: {error.strerror}") from error
    finally:
        os.close(fd)


def _address(mappings: list[Mapping], offset: int) -> int:
    for mapping in mappings:
        if mapping.offset <= offset < mapping.offset + mapping.end - mapping.start:
            return mapping.start + offset - mapping.offset
    raise HostFailure("a dirty page lies outside the memory image")


def write_dirty_pages(pages: DirtyPages, image: Path) -> WriteReport:
    """Write captured pages into ``image``, a private clone of the image below.

    A page of zeros becomes a hole, so it costs no space. Does not fsync. Raises OSError.
    """
    written = zeroed = 0
    if pages.buffer is None:
        return WriteReport(0, 0)
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if status.st_nlink > 1:  # somebody else's image: it must never change
            raise HostFailure("refusing to write into a shared memory image")
        has_data = status.st_blocks > 0
        position = 0
        with memoryview(pages.buffer) as view:
            for run in pages.runs:
                for zero, start, end in _split_zeros(view, position, run.length):
                    offset = run.offset + start - position
                    if not zero:
                        with view[start:end] as part:
                            _write_all(fd, part, offset)
                        written += end - start
                    else:
                        if has_data:
                            punch_hole(fd, offset, end - start)
                        zeroed += end - start
                position += run.length
    finally:
        os.close(fd)
    return WriteReport(written, zeroed)


def _split_zeros(view: memoryview, start: int, length: int) -> Iterator[tuple[bool, int, int]]:
    """Cut a run into stretches of zero pages and of other pages: (is zero, start, end)."""
    begin, kind = start, None
    for position in range(start, start + length, PAGE):
        zero = view[position : position + PAGE] == _ZERO_PAGE
        if zero is not kind:
            if kind is not None:
                yield kind, begin, position
            begin, kind = position, zero
    if kind is not None:
        yield kind, begin, start + length


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        with data[done:] as rest:
            done += os.pwrite(fd, rest, offset + done)


def _may_not_read(pid: int) -> MissingComponent:
    return MissingComponent(
        f"not allowed to read the memory of process {pid}",
        hint="run the server as the user that owns the VMs, or grant CAP_SYS_PTRACE",
    )
