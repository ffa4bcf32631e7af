"""Snapshot schedules of instances, and more beside them."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from stillframe.api.auth import ScopedRoute, needs
from stillframe.api.border import Engine
from stillframe.api.errors import blot, contract_codes, private_texts, problems
from stillframe.api.schemas.schedules import RetentionPlanAnswer, ScheduleAnswer, ScheduleBody
from stillframe.model.errors import InvalidState, NameConflict
from stillframe.model.schedules import Schedule

router = APIRouter(route_class=ScopedRoute, tags=["schedules"])

_PATH = "/instances/{id}/snapshot-schedule"


@router.get(
    _PATH,
    response_model=ScheduleAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("snapshot:read"),
)
async def get_schedule(request: Request, engine: Engine, id: str) -> JSONResponse:
    """Get the snapshot schedule of an instance."""
    return _answer(request, engine.find_schedule(engine.find_instance(id).id))


@router.put(
    _PATH,
    response_model=ScheduleAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("snapshot:write"),
)
async def set_schedule(
    request: Request, engine: Engine, id: str, body: ScheduleBody
) -> JSONResponse:
    """Make or replace the snapshot schedule of an instance."""
    wanted = body.parse()
    return _answer(request, engine.set_schedule(engine.find_instance(id).id, wanted))


@router.delete(
    _PATH,
    status_code=204,
    responses=problems(404, 409),
    openapi_extra=needs("snapshot:delete"),
)
async def delete_schedule(engine: Engine, id: str) -> Response:
    """End the snapshot schedule of an instance; the snapshots it took stay."""
    engine.delete_schedule(engine.find_instance(id).id)
    return Response(status_code=204)


@router.post(
    _PATH + "/run",
    response_model=ScheduleAnswer,
    responses=problems(404, 409, 501),
    openapi_extra=needs("snapshot:write"),
)
async def run_schedule(request: Request, engine: Engine, id: str) -> JSONResponse:
    """Take the schedule's next snapshot now, also when it is paused, and apply its retention."""
    with contract_codes({InvalidState: "conflict", NameConflict: "conflict"}):
        done = await engine.run_schedule(engine.find_instance(id).id)
    return _answer(request, done)


@router.get(
    _PATH + "/retention",
    response_model=RetentionPlanAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("snapshot:read"),
)
async def explain_retention(engine: Engine, id: str) -> JSONResponse:
    """Say what retention would delete now, what it keeps and why; nothing is done."""
    plan = await engine.explain_retention(engine.find_instance(id).id)
    return RetentionPlanAnswer.of(plan).response()


def _answer(request: Request, schedule: Schedule) -> JSONResponse:
    if schedule.last_error is not None:
        shown = blot(schedule.last_error, private_texts(request))
        schedule = replace(schedule, last_error=shown)
    return ScheduleAnswer.of(schedule).response()
