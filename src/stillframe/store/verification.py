"""Verifying payloads: every byte against the digests of the manifest, damage located.

Damage is collected, never raised, and nothing is changed. What the host lacks to read a file, such
as descriptors, is no damage: it is raised as the OSError it is. What is read is what represents the
memory at the moment it is opened, so compressing or deleting meanwhile is no damage.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from stillframe.host.files import data_extents, is_host_trouble, open_regular, read_exactly
from stillframe.host.threads import in_order
from stillframe.model.errors import DamagedData, NotFound
from stillframe.model.units import MIB
from stillframe.model.verification import Damage, Depth, Verification
from stillframe.store.digests import (
    DIGEST,
    span_digests,
    spans,
    table_digest,
    table_size,
    whole_extents,
)
from stillframe.store.manifest import EXTENT, FileEntry, damaged, file_entries, read_manifest
from stillframe.store.paths import Payload
from stillframe.store.payloads import check_content, open_content
from stillframe.store.readers import Reader

__all__ = ["Damage", "Depth", "Verification", "verify"]

_FULL_UNIT, _SAMPLE_UNIT = 8 * MIB, MIB
_MAX_RANGES = 1000  # so many places are named; the bytes are counted beyond


@dataclass(slots=True)
class _Progress:
    depth: Depth
    clock: Callable[[], float]
    began: float
    checked: int = 0
    total: int = 0
    damage: list[Damage] = field(default_factory=list)
    damaged: int = 0
    unchecked: list[str] = field(default_factory=list)

    def add(self, found: Damage) -> None:
        """Collect damage; neighbours in one file become one place."""
        self.damaged += found.length
        last = self.damage[-1] if self.damage else None
        if (
            last is not None
            and (last.file, last.reason) == (found.file, found.reason)
            and last.offset + last.length == found.offset
        ):
            length = last.length + found.length
            self.damage[-1] = Damage(last.file, last.offset, length, last.reason)
        elif len(self.damage) < _MAX_RANGES:
            self.damage.append(found)

    def report(self) -> Verification:
        seconds = self.clock() - self.began
        return Verification(
            self.depth, self.checked, self.total, seconds, tuple(self.damage), self.damaged,
            tuple(self.unchecked),
        )  # fmt: skip


def verify(
    payload: Payload,
    depth: Depth,
    *,
    seed: int = 0,
    share: float = 0.05,
    threads: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Verification]:
    """Verify a payload; yields the state of the work as it goes on, at last the result.

    ``share`` is the part of the data that a SAMPLE reads, chosen by ``seed``. Close the iterator to
    stop. Damage never raises. Raises OSError, NotFound (deleted meanwhile).
    """
    progress, chance = _Progress(depth, clock, clock()), random.Random(seed)  # noqa: S311
    with contextlib.ExitStack() as stack:
        jobs = []
        for name, entry in _read_entries(payload, progress).items():
            job = _open(payload, name, entry, progress, stack)
            if job is not None and depth is not Depth.MANIFEST:
                job.choose(None if depth is Depth.FULL else chance, share)
                progress.total += job.bytes
                jobs.append(job)
        yield progress.report()
        for job in jobs:
            with contextlib.closing(in_order(job.check, job.units, threads)) as results:
                for read, damage in results:
                    progress.checked += read
                    for found in damage:
                        progress.add(found)
                    yield progress.report()
    if progress.damage and not payload.directory.exists():
        raise NotFound("the snapshot was deleted while it was verified")
    yield progress.report()


def _read_entries(payload: Payload, progress: _Progress) -> dict[str, FileEntry]:
    try:
        return file_entries(read_manifest(payload.manifest))
    except DamagedData as error:
        progress.add(Damage(payload.manifest.name, 0, 0, error.message))
        return {}


def _open(
    payload: Payload,
    name: str,
    entry: FileEntry,
    progress: _Progress,
    stack: contextlib.ExitStack,
) -> _Job | None:
    """Open a file and its table and check all but the data; None when there is none to check."""
    try:
        reader = stack.enter_context(open_content(payload, name))
        check_content(reader, entry)
    except DamagedData as error:
        where = error.facts
        offset, length = where.get("offset", 0), where.get("length", entry.size)
        progress.add(Damage(name, int(str(offset)), int(str(length)), error.message))
        return None
    if entry.table is None:
        if entry.blake3 is None:
            progress.unchecked.append(name)
        else:
            progress.checked += entry.size
            progress.total += entry.size
        return None
    table = payload.table(name)
    try:
        fd = open_regular(table)
        stack.callback(os.close, fd)
        if os.fstat(fd).st_size != table_size(entry.size) or table_digest(fd) != entry.table_blake3:
            raise damaged(table.name, f"does not match its digest, so {name} was not checked")
    except DamagedData as error:
        progress.add(Damage(table.name, 0, table_size(entry.size), error.message))
        return None
    except OSError as error:
        if is_host_trouble(error):
            raise
        why = f"{table.name} cannot be read ({error.strerror}), so {name} was not checked"
        progress.add(Damage(table.name, 0, table_size(entry.size), why))
        return None
    return _Job(name, reader, fd)


@dataclass(slots=True)
class _Job:
    """One file to be read: its content, its open table, and the parts chosen."""

    name: str
    reader: Reader
    table: int
    units: list[tuple[int, int]] = field(default_factory=list)
    bytes: int = 0

    def choose(self, chance: random.Random | None, share: float) -> None:
        """Choose what to read: all, or a random ``share`` of the parts that hold data."""
        size = self.reader.size
        if chance is None:
            self.units = list(spans(0, size, _FULL_UNIT))
        else:
            candidates = set(self._expected())
            for start, end in self.reader.data(0, size):
                candidates.update(range(start // _SAMPLE_UNIT, -(-end // _SAMPLE_UNIT)))
            count = min(len(candidates), math.ceil(round(len(candidates) * share, 6)))
            chosen = sorted(chance.sample(sorted(candidates), count))
            self.units = [(n * _SAMPLE_UNIT, min((n + 1) * _SAMPLE_UNIT, size)) for n in chosen]
        self.bytes = sum(
            last - first
            for start, end in self.units
            for first, last in whole_extents(self.reader.data(start, end), start, end)
        )

    def _expected(self) -> Iterator[int]:
        """The parts that hold data by the table."""
        length = table_size(_SAMPLE_UNIT)
        entries = data_extents(self.table, table_size(self.reader.size))
        for start, end in whole_extents(entries, 0, table_size(self.reader.size), length):
            for first, last in spans(start, end, MIB):
                data = read_exactly(self.table, last - first, first)
                for at in range(0, len(data), length):
                    if data[at : at + length].strip(b"\0"):
                        yield (first + at) // length

    def check(self, unit: tuple[int, int]) -> tuple[int, list[Damage]]:
        """Compare one part of the file with the table: bytes read, and the damage."""
        start, end = unit
        try:
            self.reader.check_holes(start, end)
            found, read = span_digests(self.reader, start, end)
            expected = read_exactly(self.table, len(found), start // EXTENT * DIGEST)
        except (OSError, DamagedData) as error:
            if isinstance(error, OSError) and is_host_trouble(error):
                raise
            if end - start > EXTENT:  # look closer
                parts = [self.check(extent) for extent in spans(start, end, EXTENT)]
                return sum(read for read, _ in parts), [d for _, more in parts for d in more]
            why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            return 0, [Damage(self.name, start, end - start, why)]
        if found == expected:
            return read, []
        return read, [
            Damage(self.name, first, last - first, f"{self.reader.name} does not match its digest")
            for number, (first, last) in enumerate(spans(start, end, EXTENT))
            if found[number * DIGEST :][:DIGEST] != expected[number * DIGEST :][:DIGEST]
        ]
