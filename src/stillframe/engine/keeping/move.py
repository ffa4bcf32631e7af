"""Export: a snapshot as one stream of bytes; and what the archive says about the snapshot."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

from blake3 import blake3

import stillframe
from stillframe.engine.context import Context
from stillframe.engine.keeping.steps import Steps
from stillframe.engine.keeping.verify import refuse_damaged
from stillframe.host.files import storage_errors
from stillframe.model.errors import Conflict
from stillframe.model.units import MIB
from stillframe.model.values import CompressionState, Snapshot
from stillframe.store.archive import HEAD
from stillframe.store.archive_export import ImageParts, export, from_offset
from stillframe.store.manifest import MAX_MANIFEST, read_small
from stillframe.store.paths import Payload
from stillframe.store.records import to_json

_PIECE = MIB  # bytes read in one step


class Archive:
    """An archive on its way out. Implements ``ExportedArchive``."""

    def __init__(self, snapshot: Snapshot, tag: str, stream: Iterator[bytes], close: Any) -> None:
        """Bytes come from ``stream``; ``close`` closes its files."""
        self.snapshot, self.tag = snapshot, tag
        self._stream, self._close = stream, close
        self._steps = Steps()
        self._first: bytes | None = None

    async def begin(self) -> None:
        """Read and check the first bytes. Raises what ``export`` raises."""
        self._first = await self._read()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The bytes, in pieces of about 1 MiB."""
        piece, self._first = self._first, None
        while piece:
            yield piece
            piece = await self._read()

    async def close(self) -> None:
        """Close its files, after the step under way. Idempotent."""
        await self._steps.run(self._close)

    async def _read(self) -> bytes:
        with storage_errors("read the snapshot"):
            return await self._steps.run(_take, self._stream)


def _take(stream: Iterator[bytes]) -> bytes:
    """The next bytes of the stream, empty at its end."""
    piece = bytearray()
    for data in stream:
        piece += data
        if len(piece) >= _PIECE:
            break
    return bytes(piece)


async def export_snapshot(
    context: Context,
    snapshot_id: str,
    *,
    image: bool = False,
    offset: int = 0,
    tag: str | None = None,
) -> Archive:
    """The archive of a snapshot from ``offset`` on; its files are open, its first bytes checked.

    From then on the snapshot may be deleted. Raises NotFound (its image too), DamagedData, Conflict
    when ``tag`` names another archive, InvalidRequest for an offset beyond the end.
    """
    async with context.using(snapshot_id) as snapshot:
        refuse_damaged(snapshot)
        payload, parts = context.data.snapshot(snapshot_id), None
        if image:
            digest = snapshot.template.image_digest
            root = context.images.root_disk(digest)
            parts = ImageParts(digest, {p.name: p for p in (root, root.parent / "config.json")})
        about = about_of(snapshot)
        present = _tag(payload, about, parts)
        if tag not in (None, present):
            raise Conflict(
                "the snapshot's archive is another one by now", hint="begin from the start", tag=tag
            )
        whole = export(payload, about=about, image=parts)
        stream = from_offset(whole, offset) if offset else whole
        archive = Archive(snapshot, present, stream, whole.close)
        try:
            await archive.begin()
        except BaseException:
            await archive.close()
            raise
    return archive


def about_of(snapshot: Snapshot) -> dict[str, Any]:
    """What the archive says about the snapshot: its record less what belongs to this server."""
    told = replace(
        snapshot,
        warm_count=0,
        expires_at=None,
        pinned=False,
        damaged=None,
        stored_bytes=0,
        compression=None,
        compression_state=CompressionState.NONE,
        compression_error=None,
        compressed_size_bytes=None,
        uncompressed_size_bytes=None,
        template=replace(snapshot.template, process=None, state_error=None),
    )
    return {"snapshot": json.loads(to_json(told))}


def _tag(payload: Payload, about: dict[str, Any], image: ImageParts | None) -> str:
    """What the whole stream follows from, as one word."""
    digest = blake3(HEAD + stillframe.__version__.encode() + b"\0")
    digest.update(read_small(payload.manifest, MAX_MANIFEST))
    digest.update(json.dumps(about, sort_keys=True).encode())
    digest.update(b"\0" + (image.digest if image is not None else "").encode())
    return digest.hexdigest(32)[:32]
