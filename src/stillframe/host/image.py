"""Writing guest pages into a memory image: zeros become holes, what is there already stays shared.

An image below others is never written: see ``open_private``.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillframe.host.files import data_extents, punch_hole, share_by_page
from stillframe.host.memory import PAGE, GuestMemory, make_buffer
from stillframe.host.runs import Runs
from stillframe.model.errors import HostFailure

_ZERO_PAGE = bytes(PAGE)
_PIECE = 4 << 20  # bytes that travel at once from a guest that runs


@dataclass(frozen=True, slots=True)
class WriteReport:
    """Bytes of guest pages: written as data, made holes, found in the image as they are."""

    written: int = 0
    zeroed: int = 0
    unchanged: int = 0

    def __add__(self, other: WriteReport) -> WriteReport:
        return WriteReport(
            self.written + other.written,
            self.zeroed + other.zeroed,
            self.unchanged + other.unchanged,
        )


@contextlib.contextmanager
def open_private(image: Path) -> Iterator[int]:
    """An open descriptor of an image that nobody else uses, to be written.

    Raises OSError, HostFailure when the file has other names: it must never change then.
    """
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_nlink > 1:
            raise HostFailure("refusing to write into a shared memory image")
        share_by_page(fd)
        yield fd
    finally:
        os.close(fd)


def write_pages(fd: int, runs: Runs, buffer: mmap.mmap, *, compare: bool = False) -> WriteReport:
    """Write pages that lie in ``buffer`` one run after another to their places in the image.

    With ``compare`` a page that the image holds already is left alone, so that it stays shared
    with the image below. Does not fsync. Raises OSError.
    """
    has_data = os.fstat(fd).st_blocks > 0
    written = zeroed = unchanged = position = 0
    with memoryview(buffer) as view:
        for start, end in runs:
            length = end - start
            there = os.pread(fd, length, start) if compare else None
            for kind, low, high in _sorted_pages(buffer, position, length, there):
                offset, size = start + low - position, high - low
                if kind == "same":
                    unchanged += size
                elif kind == "zero":
                    if has_data:
                        punch_hole(fd, offset, size)
                    zeroed += size
                else:
                    with view[low:high] as part:
                        _write_all(fd, part, offset)
                    written += size
            position += length
    return WriteReport(written, zeroed, unchanged)


def copy_pages(memory: GuestMemory, runs: Runs, fd: int, *, compare: bool = False) -> WriteReport:
    """Copy pages from a guest straight into the image, a few MiB at a time.

    For a guest that runs (its pages must be copied again if written meanwhile), or for more than
    fits into host memory. Raises OSError, HostFailure, MissingComponent.
    """
    report = WriteReport()
    buffer = make_buffer(min(_PIECE, runs.total))
    try:
        for piece in runs.pieces(_PIECE):
            memory.read(piece, buffer)
            report += write_pages(fd, piece, buffer, compare=compare)
    finally:
        buffer.close()
    return report


def merge_pages(source: int, runs: Runs, fd: int) -> WriteReport:
    """Copy pages that lie at their own places in the open file ``source`` to the image.

    A few MiB at a time. Does not fsync. Raises OSError.
    """
    report = WriteReport()
    buffer = make_buffer(min(_PIECE, runs.total))
    try:
        for piece in runs.pieces(_PIECE):
            with memoryview(buffer) as view:
                position = 0
                for start, end in piece:
                    with view[position : position + end - start] as part:
                        _read_all(source, part, start)
                    position += end - start
            report += write_pages(fd, piece, buffer)
    finally:
        buffer.close()
    return report


def drop_zeros(fd: int) -> int:
    """Make holes of the pages of an image that are zeros but take space; the bytes dropped.

    Does not fsync. Raises OSError.
    """
    dropped = 0
    size = os.fstat(fd).st_size
    buffer = make_buffer(min(_PIECE, size))
    try:
        for piece in Runs.of(data_extents(fd, size)).pieces(_PIECE):
            for start, end in piece:
                with memoryview(buffer) as view, view[: end - start] as part:
                    _read_all(fd, part, start)
                for kind, low, high in _sorted_pages(buffer, 0, end - start, None):
                    if kind == "zero":
                        punch_hole(fd, start + low, high - low)
                        dropped += high - low
    finally:
        buffer.close()
    return dropped


def _read_all(fd: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        with into[done:] as rest:
            read = os.preadv(fd, [rest], offset + done)
        if read == 0:
            raise OSError(errno.EIO, "the file is shorter than expected")
        done += read


def _sorted_pages(
    buffer: mmap.mmap, start: int, length: int, there: bytes | None
) -> Iterator[tuple[str, int, int]]:
    """Cut a run into stretches of pages of a kind: ``(zero | same | data, low, high)``."""
    begin, kind = start, ""
    for position in range(start, start + length, PAGE):
        page = buffer[position : position + PAGE]
        here = position - start
        if there is not None and page == there[here : here + PAGE]:
            found = "same"
        else:
            found = "zero" if page == _ZERO_PAGE else "data"
        if found != kind:
            if kind:
                yield kind, begin, position
            begin, kind = position, found
    if kind:
        yield kind, begin, start + length


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        with data[done:] as rest:
            done += os.pwrite(fd, rest, offset + done)
