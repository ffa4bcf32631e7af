"""Digest tables: BLAKE3 of each 64 KiB of a payload file.

A table is a sparse file beside the file it vouches for. It has 32 bytes for each extent, counted
from the start of the file; the last extent may be shorter. An extent of zeros, whether a hole or
not, has 32 zeros. The digest of the table itself stands in the manifest, so the manifest vouches
for every byte.

A file is never read where it has holes, and an incremental capture updates its parent's table by
reading only the extents it changed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from blake3 import blake3

from stillframe.host.files import new_file, read_exactly, write_fully
from stillframe.host.image import open_private
from stillframe.host.threads import in_order
from stillframe.model.units import MIB
from stillframe.store.manifest import EXTENT, damaged
from stillframe.store.readers import Reader

DIGEST = 32  # bytes of one table entry
NO_DATA = bytes(DIGEST)  # the entry of an extent of zeros
SPAN = 4 * MIB  # bytes one thread digests at a time
_READ = MIB
Range = tuple[int, int]  # first byte, and the one after the last


def table_size(file_size: int) -> int:
    """Bytes of the digest table of a file of ``file_size`` bytes."""
    return -(-file_size // EXTENT) * DIGEST


def extent_digests(data: bytes) -> bytes:
    """The table entries for ``data``, which begins at an extent's start."""
    view = memoryview(data)
    return b"".join([_entry(view[at : at + EXTENT]) for at in range(0, len(data), EXTENT)])


def _entry(extent: memoryview) -> bytes:
    digest = blake3(extent).digest()
    return NO_DATA if digest == _digest_of_zeros(len(extent)) else digest


@lru_cache(maxsize=64)
def _digest_of_zeros(length: int) -> bytes:
    return blake3(bytes(length)).digest()


def span_digests(reader: Reader, start: int, end: int) -> tuple[bytes, int]:
    """The table entries for bytes ``start`` (an extent's) to ``end``, and how many were read.

    Raises OSError, and what the reader raises.
    """
    digests, read = bytearray(table_size(end - start)), 0
    for first, last in whole_extents(reader.data(start, end), start, end):
        for position in range(first, last, _READ):
            data = reader.read(position, min(_READ, last - position))
            at = (position - start) // EXTENT * DIGEST
            entries = extent_digests(data)
            digests[at : at + len(entries)] = entries
            read += len(data)
    return bytes(digests), read


def whole_extents(
    ranges: Iterable[Range], start: int, end: int, length: int = EXTENT
) -> Iterator[Range]:
    """Ascending byte ranges widened to whole extents of ``length`` within ``end``, none twice."""
    done = start
    for first, last in ranges:
        begin = max(first // length * length, done)
        done = max(min(-(-last // length) * length, end), done)
        if begin < done:
            yield begin, done


def table_of(source: Reader, *, threads: int | None = None) -> bytes:
    """The digest table of ``source`` in memory (1 MiB for each 2 GiB). Raises OSError."""
    units = spans(0, source.size, SPAN)
    with contextlib.closing(
        in_order(lambda unit: span_digests(source, *unit)[0], units, threads)
    ) as tables:
        return b"".join(tables)


def write_table(source: Reader, table: Path, *, threads: int | None = None) -> str:
    """Digest all of ``source`` into the new file ``table``; the table's own BLAKE3 in hex.

    The table is not flushed to the device. Raises OSError; then there is no table.
    """
    with new_file(table) as fd:
        os.ftruncate(fd, table_size(source.size))
        _fill(source, fd, [(0, source.size)], threads, fresh=True)
        return table_digest(fd)


def update_table(
    source: Reader,
    table: Path,
    below: Reader,
    changed: Iterable[tuple[int, int]],
    *,
    known: str | None = None,
    threads: int | None = None,
) -> str:
    """Bring ``table``, a clone of the table of ``below``, up to date; its own BLAKE3 in hex.

    ``source`` is a clone of ``below`` in which ``changed`` was written: ``(offset, length)`` in
    bytes, all that differs. Only these extents are read, and whatever lies beyond the end of
    ``below``. Where an extent keeps bytes of ``below``, these are checked first: damage must not
    get a digest that vouches for it. The table is not flushed to the device. Raises DamagedData
    when ``below`` is not what its table says, or the table not what ``known`` says (its BLAKE3 in
    hex), OSError; then the table is of no use.
    """
    ranges = _merged((offset, offset + length) for offset, length in changed if length)
    with open_private(table) as fd:
        if os.fstat(fd).st_size != table_size(below.size):
            raise damaged(table.name, "does not fit its file")
        if known is not None and table_digest(fd) != known:
            raise damaged(table.name, "does not match its digest")
        if source.size != below.size:
            # The last extent of either file may be cut short, so it is never taken over.
            end = min(source.size, below.size) // EXTENT * EXTENT
            tail = max(0, min(end, (source.size - 1) // EXTENT * EXTENT))
            ranges = _merged([*ranges, (tail, source.size)])
        _check(below, fd, _kept_in_part(ranges, min(source.size, below.size)), threads)
        os.ftruncate(fd, table_size(source.size))
        _fill(source, fd, whole_extents(_within(ranges, source.size), 0, source.size), threads)
        return table_digest(fd)


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Ascending byte ranges of the same bytes, none of which touch."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if start < 0:
            raise ValueError("a changed range begins before the file")
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _within(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    return ((start, min(end, size)) for start, end in ranges if start < size)


def _kept_in_part(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    """The extents of a file that merged ``ranges`` overwrite in part only, ascending."""
    done = 0
    for start, end in _within(ranges, size):
        for border in (start, end):
            first = border // EXTENT * EXTENT
            if border not in (first, size) and first >= done:
                done = min(first + EXTENT, size)
                yield first, done


def _check(below: Reader, fd: int, extents: Iterable[Range], threads: int | None) -> None:
    """Compare single extents of a file with its open table. Raises DamagedData, OSError."""

    def compare(start: int, end: int) -> None:
        entry, _ = span_digests(below, start, end)
        if entry != read_exactly(fd, DIGEST, start // EXTENT * DIGEST):
            what = "has changed since it was written"
            raise damaged(below.name, what, offset=start, length=end - start)

    _in_spans(compare, extents, threads)


def _fill(
    reader: Reader, fd: int, ranges: Iterable[Range], threads: int | None, *, fresh: bool = False
) -> None:
    """Write the entries of whole extents in ``ranges`` into an open table."""

    def enter(start: int, end: int) -> None:
        entries, _ = span_digests(reader, start, end)
        if not fresh or entries != bytes(len(entries)):  # a fresh table stays sparse
            write_fully(fd, entries, start // EXTENT * DIGEST)

    _in_spans(enter, ranges, threads)


def _in_spans(
    work: Callable[[int, int], None], ranges: Iterable[Range], threads: int | None
) -> None:
    """Do ``work`` for each of ascending ranges, cut at the spans; a thread has a span at a time."""

    def each(pieces: list[Range]) -> None:
        for start, end in pieces:
            work(start, end)

    pieces = (piece for start, end in ranges for piece in spans(start, end, SPAN))
    groups = itertools.groupby(pieces, key=lambda piece: piece[0] // SPAN)
    with contextlib.closing(in_order(each, (list(group) for _, group in groups), threads)) as done:
        for _ in done:
            pass


def spans(start: int, end: int, length: int) -> Iterator[Range]:
    """Cut a byte range at the multiples of ``length``."""
    while start < end:
        stop = min((start // length + 1) * length, end)
        yield start, stop
        start = stop


def table_digest(fd: int) -> str:
    """The BLAKE3 of an open table in hex. Raises OSError."""
    digest, size = blake3(), os.fstat(fd).st_size
    for position in range(0, size, _READ):
        digest.update(read_exactly(fd, min(_READ, size - position), position))
    return digest.hexdigest()
