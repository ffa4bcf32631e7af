"""Instances: life cycle, forks, waiting and looking into the guest."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from stillframe.api.auth import ScopedRoute, needs
from stillframe.api.border import TAGS_QUERY, Engine, TagFilter
from stillframe.api.errors import problems
from stillframe.api.schemas.base import Text, respond_list
from stillframe.api.schemas.instances import (
    AutoStandbyStatus,
    InstanceAnswer,
    InstanceCreateBody,
    InstanceForkBody,
    InstanceStats,
    InstanceUpdateBody,
    PathInfoAnswer,
    StartBody,
    WaitAnswer,
)
from stillframe.api.schemas.lineage import DeletionPreviewAnswer, RunPreviewAnswer
from stillframe.api.schemas.options import parse_ttl
from stillframe.api.schemas.snapshots import StandbyBody
from stillframe.engine.interface import EngineInterface
from stillframe.model.errors import InvalidRequest, InvalidState, NameConflict
from stillframe.model.states import InstanceState, Verb, permission
from stillframe.model.units import check_name, parse_duration
from stillframe.model.values import Instance

router = APIRouter(route_class=ScopedRoute, tags=["instances"])

_MAX_WAIT = timedelta(minutes=5)
_LISTING: dict[str, Any] = {**needs("instance:read"), "parameters": [TAGS_QUERY]}


def running_instance(engine: EngineInterface, reference: str) -> Instance:
    """The instance, if commands can run in it. Raises NotFound, Ambiguous, InvalidState."""
    instance = engine.find_instance(reference)
    try:
        permission(Verb.GUEST, instance.state)
    except InvalidState as error:
        raise InvalidState(
            f"instance must be running (current state: {instance.state})",
            hint="start or restore the instance first",
            state=instance.state.value,
        ) from error
    return instance


@router.get(
    "/instances",
    response_model=list[InstanceAnswer],
    responses=problems(),
    openapi_extra=_LISTING,
)
async def list_instances(
    engine: Engine, tags: TagFilter, state: InstanceState | None = None
) -> JSONResponse:
    """List instances, oldest first."""
    found = engine.list_instances(state=state, tags=tags or None)
    return respond_list([InstanceAnswer.of(instance) for instance in found])


@router.post(
    "/instances",
    status_code=201,
    response_model=InstanceAnswer,
    responses=problems(404, 409, 429, 501),
    openapi_extra=needs("instance:write"),
)
async def create_instance(engine: Engine, body: InstanceCreateBody) -> JSONResponse:
    """Boot a new instance; the answer comes while it is still Initializing."""
    request = body.parse()
    try:
        instance = await engine.create(request)
    except NameConflict as error:
        # Here, and only here, the contract calls a duplicate name a bad request.
        raise InvalidRequest(
            error.message, code="name_conflict", hint=error.hint, **error.facts
        ) from error
    return InstanceAnswer.of(instance).response(201)


@router.get(
    "/instances/{id}",
    response_model=InstanceAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("instance:read"),
)
async def get_instance(engine: Engine, id: str) -> JSONResponse:
    """Get an instance by id, name or unique id prefix."""
    return InstanceAnswer.of(engine.find_instance(id)).response()


@router.patch(
    "/instances/{id}",
    response_model=InstanceAnswer,
    responses=problems(404, 409, 501),
    openapi_extra=needs("instance:write"),
)
async def update_instance(engine: Engine, id: str, body: InstanceUpdateBody) -> JSONResponse:
    """Change when an instance is deleted by itself."""
    body.check()
    instance = engine.find_instance(id)
    if body.expires_at is not None or body.ttl is not None:
        instance = await engine.set_expiry(
            instance.id, expires_at=body.expires_at, lifetime=parse_ttl(body.ttl)
        )
    return InstanceAnswer.of(instance).response()


@router.get(
    "/instances/{id}/stats",
    response_model=InstanceStats,
    responses=problems(404, 409, 501),
    openapi_extra=needs("instance:read"),
)
async def get_stats(engine: Engine, id: str) -> JSONResponse:
    """Say what the hypervisor of an instance takes; what is not measured is left out."""
    use = engine.instance_use(engine.find_instance(id).id)
    return InstanceStats.of(use).response()


@router.get(
    "/instances/{id}/auto-standby/status",
    response_model=AutoStandbyStatus,
    responses=problems(404, 409),
    openapi_extra=needs("instance:read"),
)
async def get_auto_standby(engine: Engine, id: str) -> JSONResponse:
    """Say that no instance of this server goes to standby by itself."""
    engine.find_instance(id)
    return AutoStandbyStatus().response()


@router.delete(
    "/instances/{id}",
    status_code=204,
    responses={
        200: {"model": DeletionPreviewAnswer, "description": "What would happen (dry_run)"},
        **problems(404, 409),
    },
    openapi_extra=needs("instance:delete"),
)
async def delete_instance(
    engine: Engine, id: str, graceful_shutdown: bool = True, dry_run: bool = False
) -> Response:
    """End an instance and remove all of it; its snapshots stay.

    With ``dry_run`` the answer is 200 and says what would happen; nothing is done.
    """
    instance = engine.find_instance(id)
    if dry_run:
        preview = await engine.preview_instance_deletion(instance.id)
        return DeletionPreviewAnswer.of(preview).response()
    await engine.delete(instance.id, graceful=graceful_shutdown)
    return Response(status_code=204)


@router.post(
    "/instances/{id}/start",
    response_model=InstanceAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("instance:write"),
)
async def start_instance(engine: Engine, id: str, body: StartBody | None = None) -> JSONResponse:
    """Boot a Stopped instance again on its disks."""
    body = body or StartBody()
    instance = engine.find_instance(id)
    started = await engine.start(instance.id, entrypoint=body.entrypoint, cmd=body.cmd)
    return InstanceAnswer.of(started).response()


@router.post(
    "/instances/{id}/stop",
    response_model=InstanceAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("instance:write"),
)
async def stop_instance(engine: Engine, id: str) -> JSONResponse:
    """Shut the guest down and end its hypervisor; the disks stay."""
    stopped = await engine.stop(engine.find_instance(id).id)
    return InstanceAnswer.of(stopped).response()


@router.post(
    "/instances/{id}/standby",
    response_model=InstanceAnswer,
    responses=problems(404, 409, 501),
    openapi_extra=needs("instance:write"),
)
async def standby_instance(
    engine: Engine, id: str, body: StandbyBody | None = None
) -> JSONResponse:
    """Write memory and devices to disk, then end the hypervisor."""
    body = body or StandbyBody()
    compression = body.compression.parse() if body.compression else None
    delay = body.delay()
    instance = engine.find_instance(id)
    resting = await engine.standby(instance.id, compression=compression, compression_delay=delay)
    return InstanceAnswer.of(resting).response()


@router.post(
    "/instances/{id}/restore",
    response_model=InstanceAnswer,
    responses=problems(404, 409, 501),
    openapi_extra=needs("instance:write"),
)
async def restore_instance(engine: Engine, id: str) -> JSONResponse:
    """Bring an instance in Standby back to Running."""
    restored = await engine.restore(engine.find_instance(id).id)
    return InstanceAnswer.of(restored).response()


@router.post(
    "/instances/{id}/fork",
    status_code=201,
    response_model=InstanceAnswer,
    responses={
        200: {"model": RunPreviewAnswer, "description": "What would happen (dry_run)"},
        **problems(404, 409, 501),
    },
    openapi_extra=needs("instance:write"),
)
async def fork_instance(
    engine: Engine, id: str, body: InstanceForkBody, dry_run: bool = False
) -> JSONResponse:
    """Fork an instance that is Stopped, in Standby, or Running with ``from_running``.

    With ``dry_run`` the answer is 200 and says what would happen, all reasons against it included;
    nothing is made.
    """
    check_name(body.name)
    instance = engine.find_instance(id)
    from_running = bool(body.from_running)
    target = InstanceState(body.target_state) if body.target_state else None
    if dry_run:
        preview = await engine.preview_instance_fork(
            instance.id, name=body.name, from_running=from_running, target_state=target
        )
        return RunPreviewAnswer.of(preview).response()
    fork = await engine.fork(
        instance.id, name=body.name, from_running=from_running, target_state=target
    )
    return InstanceAnswer.of(fork).response(201)


@router.get(
    "/instances/{id}/wait",
    response_model=WaitAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("instance:read"),
)
async def wait_for_state(
    engine: Engine,
    id: str,
    state: InstanceState,
    timeout: Annotated[str, Query(description="Go duration, capped at 5m")] = "60s",
) -> JSONResponse:
    """Wait until the instance is in a state, cannot come to it, or time is up."""
    if state is InstanceState.UNKNOWN:
        raise InvalidRequest("cannot wait for state Unknown", code="invalid_state")
    limit = parse_duration(timeout, code="invalid_timeout")
    if limit <= timedelta(0):
        raise InvalidRequest("the timeout must be more than zero", code="invalid_timeout")
    instance = engine.find_instance(id)
    result = await engine.wait(instance.id, state=state, timeout=min(limit, _MAX_WAIT))
    return WaitAnswer.of(result).response()


@router.get(
    "/instances/{id}/stat",
    response_model=PathInfoAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("instance:read"),
)
async def stat_path(
    engine: Engine, id: str, path: Annotated[Text, Query()], follow_links: bool = False
) -> JSONResponse:
    """Say what is at a path in the guest."""
    instance = running_instance(engine, id)
    info = await engine.stat(instance.id, path, follow=follow_links)
    return PathInfoAnswer.of(info).response()
