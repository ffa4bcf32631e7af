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
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from blake3 import blake3

from stillframe.host.files import clone_into, new_file, read_exactly, write_fully
from stillframe.host.threads import in_order
from stillframe.model.units import MIB
from stillframe.store.manifest import EXTENT, damaged
from stillframe.store.readers import Reader

DIGEST = 32  # bytes of one table entry
NO_DATA = bytes(DIGEST)  # the entry of an extent of zeros
SPAN = 4 * MIB  # bytes one thread digests at a time
_READ = MIB


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
    ranges: Iterable[tuple[int, int]], start: int, end: int, length: int = EXTENT
) -> Iterator[tuple[int, int]]:
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
    parent: Path,
    parent_blake3: str,
    changed: Iterable[tuple[int, int]],
    *,
    threads: int | None = None,
) -> str:
    """The new file ``table`` for ``source`` from its parent's table; its own BLAKE3 in hex.

    ``changed`` are ``(offset, length)`` in bytes and must cover every byte that differs from the
    parent's file; only these extents are read, and whatever lies beyond the parent's end. The
    table is not flushed to the device. Raises DamagedData when the parent's table does not have
    the digest ``parent_blake3``, OSError; then there is no table.
    """
    with new_file(table) as fd:
        clone_into(parent, fd)
        if table_digest(fd) != parent_blake3:
            raise damaged(parent.name, "does not match its digest")
        known = os.fstat(fd).st_size // DIGEST * EXTENT
        os.ftruncate(fd, table_size(source.size))
        # The last extent of either file may be cut short, so it is never taken over.
        last = (source.size - 1) // EXTENT * EXTENT
        tail = max(0, min(known - EXTENT, last))
        ranges = [*changed, (tail, source.size - tail)]
        _fill(source, fd, _touched(ranges, source.size), threads, fresh=False)
        return table_digest(fd)


def _touched(changed: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """The extents that byte ranges touch, as ascending ranges, none twice."""
    ranges = sorted((offset, min(offset + length, size)) for offset, length in changed if length)
    if ranges and ranges[0][0] < 0:
        raise ValueError("a changed range begins before the file")
    return whole_extents((r for r in ranges if r[0] < r[1]), 0, size)


def _fill(
    reader: Reader,
    fd: int,
    ranges: Iterable[tuple[int, int]],
    threads: int | None,
    *,
    fresh: bool,
) -> None:
    """Write the entries of whole extents in ``ranges`` into an open table."""

    def work(pieces: list[tuple[int, int]]) -> None:
        for start, end in pieces:
            entries, _ = span_digests(reader, start, end)
            if not fresh or entries != bytes(len(entries)):  # a fresh table stays sparse
                write_fully(fd, entries, start // EXTENT * DIGEST)

    pieces = (piece for start, end in ranges for piece in spans(start, end, SPAN))
    groups = itertools.groupby(pieces, key=lambda piece: piece[0] // SPAN)
    with contextlib.closing(in_order(work, (list(group) for _, group in groups), threads)) as done:
        for _ in done:
            pass


def spans(start: int, end: int, length: int) -> Iterator[tuple[int, int]]:
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
