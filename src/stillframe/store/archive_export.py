"""Writing the archive of a snapshot: a generator of bytes, from the start or from a position."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from stillframe.host.threads import in_order
from stillframe.model.errors import InvalidRequest
from stillframe.model.values import CompressionAlgorithm
from stillframe.store.archive import (
    BOOT_FILES,
    FRAME,
    HEAD,
    IMAGE_FILES,
    PAYLOAD_FILES,
    RAW,
    SMALL_FILES,
    TRAILER,
    ZSTD,
    Header,
    Part,
    Position,
    table_part,
)
from stillframe.store.compression import encoder
from stillframe.store.digests import (
    DIGEST,
    extent_digests,
    spans,
    table_of,
    table_size,
    whole_extents,
)
from stillframe.store.manifest import (
    EXTENT,
    MAX_MANIFEST,
    MAX_SMALL,
    FileEntry,
    damaged,
    encode_manifest,
    file_entries,
    parse_manifest,
    read_small,
    table_name,
)
from stillframe.store.paths import Payload
from stillframe.store.payloads import check_content, open_content
from stillframe.store.readers import BytesReader, FileReader, Reader

_START = Position()


@dataclass(frozen=True, slots=True)
class Companion:
    """What goes with a snapshot (its image, or its boot pair): its digest, and its files.

    The files have their names in the archive.
    """

    digest: str
    files: Mapping[str, Path]


def export(
    payload: Payload,
    *,
    about: Mapping[str, Any] | None = None,
    image: Companion | None = None,
    boot: Companion | None = None,
    position: Position = _START,
    reached: Callable[[Position], None] = lambda position: None,
    level: int = 1,
    threads: int | None = None,
) -> Generator[bytes]:
    """Yield the archive of a sealed payload, or what follows ``position``.

    ``about`` is a document for whoever imports it (the snapshot's record); ``level`` is zstd's.
    ``reached`` is told the position after each record, before its bytes come.
    The same arguments give the same bytes. All files are open when the first bytes come, so later
    ones come also when the snapshot has been deleted. All is checked on its way out: raises
    DamagedData, after which there is no trailer; InvalidRequest for a position that is none or a
    snapshot without digest tables; OSError.
    """
    with contextlib.ExitStack() as stack:
        sources = _sources(payload, about, {Part.IMAGE: image, Part.BOOT: boot}, stack, threads)
        encode = encoder(CompressionAlgorithm.ZSTD, level)
        if position.offset == 0:
            yield HEAD
            position = position.after_head()
        pieces = _pieces(sources, position)
        records = in_order(partial(_record, encode), pieces, threads)
        for made in stack.enter_context(contextlib.closing(records)):
            if made is not None:
                header, stored = made
                encoded = header.encode(position.link)
                position = position.after(header, encoded)
                reached(position)
                yield encoded
                yield stored
        trailer = TRAILER.pack(position.records, position.data, position.link)
        yield _header(Part.TRAILER, RAW, trailer, len(trailer), 0).encode(position.link)
        yield trailer


@dataclass(frozen=True, slots=True)
class _Source:
    """One part: its content, and the table it must match."""

    part: Part
    reader: Reader
    table: Reader | None = None
    compressed: bool = True

    def check_hole(self, start: int, end: int) -> None:
        """The table must know of no data in a hole. Raises DamagedData."""
        if self.table is None:
            return
        first, last = table_size(start), table_size(end)
        for a, b in self.table.data(first, last):
            for begin, stop in spans(max(a, first), min(b, last), FRAME):
                if self.table.read(begin, stop - begin) != bytes(stop - begin):
                    offset, length = begin // DIGEST * EXTENT, (stop - begin) // DIGEST * EXTENT
                    raise damaged(self.reader.name, "has lost data", offset=offset, length=length)

    def check(self, data: bytes, start: int) -> None:
        """Content must match the table. Raises DamagedData."""
        if self.table is not None:
            expected = self.table.read(start // EXTENT * DIGEST, table_size(len(data)))
            if extent_digests(data) != expected:
                raise damaged(
                    self.reader.name, "does not match its digests", offset=start, length=len(data)
                )


@dataclass(slots=True)
class _Found:
    """The parts of an archive while they are being opened."""

    documents: list[_Source] = field(default_factory=list)
    tables: list[_Source] = field(default_factory=list)
    contents: list[_Source] = field(default_factory=list)

    def document(self, part: Part, content: bytes) -> None:
        """Add a document, stored as it is."""
        if len(content) > MAX_MANIFEST:
            raise InvalidRequest(f"a document of {len(content)} bytes is too long for an archive")
        self.documents.append(_Source(part, BytesReader(part.name, content), compressed=False))

    def file(self, part: Part, reader: Reader, table: Reader | None) -> None:
        """Add a file and its table."""
        if table is not None:
            self.tables.append(_Source(table_part(part), table, compressed=False))
        self.contents.append(_Source(part, reader, table))

    def in_order(self) -> list[_Source]:
        """All parts in the order of the archive."""
        found = [*self.documents, *self.tables, *self.contents]
        return sorted(found, key=lambda source: source.part)


def _sources(
    payload: Payload,
    about: Mapping[str, Any] | None,
    companions: Mapping[Part, Companion | None],
    stack: contextlib.ExitStack,
    threads: int | None,
) -> list[_Source]:
    """Open everything at once, so that nothing is missed when the snapshot is deleted meanwhile."""
    found = _Found()
    manifest = read_small(payload.manifest, MAX_MANIFEST)
    found.document(Part.MANIFEST, manifest)
    for name, entry in file_entries(parse_manifest(manifest)).items():
        part = PAYLOAD_FILES.get(name)
        if part is None or (entry.table is None and name not in SMALL_FILES):
            raise InvalidRequest(
                f"snapshot file {name} cannot be exported",
                hint="it has no digest table; snapshots of format 1 must be given one first",
                file=name,
            )
        if entry.table is not None and name in SMALL_FILES:
            raise InvalidRequest(
                f"snapshot file {name} of {entry.size} bytes cannot be exported",
                hint="device state of this size holds the guest's memory as its hypervisor keeps "
                "it; that of vz loads on the Mac that saved it only",
                file=name,
            )
        reader = stack.enter_context(open_content(payload, name))
        check_content(reader, entry)
        found.file(part, reader, _open_table(payload, name, entry, stack))
    if about is not None:
        found.document(Part.ABOUT, json.dumps(about, sort_keys=True).encode())
    for part, companion in companions.items():
        if companion is not None:
            found.document(part, _companion(companion, found, stack, threads))
    return found.in_order()


def _open_table(
    payload: Payload, name: str, entry: FileEntry, stack: contextlib.ExitStack
) -> Reader | None:
    if entry.table is None:
        return None
    try:
        table = stack.enter_context(FileReader(payload.table(name)))
    except FileNotFoundError as error:
        raise damaged(table_name(name), "is missing") from error
    digest = blake3()
    for start, end in spans(0, table.size, FRAME):
        digest.update(table.read(start, end - start))
    if table.size != table_size(entry.size) or digest.hexdigest() != entry.table_blake3:
        raise damaged(table.name, "does not match its digest")
    return table


def _companion(
    companion: Companion, found: _Found, stack: contextlib.ExitStack, threads: int | None
) -> bytes:
    """Add the files of a companion; the document that describes them."""
    entries = {}
    for name, path in companion.files.items():
        part = (IMAGE_FILES | BOOT_FILES)[name]
        reader = stack.enter_context(FileReader(path))
        if name in SMALL_FILES:
            content = read_small(path, MAX_SMALL)
            entries[name] = FileEntry(len(content), blake3=blake3(content).hexdigest())
            found.file(part, BytesReader(name, content), None)
            continue
        table = table_of(reader, threads=threads)
        entries[name] = FileEntry(
            reader.size, table=table_name(name), table_blake3=blake3(table).hexdigest()
        )
        found.file(part, reader, BytesReader(table_name(name), table))
    return encode_manifest(entries, {"digest": companion.digest})


def _pieces(
    sources: list[_Source], position: Position
) -> Iterator[tuple[_Source, tuple[int, int]]]:
    """The frames that may hold data, in order, from ``position`` on."""
    if position.part and position.part not in {source.part for source in sources}:
        raise InvalidRequest("this is no position in this archive")
    for source in sources:
        if source.part < position.part:
            continue
        size = source.reader.size
        done = position.part_offset if source.part == position.part else 0
        if done > size or (done < size and done % FRAME):
            raise InvalidRequest("this is no position in this archive")
        for first, last in whole_extents(source.reader.data(done, size), done, size, FRAME):
            source.check_hole(done, first)
            for span in spans(first, last, FRAME):
                yield source, span
            done = last
        source.check_hole(done, size)


def _record(
    encode: Callable[[bytes], bytes], piece: tuple[_Source, tuple[int, int]]
) -> tuple[Header, bytes] | None:
    """The record for one frame; None for a frame of zeros."""
    source, (start, end) = piece
    data = source.reader.read(start, end - start)
    source.check(data, start)
    if data == bytes(len(data)):
        return None
    stored, encoding = data, RAW
    if source.compressed:
        packed = encode(data)
        if len(packed) < len(data):
            stored, encoding = packed, ZSTD
    return _header(source.part, encoding, stored, len(data), start), stored


def _header(part: Part, encoding: int, stored: bytes, length: int, offset: int) -> Header:
    return Header(part, encoding, len(stored), length, offset, blake3(stored).digest())
