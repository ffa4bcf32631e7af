"""Import: an archive becomes a snapshot of this server, or leaves nothing.

The bytes are verified as they come and written into a directory beside, under an intent. What they
say about the snapshot is judged as soon as it has come, before the contents. Then one rename and
one commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from stillframe.engine.context import Context
from stillframe.engine.keeping.about import snapshot_told
from stillframe.engine.keeping.compatibility import machine_reasons
from stillframe.engine.keeping.quota import check_room, check_space
from stillframe.engine.keeping.steps import Steps
from stillframe.host.files import fsync_directory, remove_tree, storage_errors
from stillframe.model.errors import (
    Conflict,
    DamagedData,
    Forbidden,
    InvalidRequest,
    NameConflict,
    NotFound,
)
from stillframe.model.units import MIB, check_name
from stillframe.model.values import Snapshot, SnapshotKind
from stillframe.store.archive_import import Imported, Importer, Limits
from stillframe.store.paths import Payload
from stillframe.store.payloads import PayloadSize, measure, publish
from stillframe.store.records import Intent

_PIECE = MIB  # bytes taken in one step
_LOOK = 64 * MIB  # bytes after which the free space is looked at again


async def import_snapshot(
    context: Context,
    chunks: AsyncIterator[bytes],
    *,
    name: str | None = None,
    allow_foreign: bool = False,
    add_image: bool = True,
) -> Snapshot:
    """A new snapshot from the bytes of an archive: data, manifest, record on disk, in that order.

    Raises InvalidRequest (damaged, no archive, too large), Forbidden (an image comes along and may
    not), Conflict (name, image, memory that cannot run here, quota), StorageFull, and what
    ``chunks`` raises; then nothing is left.
    """
    if name is not None:
        check_name(name, what="snapshot name")
    check_room(context, 0)
    snapshot_id, steps = context.new_id(), Steps()
    building, final = context.data.snapshot_new(snapshot_id), context.data.snapshot(snapshot_id)
    limit = context.settings.max_archive_bytes
    context.records.intend(Intent(snapshot_id, "import snapshot", {"name": name or ""}))
    async with contextlib.AsyncExitStack() as undo:
        undo.callback(context.records.fulfil, snapshot_id)
        undo.callback(remove_tree, final.directory)
        undo.callback(remove_tree, building.directory)
        with storage_errors("make room for the snapshot"):
            importer = Importer(building.directory, Limits(limit, limit))
        undo.push_async_callback(steps.run, importer.abort)
        judge = _Judge(context, importer, snapshot_id, name, allow_foreign, add_image)
        told = await _receive(context, chunks, importer, steps, judge)
        with _told_plainly(), storage_errors("store the snapshot"):
            arrived = await steps.run(importer.finish)
            image = await steps.run(_take_image, context, building, arrived)
            undo.callback(remove_tree, image)
            size = await steps.run(_publish, building, final)
        taken = replace(told, size_bytes=size.size, stored_bytes=size.stored)
        _commit(context, taken, image if arrived.image_files else None)
        undo.pop_all()
    remove_tree(image)  # there is one already
    return taken


async def _receive(
    context: Context,
    chunks: AsyncIterator[bytes],
    importer: Importer,
    steps: Steps,
    judge: _Judge,
) -> Snapshot:
    """Take in the whole stream; the snapshot it tells of, judged and checked."""
    told, looked = None, 0
    async for piece in _pieces(chunks):
        with _told_plainly(), storage_errors("store the snapshot"):
            await steps.run(importer.feed, piece)
        if told is None and importer.documents_complete:
            told = await judge.snapshot()
        if importer.position.data - looked >= _LOOK:
            looked = importer.position.data
            check_space(context, 0, written_bytes=looked)
    if told is None or not importer.complete:
        raise InvalidRequest(
            f"the archive ends early, after byte {importer.position.offset}",
            code="damaged_archive",
            hint="send it again",
            offset=importer.position.offset,
        )
    return told


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are worth a step in a thread."""
    piece = bytearray()
    async for chunk in chunks:
        piece += chunk
        if len(piece) >= _PIECE:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """Damage in what is sent to us is the sender's, not this host's."""
    try:
        yield
    except DamagedData as error:
        told = InvalidRequest(error.message, code="damaged_archive", hint="export it again")
        told.facts.update(error.facts)
        raise told from error


@dataclass(frozen=True, slots=True)
class _Judge:
    """Decides, once the documents have come, whether the snapshot may come in."""

    context: Context
    importer: Importer
    snapshot_id: str
    name: str | None
    allow_foreign: bool
    add_image: bool

    async def snapshot(self) -> Snapshot:
        """The snapshot as its record will be, but for its sizes. Raises as ``import_snapshot``."""
        manifest, about = self.importer.manifest, self.importer.about
        told = snapshot_told(self.context, about, manifest)
        told = replace(told, id=self.snapshot_id, name=self.name or told.name)
        if told.name is not None and self.context.records.snapshot_name_taken(
            told.source_instance_id, told.name
        ):
            raise _name_taken(told)
        self._check_image(told)
        reasons, _ = await machine_reasons(self.context, told)
        if told.kind is SnapshotKind.STANDBY and reasons and not self.allow_foreign:
            raise Conflict(
                f"the snapshot cannot run here: {'; '.join(reasons)}",
                code="foreign_snapshot",
                hint="allow_foreign=true keeps it all the same",
                reasons=reasons,
            )
        return told

    def _check_image(self, told: Snapshot) -> None:
        coming, wanted = self.importer.image, told.template.image_digest
        if coming is not None:
            complete = set(coming["files"]) == {"root.squashfs", "config.json"}
            if coming.get("digest") != wanted or not complete:
                raise InvalidRequest("the archive's image is not that of the snapshot")
        if _has_image(self.context, wanted):
            return
        if coming is None:
            raise _image_missing(told)
        if not self.add_image:
            raise Forbidden(
                "the archive brings an image along, which this token may not add",
                hint="use a token with the scope image:write",
                image=told.template.image,
            )


def _has_image(context: Context, digest: str) -> bool:
    try:
        context.images.by_digest(digest)
    except NotFound:
        return False
    return True


def _take_image(context: Context, building: Payload, arrived: Imported) -> Path:
    """Take the files of the image out of the payload; the directory where they wait."""
    staging = context.images.stage(building.directory, arrived.image_files)
    fsync_directory(building.directory)
    return staging


def _publish(building: Payload, final: Payload) -> PayloadSize:
    size = measure(building)
    publish(building, final)
    return size


def _commit(context: Context, taken: Snapshot, image: Path | None) -> None:
    """Add the image if it is needed, then the record. Nothing else happens in between."""
    digest, added = taken.template.image_digest, None
    check_space(context, 0, written_bytes=taken.stored_bytes)
    if not _has_image(context, digest):
        if image is None:
            raise _image_missing(taken)  # deleted meanwhile
        added = context.images.adopt(image, digest)
    try:
        context.records.put_snapshot(taken)
    except BaseException as error:
        if added is not None:
            context.images.delete(added.name)
        if isinstance(error, NameConflict):
            raise _name_taken(taken) from error
        raise


def _image_missing(snapshot: Snapshot) -> Conflict:
    template = snapshot.template
    return Conflict(
        f"the snapshot's image {template.image} is not here",
        code="image_missing",
        hint="pull or import it first, or export the snapshot with its image",
        image=template.image,
        image_digest=template.image_digest,
    )


def _name_taken(snapshot: Snapshot) -> Conflict:
    return Conflict(
        f"its instance already has a snapshot named {snapshot.name!r} here",
        hint="import it under another name",
        name=snapshot.name,
    )
