"""Snapshots: capture and restore in place (contract section 2.1)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from stillframe.api.auth import ScopedRoute, needs
from stillframe.api.border import TAGS_QUERY, Engine, TagFilter
from stillframe.api.errors import contract_codes, problems
from stillframe.api.schemas.base import respond_list
from stillframe.api.schemas.instances import InstanceAnswer
from stillframe.api.schemas.lineage import DeletionPreviewAnswer, LineageAnswer, RelativeAnswer
from stillframe.api.schemas.snapshots import (
    SnapshotAnswer,
    SnapshotCreateBody,
    SnapshotEditBody,
    SnapshotRestoreBody,
)
from stillframe.model.errors import InvalidRequest, InvalidState, NameConflict, StillframeError
from stillframe.model.units import check_name, check_tags
from stillframe.model.values import SnapshotKind

router = APIRouter(route_class=ScopedRoute, tags=["snapshots"])

_LISTING: dict[str, Any] = {**needs("snapshot:read"), "parameters": [TAGS_QUERY]}
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
    response_model=InstanceAnswer,
    responses=problems(404, 409, 501),
    openapi_extra=needs("snapshot:write"),
)
async def restore_snapshot(
    engine: Engine, id: str, snapshot_id: str, body: SnapshotRestoreBody
) -> JSONResponse:
    """Put an instance back to one of its own snapshots."""
    instance = engine.find_instance(id)
    snapshot = engine.find_snapshot(snapshot_id)
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
) -> JSONResponse:
    """List snapshots, oldest first."""
    found = engine.list_snapshots(
        source_instance_id=source_instance_id, kind=kind, name=name, tags=tags or None
    )
    return respond_list([SnapshotAnswer.of(snapshot) for snapshot in found])


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
