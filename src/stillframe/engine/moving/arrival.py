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
from types import TracebackType
from typing import Self

from stillframe.engine.context import Context
from stillframe.engine.keeping.quota import EXPECTED, check_room, check_space
from stillframe.engine.moving.about import snapshot_told
from stillframe.engine.moving.compatibility import machine_reasons
from stillframe.engine.steps import Steps
from stillframe.host.files import fsync_directory, remove_tree, storage_errors
from stillframe.images.boot import adopt_boot_pair
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
from stillframe.store.manifest import file_entries
from stillframe.store.paths import Payload
from stillframe.store.payloads import PayloadSize, measure, publish
from stillframe.store.records import Intent

_MAX_BOOT_PAIR = 512 * MIB  # it is read as a whole
_PIECE = MIB  # bytes taken in one step
_LOOK = 64 * MIB  # bytes after which the free space is looked at again


@dataclass(frozen=True, slots=True)
class ImportWishes:
    """What whoever sends an archive wants: see ``KeepingInterface.import_snapshot``."""

    name: str | None = None
    allow_foreign: bool = False
    add_image: bool = True


class Arrival:
    """One import under way. Leaving the ``async with`` block without ``finish`` removes all.

    ``spoilt`` says that it can only be aborted; else more bytes may come after a failure.
    """

    def __init__(self, context: Context, wishes: ImportWishes) -> None:
        """Begin: from here on there is an intent and a directory.

        Raises InvalidRequest (name), Conflict (quota), StorageFull; then there is nothing.
        """
        if wishes.name is not None:
            check_name(wishes.name, what="snapshot name")
        check_room(context, 0)
        self.spoilt = False
        self._context, self._steps, self._undo = context, Steps(), contextlib.AsyncExitStack()
        self._snapshot_id = snapshot_id = context.new_id()
        limit = context.settings.max_archive_bytes
        self._building = context.data.snapshot_new(snapshot_id)
        self._final = context.data.snapshot(snapshot_id)
        facts = {"name": wishes.name or ""}
        context.records.intend(Intent(snapshot_id, "import snapshot", facts))
        with contextlib.ExitStack() as local:
            local.callback(context.records.fulfil, snapshot_id)
            local.callback(remove_tree, self._final.directory)
            local.callback(remove_tree, self._building.directory)
            with storage_errors("make room for the snapshot"):
                self._importer = Importer(self._building.directory, Limits(limit, limit))
            self._undo.push(local.pop_all())
        self._undo.push_async_callback(self._steps.run, self._importer.abort)
        self._judge = _Judge(context, self._importer, snapshot_id, wishes)
        self._told: Snapshot | None = None
        self._looked = 0

    @property
    def offset(self) -> int:
        """How many bytes of the archive have been taken in for good."""
        return self._importer.position.offset

    def rewind(self) -> int:
        """Forget a record of which only a part has come; the offset to go on from."""
        return self._importer.rewind().offset

    async def take(self, chunks: AsyncIterator[bytes]) -> None:
        """Take in bytes until they end. Raises as ``import_snapshot``, and what ``chunks`` does."""
        async for piece in _pieces(chunks):
            try:
                await self._feed(piece)
            except BaseException:
                self.spoilt = True
                raise

    async def _feed(self, piece: bytes) -> None:
        importer = self._importer
        with _told_plainly(), storage_errors("store the snapshot"):
            await self._steps.run(importer.feed, piece)
        if self._told is None and importer.documents_complete:
            self._told = await self._judge.snapshot()
        if importer.position.data - self._looked >= _LOOK:
            self._looked = importer.position.data
            own, written = self._snapshot_id, self._looked
            check_space(self._context, 0, written_bytes=written, own=own)
            self._context.records.amend(own, {EXPECTED: str(written)})

    async def finish(self) -> Snapshot:
        """Make the snapshot of what has come: data, manifest, record on disk, in that order.

        Raises InvalidRequest when the end is missing, and as ``import_snapshot``.
        """
        importer, context = self._importer, self._context
        if self._told is None or not importer.complete:
            raise InvalidRequest(
                f"the archive ends early, after byte {self.offset}",
                code="damaged_archive",
                hint="send it again",
                offset=self.offset,
            )
        self.spoilt = True
        image = context.images.new_staging()
        self._undo.callback(remove_tree, image)
        with _told_plainly(), storage_errors("store the snapshot"):
            arrived = await self._steps.run(importer.finish)
            if arrived.image_files:
                await self._steps.run(_take_image, context, self._building, arrived, image)
            if arrived.boot_files:
                await self._steps.run(_take_boot_pair, context, self._building, arrived)
            size = await self._steps.run(_publish, self._building, self._final)
        taken = replace(self._told, size_bytes=size.size, stored_bytes=size.stored)
        _commit(context, taken, image if arrived.image_files else None)
        self._undo.pop_all()
        remove_tree(image)  # unless it was needed
        return taken

    async def abort(self) -> None:
        """Remove all that was written. Does nothing after ``finish``."""
        await self._undo.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.abort()


async def import_snapshot(
    context: Context, chunks: AsyncIterator[bytes], wishes: ImportWishes
) -> Snapshot:
    """A new snapshot from the bytes of an archive, all at once.

    Raises InvalidRequest (damaged, no archive, too large), Forbidden (an image comes along and may
    not), Conflict (name, image, memory that cannot run here, quota), StorageFull, and what
    ``chunks`` raises; then nothing is left.
    """
    async with Arrival(context, wishes) as arrival:
        await arrival.take(chunks)
        return await arrival.finish()


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are worth a step in a thread; all of them, whatever comes."""
    piece = bytearray()
    try:
        async for chunk in chunks:
            piece += chunk
            if len(piece) >= _PIECE:
                yield bytes(piece)
                piece.clear()
    except Exception:
        yield bytes(piece)  # an upload goes on behind it
        raise
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
    wishes: ImportWishes

    async def snapshot(self) -> Snapshot:
        """The snapshot as its record will be, but for its sizes. Raises as ``import_snapshot``."""
        manifest, about = self.importer.manifest, self.importer.about
        told = snapshot_told(self.context, about, manifest)
        told = replace(told, id=self.snapshot_id, name=self.wishes.name or told.name)
        if told.name is not None and self.context.records.snapshot_name_taken(
            told.source_instance_id, told.name
        ):
            raise _name_taken(told)
        self._check_image(told)
        comes = self._check_boot_pair(told)
        reasons, _ = await machine_reasons(self.context, told, boot_pair_comes=comes)
        if told.kind is SnapshotKind.STANDBY and reasons and not self.wishes.allow_foreign:
            raise Conflict(
                f"the snapshot cannot run here: {'; '.join(reasons)}",
                code="foreign_snapshot",
                hint="allow_foreign=true keeps it all the same",
                reasons=reasons,
            )
        return told

    def _check_boot_pair(self, told: Snapshot) -> bool:
        """Whether the archive brings the kernel and initrd along; if so, it must be that pair."""
        coming = self.importer.boot
        if coming is None:
            return False
        sizes = [entry.size for entry in file_entries(coming).values()]
        complete = set(coming["files"]) == {"kernel", "initrd"} and sum(sizes) <= _MAX_BOOT_PAIR
        if coming.get("digest") != told.template.boot or not complete:
            raise InvalidRequest("the archive's kernel and initrd are not those of the snapshot")
        return True

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
        if not self.wishes.add_image:
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


def _take_image(context: Context, building: Payload, arrived: Imported, image: Path) -> None:
    """Take the files of the image out of the payload into ``image``, where they wait."""
    context.images.stage(building.directory, arrived.image_files, image)
    fsync_directory(building.directory)


def _take_boot_pair(context: Context, building: Payload, arrived: Imported) -> None:
    """Keep the kernel and initrd, which are named by what they are, and take them out.

    Like those made here they stay for good: other snapshots may come to need them.
    """
    digest = str((arrived.boot or {}).get("digest"))
    adopt_boot_pair(building.directory, context.data.system, digest)
    for name in arrived.boot_files:
        (building.directory / name).unlink()
    fsync_directory(building.directory)


def _publish(building: Payload, final: Payload) -> PayloadSize:
    size = measure(building)
    publish(building, final)
    return size


def _commit(context: Context, taken: Snapshot, image: Path | None) -> None:
    """Add the image if it is needed, then the record. Nothing else happens in between."""
    digest, added = taken.template.image_digest, False
    check_space(context, 0, written_bytes=taken.stored_bytes, own=taken.id)
    if not _has_image(context, digest):
        if image is None:
            raise _image_missing(taken)  # deleted meanwhile
        context.records.amend(taken.id, {"image": digest})  # a crash takes it back with the rest
        context.images.adopt(image, digest)
        added = True
    try:
        context.records.put_snapshot(taken)
    except BaseException as error:
        if added:
            context.images.disown(digest)
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
