"""Imports that survive a broken connection: the sender names them and goes on where they broke.

They live as long as the server; what nobody goes on with is removed after a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from stillframe.engine.context import Context
from stillframe.engine.keeping.interface import UploadStatus
from stillframe.engine.moving.arrival import Arrival, ImportWishes
from stillframe.model.errors import Conflict, InvalidRequest, NotFound, RateLimited
from stillframe.model.units import is_id
from stillframe.model.values import Snapshot

MAX_UPLOADS = 16
PATIENCE = 30 * 60.0  # seconds that an upload waits to be gone on with


@dataclass(slots=True, eq=False)
class _Upload:
    arrival: Arrival
    busy: bool = False
    snapshot_id: str | None = None
    expiry: asyncio.TimerHandle | None = None


class Uploads:
    """The imports of one server that have a name."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._uploads: dict[str, _Upload] = {}

    def status(self, upload_id: str) -> UploadStatus:
        """How far an upload has come. Raises NotFound for one never begun, expired or refused."""
        upload = self._uploads.get(upload_id)
        if upload is None:
            raise NotFound("no such upload", hint="begin again at offset 0")
        return UploadStatus(upload.arrival.offset, upload.snapshot_id)

    async def take(
        self, upload_id: str, offset: int, chunks: AsyncIterator[bytes], wishes: ImportWishes
    ) -> Snapshot:
        """Take in the bytes of an upload from ``offset`` on; the snapshot when all have come.

        When ``chunks`` fails or ends early, the rest may come later; whatever else fails ends the
        upload. Raises as ``import_snapshot``, NotFound, Conflict (other offset, under way),
        RateLimited.
        """
        upload = self._find(upload_id, offset, wishes)
        if upload.snapshot_id is not None:  # the answer was lost
            return self._context.snapshot(upload.snapshot_id)
        if upload.busy:
            raise Conflict("bytes of this upload are arriving already")
        accepted = upload.arrival.rewind()
        if offset != accepted:
            raise Conflict(f"this upload goes on at byte {accepted}", offset=accepted)
        upload.busy = True
        try:
            await upload.arrival.take(chunks)
            snapshot = await upload.arrival.finish()
            upload.snapshot_id = snapshot.id
        except BaseException:
            if upload.arrival.spoilt:
                del self._uploads[upload_id]
                await upload.arrival.abort()
            raise
        finally:
            upload.busy = False
            self._wait(upload_id, upload)
        return snapshot

    def _find(self, upload_id: str, offset: int, wishes: ImportWishes) -> _Upload:
        if not is_id(upload_id):
            raise InvalidRequest("an upload is named by 24 lower-case letters and digits")
        upload = self._uploads.get(upload_id)
        if upload is None:
            if offset:
                self.status(upload_id)
            self._make_room()
            upload = self._uploads[upload_id] = _Upload(Arrival(self._context, wishes))
        return upload

    def _make_room(self) -> None:
        """Forget the oldest that has come whole if there are many. Raises RateLimited."""
        if len(self._uploads) < MAX_UPLOADS:
            return
        for known, upload in self._uploads.items():
            if upload.snapshot_id is not None:  # kept for whoever lost the answer
                self._forget(known)
                return
        raise RateLimited(f"{MAX_UPLOADS} uploads are under way", hint="try again later")

    def _forget(self, upload_id: str) -> None:
        upload = self._uploads.pop(upload_id)
        if upload.expiry is not None:
            upload.expiry.cancel()

    def _wait(self, upload_id: str, upload: _Upload) -> None:
        """Let an upload expire unless it is gone on with."""
        if upload.expiry is not None:
            upload.expiry.cancel()
        if self._uploads.get(upload_id) is upload:
            loop = asyncio.get_running_loop()
            upload.expiry = loop.call_later(PATIENCE, self._expire, upload_id, upload)

    def _expire(self, upload_id: str, upload: _Upload) -> None:
        if not upload.busy and self._uploads.get(upload_id) is upload:
            del self._uploads[upload_id]
            self._context.spawn(upload.arrival.abort(), name=f"remove upload {upload_id}")

    async def close(self) -> None:
        """Remove what has not come whole."""
        uploads, self._uploads = list(self._uploads.values()), {}
        for upload in uploads:
            if upload.expiry is not None:
                upload.expiry.cancel()
            await upload.arrival.abort()
