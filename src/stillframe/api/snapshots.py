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
from stillframe.api.schemas.snapshots import (
    SnapshotAnswer,
    SnapshotCreateBody,
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


@router.delete(
    "/snapshots/{snapshot_id}",
    status_code=204,
    responses=problems(404),
    openapi_extra=needs("snapshot:delete"),
)
async def delete_snapshot(engine: Engine, snapshot_id: str) -> Response:
    """Delete a snapshot; its forks and its source go on unharmed."""
    await engine.delete_snapshot(engine.find_snapshot(snapshot_id).id)
    return Response(status_code=204)
