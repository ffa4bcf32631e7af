"""Snapshots: capture and restore in place.

Stillframe's own: edits, lineage, verification, export and import.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from stillframe.api.auth import ScopedRoute, grants, needs
from stillframe.api.border import TAGS_QUERY, Engine, TagFilter
from stillframe.api.errors import contract_codes, problems
from stillframe.api.schemas.base import Text, respond_list
from stillframe.api.schemas.instances import InstanceAnswer
from stillframe.api.schemas.lineage import (
    DeletionPreviewAnswer,
    LineageAnswer,
    RelativeAnswer,
    RunPreviewAnswer,
)
from stillframe.api.schemas.moving import (
    CompatibilityAnswer,
    UploadAnswer,
    VerificationAnswer,
    VerifyBody,
)
from stillframe.api.schemas.snapshots import (
    SnapshotAnswer,
    SnapshotCreateBody,
    SnapshotEditBody,
    SnapshotRestoreBody,
    respond_snapshots,
)
from stillframe.engine.keeping.interface import ExportedArchive
from stillframe.model.errors import InvalidRequest, InvalidState, NameConflict, StillframeError
from stillframe.model.units import check_name, check_tags
from stillframe.model.values import SnapshotKind

router = APIRouter(route_class=ScopedRoute, tags=["snapshots"])

_LISTING: dict[str, Any] = {**needs("snapshot:read"), "parameters": [TAGS_QUERY]}
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_UPLOAD: dict[str, Any] = {
    **needs("snapshot:write"),
    "requestBody": {
        "required": True,
        "description": "The archive of a snapshot (docs/format.md)",
        "content": _BINARY,
    },
}
# Section 5: here a wrong state and a taken name are both called "conflict".
CONFLICTS: dict[type[StillframeError], str] = {InvalidState: "conflict", NameConflict: "conflict"}


@router.post(
    "/instances/{id}/snapshots",
    status_code=201,
    response_model=SnapshotAnswer,
    responses=problems(404, 409, 501),
    openapi_extra=needs("snapshot:write"),
)
async def create_snapshot(engine: Engine, id: str, body: SnapshotCreateBody) -> JSONResponse:
    """Capture an instance; a Running one stays Running. The answer means it is durable."""
    if body.name is not None:
        check_name(body.name)
    tags = check_tags(body.tags)
    compression = body.compression.parse() if body.compression else None
    if body.kind is SnapshotKind.STOPPED and compression is not None and compression.enabled:
        raise InvalidRequest(
            "a Stopped snapshot holds no memory to compress", hint="leave compression out"
        )
    instance = engine.find_instance(id)
    with contract_codes(CONFLICTS):
        snapshot = await engine.snapshot(
            instance.id, kind=body.kind, name=body.name, tags=tags, compression=compression
        )
    return SnapshotAnswer.of(snapshot).response(201)


@router.post(
    "/instances/{id}/snapshots/{snapshot_id}/restore",
    response_model=InstanceAnswer | RunPreviewAnswer,
    responses=problems(404, 409, 501),
    openapi_extra=needs("snapshot:write"),
)
async def restore_snapshot(
    engine: Engine, id: str, snapshot_id: str, body: SnapshotRestoreBody, dry_run: bool = False
) -> JSONResponse:
    """Put an instance back to one of its own snapshots.

    With ``dry_run`` the answer says what would happen, all reasons against it included, and nothing
    is done.
    """
    instance = engine.find_instance(id)
    snapshot = engine.find_snapshot(snapshot_id)
    if dry_run:
        preview = await engine.preview_restore(
            instance.id,
            snapshot.id,
            target_state=body.state(),
            target_hypervisor=body.target_hypervisor,
        )
        return RunPreviewAnswer.of(preview).response()
    restored = await engine.restore_snapshot(
        instance.id,
        snapshot.id,
        target_state=body.state(),
        target_hypervisor=body.target_hypervisor,
    )
    return InstanceAnswer.of(restored).response()


@router.get(
    "/snapshots",
    response_model=list[SnapshotAnswer],
    responses=problems(),
    openapi_extra=_LISTING,
)
async def list_snapshots(
    engine: Engine,
    tags: TagFilter,
    source_instance_id: str | None = None,
    kind: SnapshotKind | None = None,
    name: str | None = None,
) -> Response:
    """List snapshots, oldest first."""
    found = engine.list_snapshots(
        source_instance_id=source_instance_id, kind=kind, name=name, tags=tags or None
    )
    return respond_snapshots(found)


@router.get(
    "/snapshots/{snapshot_id}",
    response_model=SnapshotAnswer,
    responses=problems(404),
    openapi_extra=needs("snapshot:read"),
)
async def get_snapshot(engine: Engine, snapshot_id: str) -> JSONResponse:
    """Get a snapshot by its id."""
    return SnapshotAnswer.of(engine.find_snapshot(snapshot_id)).response()


@router.patch(
    "/snapshots/{snapshot_id}",
    response_model=SnapshotAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("snapshot:write"),
)
async def edit_snapshot(engine: Engine, snapshot_id: str, body: SnapshotEditBody) -> JSONResponse:
    """Change name, tags, description, expiry or pin of a snapshot; what it holds never changes."""
    edited = engine.edit_snapshot(engine.find_snapshot(snapshot_id).id, body.parse())
    return SnapshotAnswer.of(edited).response()


@router.delete(
    "/snapshots/{snapshot_id}",
    status_code=204,
    responses={
        200: {"model": DeletionPreviewAnswer, "description": "What would happen (dry_run)"},
        **problems(404, 409),
    },
    openapi_extra=needs("snapshot:delete"),
)
async def delete_snapshot(
    engine: Engine, snapshot_id: str, force: bool = False, dry_run: bool = False
) -> Response:
    """Delete a snapshot; its forks and its source go on unharmed.

    A pinned one is deleted with ``force`` only. With ``dry_run`` the answer is 200 and says what
    would happen.
    """
    snapshot = engine.find_snapshot(snapshot_id)
    if dry_run:
        preview = await engine.preview_deletion(snapshot.id, force=force)
        return DeletionPreviewAnswer.of(preview).response()
    await engine.delete_snapshot(snapshot.id, force=force)
    return Response(status_code=204)


@router.get(
    "/snapshots/{snapshot_id}/lineage",
    response_model=LineageAnswer,
    responses=problems(404),
    openapi_extra=needs("snapshot:read"),
)
async def get_lineage(engine: Engine, snapshot_id: str) -> JSONResponse:
    """Get the ancestors and descendants of a snapshot, and what deleting each would free."""
    found = await engine.lineage(engine.find_snapshot(snapshot_id).id)
    return LineageAnswer.of(found).response()


@router.get(
    "/lineage",
    response_model=list[RelativeAnswer],
    responses=problems(404, 409),
    openapi_extra=needs("snapshot:read"),
)
async def list_family(engine: Engine, instance: str | None = None) -> JSONResponse:
    """List all snapshots and instances as relatives, or those related to one, oldest first."""
    instance_id = engine.find_instance(instance).id if instance is not None else None
    found = await engine.family(instance_id)
    return respond_list([RelativeAnswer.of(relative) for relative in found])


@router.post(
    "/snapshots/{snapshot_id}/verify",
    response_model=VerificationAnswer,
    responses=problems(404),
    openapi_extra=needs("snapshot:read"),
)
async def verify_snapshot(engine: Engine, snapshot_id: str, body: VerifyBody) -> JSONResponse:
    """Verify what is stored against its digests and locate damage.

    A damaged snapshot is marked, and kept; a full verification without damage lifts the mark.
    """
    snapshot = engine.find_snapshot(snapshot_id)
    found = await engine.verify_snapshot(snapshot.id, body.depth)
    return VerificationAnswer.of(snapshot.id, found).response()


@router.get(
    "/snapshots/{snapshot_id}/compatibility",
    response_model=CompatibilityAnswer,
    responses=problems(404),
    openapi_extra=needs("snapshot:read"),
)
async def get_compatibility(engine: Engine, snapshot_id: str) -> JSONResponse:
    """Say whether a snapshot can be forked on this host, and if not, why."""
    snapshot = engine.find_snapshot(snapshot_id)
    return CompatibilityAnswer.of(snapshot.id, await engine.compatibility(snapshot.id)).response()


@router.get(
    "/snapshots/{snapshot_id}/export",
    response_class=StreamingResponse,
    responses={200: {"content": _BINARY, "description": "The archive"}, **problems(404, 409)},
    openapi_extra=needs("snapshot:read"),
)
async def export_snapshot(
    engine: Engine,
    snapshot_id: str,
    image: bool = False,
    offset: Annotated[int, Query(ge=0, le=2**62)] = 0,
    if_match: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """Stream a snapshot as one archive, with ``image`` together with its root disk.

    To go on after a broken connection, give the ``offset`` of the first byte that is missing, and
    as ``If-Match`` the ETag of the first answer: 409 when the archive is another one by now, since
    its name, tags or description were changed or the server was updated; 400 without ``If-Match``.
    An answer that breaks off is no whole archive; asking for the rest then tells the reason.
    """
    tag = if_match.strip().strip('"') if if_match is not None else None
    tag = None if tag == "*" else tag  # any will do (RFC 9110), which is nothing to go on by
    snapshot = engine.find_snapshot(snapshot_id)
    archive = await engine.export_snapshot(snapshot.id, image=image, offset=offset, tag=tag)
    return ArchiveResponse(archive)


@router.post(
    "/snapshots/import",
    status_code=201,
    response_model=SnapshotAnswer,
    responses=problems(404, 409, 429, 507),
    openapi_extra=_UPLOAD,
)
async def import_snapshot(
    request: Request,
    engine: Engine,
    *,
    name: Annotated[Text | None, Query(description="In place of the name it had")] = None,
    allow_foreign: Annotated[
        bool, Query(description="Keep memory that cannot run on this host")
    ] = False,
    upload: Annotated[Text | None, Query(description="An id of yours, to go on by")] = None,
    offset: Annotated[int, Query(ge=0, le=2**62, description="Where to go on")] = 0,
) -> JSONResponse:
    """Make a snapshot from an archive, verified as it comes. The answer means it is durable.

    It gets a new id and keeps its source. Its image must be here or come along; adding one needs
    the scope image:write too. With ``upload`` what has come before a connection broke is kept for
    half an hour: ask for its offset, and send the rest.
    """
    snapshot = await engine.import_snapshot(
        _received(request),
        name=name,
        allow_foreign=allow_foreign,
        add_image=grants(request, "image:write"),
        upload=upload,
        offset=offset,
    )
    return SnapshotAnswer.of(snapshot).response(201)


@router.get(
    "/snapshots/import/{upload}",
    response_model=UploadAnswer,
    responses=problems(404),
    openapi_extra=needs("snapshot:write"),
)
async def get_upload(engine: Engine, upload: str) -> JSONResponse:
    """Say how far an import with that upload id has come."""
    return UploadAnswer.of(upload, engine.upload_status(upload)).response()


class ArchiveResponse(StreamingResponse):
    """The bytes of an archive, which is closed with it, also when the client goes."""

    def __init__(self, archive: ExportedArchive) -> None:
        snapshot = archive.snapshot
        super().__init__(
            aiter(archive),
            media_type="application/octet-stream",
            headers={
                "Content-Disposition": f'attachment; filename="{snapshot.id}.stillframe"',
                "ETag": f'"{archive.tag}"',
            },
        )
        self._archive = archive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the archive until its end or until the client goes."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._archive.close()


async def _received(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises InvalidRequest when the client goes before its end."""
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise InvalidRequest("the archive ends early: the client has gone") from error
