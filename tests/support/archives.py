"""Archives: made, taken in, refused; and forged with a chain that is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from stillframe.model.errors import DamagedData, InvalidRequest
from stillframe.store.archive import HEAD, HEADER_LENGTH, RAW, TRAILER, Header, Part, Position
from stillframe.store.archive_export import export
from stillframe.store.archive_import import Imported, Importer, Limits
from stillframe.store.manifest import FileEntry, encode_manifest
from stillframe.store.paths import Payload
from support.payloads import listing

PLENTY = Limits(1 << 40, 1 << 40)


def archive(payload: Payload, **options: Any) -> bytes:
    return b"".join(export(payload, **options))


def take(data: bytes, directory: Path, limits: Limits = PLENTY, chunk: int = 1 << 20) -> Imported:
    with Importer(directory, limits) as importer:
        for start in range(0, len(data), chunk):
            importer.feed(data[start : start + chunk])
        return importer.finish()


def contents(payload: Payload) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in payload.directory.iterdir()}


def positions(data: bytes) -> list[Position]:
    """Where each record begins and where the last one ends, read as docs/format.md says."""
    here = Position().after_head()
    found = [here]
    while here.offset < len(data):
        encoded = data[here.offset :][:HEADER_LENGTH]
        header = Header.decode(encoded, here.link)
        assert header is not None
        here = here.after(header, encoded)
        found.append(here)
    return found


def refused(data: bytes, directory: Path, limits: Limits = PLENTY) -> DamagedData | InvalidRequest:
    """The error of an import that must fail, and leave nothing."""
    arrived = directory / "arrived"
    before = listing(directory)
    with pytest.raises((DamagedData, InvalidRequest)) as caught:
        take(data, arrived, limits)
    assert listing(directory) == before
    error = caught.value
    assert isinstance(error, DamagedData | InvalidRequest)
    return error


@dataclass
class Forge:
    """Makes archives whose chain is right, whatever they hold."""

    data: bytes = HEAD
    position: Position = field(default_factory=lambda: Position().after_head())

    def add(
        self, part: int, stored: bytes, *, offset: int = 0, length: int | None = None,
        encoding: int = RAW, claim: int | None = None,
    ) -> Forge:  # fmt: skip
        header = Header(
            part, encoding, len(stored) if claim is None else claim,
            len(stored) if length is None else length, offset, blake3(stored).digest(),
        )  # fmt: skip
        encoded = header.encode(self.position.link)
        self.position = self.position.after(header, encoded)
        self.data += encoded + stored
        return self

    def manifest(self, files: Mapping[str, FileEntry], **facts: object) -> Forge:
        return self.add(Part.MANIFEST, encode_manifest(files, facts))

    def end(self) -> bytes:
        here = self.position
        return self.add(Part.TRAILER, TRAILER.pack(here.records, here.data, here.link)).data
