"""Export: a snapshot as one stream of bytes; and what the archive says about the snapshot."""

from __future__ import annotations

import bisect
import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from blake3 import blake3

import stillframe
from stillframe.engine.context import Context
from stillframe.engine.keeping.stored import payload_beside
from stillframe.engine.keeping.verify import refuse_damaged
from stillframe.engine.steps import Steps
from stillframe.host.files import storage_errors
from stillframe.images.boot import load_boot_pair
from stillframe.model.errors import Conflict, InvalidRequest, MissingComponent
from stillframe.model.units import MIB
from stillframe.model.values import CompressionState, Snapshot, SnapshotKind
from stillframe.store.archive import HEAD, Position
from stillframe.store.archive_export import Companion, export
from stillframe.store.manifest import MAX_MANIFEST, file_entries, read_manifest, read_small
from stillframe.store.paths import Payload
from stillframe.store.payloads import PayloadSize, add_tables, lacks_digests, measure
from stillframe.store.records import to_json

_PIECE = MIB  # bytes read in one step
_APART = 16 * MIB  # bytes of an archive between positions that are remembered
_ARCHIVES = 16  # archives of which they are


class Archive:
    """An archive on its way out. Implements ``ExportedArchive``."""

    def __init__(self, snapshot: Snapshot, tag: str, stream: Generator[bytes]) -> None:
        self.snapshot, self.tag = snapshot, tag
        self._stream, self._steps = stream, Steps()
        self._ahead: bytes | None = None

    async def open(self) -> None:
        """Open all files and check the first bytes. Raises what ``export`` raises."""
        self._ahead = await self._read()

    async def skip(self, count: int) -> None:
        """Make the next bytes, and check them, without giving them out.

        Raises InvalidRequest when there are not so many, and what ``export`` raises.
        """
        left = count
        while left:
            piece = self._ahead or b""
            if not piece:
                raise InvalidRequest("the archive ends before that byte", bytes_short=left)
            if left < len(piece):
                self._ahead = piece[left:]
                return
            left -= len(piece)
            self._ahead = await self._read()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The bytes, in pieces of about 1 MiB."""
        piece, self._ahead = self._ahead, None
        while piece:
            yield piece
            piece = await self._read()

    async def close(self) -> None:
        """Close its files, after the step under way. Idempotent."""
        await self._steps.run(self._stream.close)

    async def _read(self) -> bytes:
        with storage_errors("read the snapshot"):
            return await self._steps.run(_take, self._stream)


class Places:
    """Where archives that were sent lately can be gone on with: positions in them, by their tag."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, list[Position]] = OrderedDict()
        self._lock = threading.Lock()  # they are noted in the threads that make the bytes

    def before(self, tag: str, offset: int) -> Position:
        """The last known position at or before a byte of the archive; its start if none is."""
        with self._lock:
            known = self._known.setdefault(tag, [])
            self._known.move_to_end(tag)
            while len(self._known) > _ARCHIVES:
                self._known.popitem(last=False)
            number = bisect.bisect_right(known, offset, key=lambda position: position.offset)
            return known[number - 1] if number else Position()

    def note(self, tag: str, position: Position) -> None:
        """Remember a position, unless one shortly before it is known."""
        with self._lock:
            known = self._known.get(tag)
            if known is not None and position.offset - _last(known) >= _APART:
                known.append(position)


def _last(known: Sequence[Position]) -> int:
    return known[-1].offset if known else 0


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
    places: Places,
    snapshot_id: str,
    *,
    image: bool = False,
    offset: int = 0,
    tag: str | None = None,
) -> Archive:
    """The archive of a snapshot from ``offset`` on; its files are open, its first bytes checked.

    What ``places`` knows of need not be made again.
    From then on the snapshot may be deleted. Raises NotFound (its image too), DamagedData, Conflict
    when ``tag`` names another archive, InvalidRequest for an offset beyond the end or without a
    ``tag``: two archives must not become one.
    """
    async with contextlib.AsyncExitStack() as undo:
        async with context.using(snapshot_id) as found:
            refuse_damaged(found)
            snapshot = await _with_digests(context, found)
            payload = context.data.snapshot(snapshot_id)
            parts = _image_of(context, snapshot) if image else None
            boot = _boot_pair_of(context, snapshot)
            about = about_of(snapshot)
            with storage_errors("read the snapshot"):
                present = _tag(payload, about, (parts, boot))
            if tag is None and offset:
                raise InvalidRequest(
                    "an archive goes on only where it is said which one it was",
                    hint="give the ETag of its first answer as If-Match",
                    tag=present,
                )
            if tag not in (None, present):
                raise Conflict(
                    "the snapshot's archive is another one by now",
                    hint="begin from the start",
                    tag=present,
                )
            start = places.before(present, offset)
            stream = export(
                payload, about=about, image=parts, boot=boot, position=start,
                reached=partial(places.note, present),
            )  # fmt: skip
            archive = Archive(snapshot, present, stream)
            undo.push_async_callback(archive.close)
            await archive.open()
        await archive.skip(offset - start.offset)
        undo.pop_all()
    return archive


async def _with_digests(context: Context, snapshot: Snapshot) -> Snapshot:
    """Give a snapshot of manifest format 1 the digests that an archive needs; its record then.

    What lies there is taken as right: nothing else can vouch for it. Raises DamagedData,
    StorageFull, HostFailure.
    """
    payload = context.data.snapshot(snapshot.id)

    def add() -> PayloadSize | None:
        entries = file_entries(read_manifest(payload.manifest))
        if not any(lacks_digests(name, entry) for name, entry in entries.items()):
            return None
        add_tables(payload)
        return measure(payload, payload_beside(context, snapshot.stored_beside))

    with storage_errors("add digests to the snapshot"):
        size = await Steps().run(add)  # to its end, also when cancelled: a deletion waits for it
    known = context.records.snapshots.get(snapshot.id)
    if size is None or known is None:  # deleted meanwhile: what is open goes out all the same
        return snapshot
    measured = replace(known, size_bytes=size.size, stored_bytes=size.stored)
    context.records.update_snapshot(measured, can_wait=True)
    return context.snapshot(snapshot.id)


def _image_of(context: Context, snapshot: Snapshot) -> Companion:
    digest = snapshot.template.image_digest
    root = context.images.root_disk(digest)
    return Companion(digest, {p.name: p for p in (root, root.parent / "config.json")})


def _boot_pair_of(context: Context, snapshot: Snapshot) -> Companion | None:
    """The kernel and initrd that its memory needs, if they are here: another host may have none."""
    if snapshot.kind is not SnapshotKind.STANDBY or not snapshot.template.boot:
        return None
    try:
        pair = load_boot_pair(context.data.system, snapshot.template.boot)
    except MissingComponent:
        return None
    return Companion(pair.digest, {"kernel": pair.kernel, "initrd": pair.initrd})


def about_of(snapshot: Snapshot) -> dict[str, Any]:
    """What the archive says about the snapshot: its record less what belongs to this server.

    All that may change while the content stays is left out, but for the words that people give it
    (name, tags, description), so that an archive goes on whatever has happened in between.
    """
    told = replace(
        snapshot,
        size_bytes=0,
        timings_ms={},
        warm_count=0,
        expires_at=None,
        pinned=False,
        damaged=None,
        stored_bytes=0,
        stored_beside=None,
        compression=None,
        compression_state=CompressionState.NONE,
        compression_error=None,
        compressed_size_bytes=None,
        uncompressed_size_bytes=None,
        template=replace(snapshot.template, process=None, state_error=None),
    )
    return {"snapshot": json.loads(to_json(told))}


def _tag(payload: Payload, about: dict[str, Any], companions: Iterable[Companion | None]) -> str:
    """What the whole stream follows from, as one word."""
    digest = blake3(HEAD + stillframe.__version__.encode() + b"\0")
    digest.update(read_small(payload.manifest, MAX_MANIFEST))
    digest.update(json.dumps(about, sort_keys=True).encode())
    for companion in companions:
        digest.update(b"\0" + (companion.digest if companion is not None else "").encode())
    return digest.hexdigest(32)[:32]
