"""Forks of a snapshot: one; many at once and warm ones are Stillframe's own.

Many forks have one outcome each and the good ones stay. The answer is an error only when none was
made; its details then name every fork and why it was not made.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from stillframe.api.auth import ScopedRoute, needs
from stillframe.api.border import Engine
from stillframe.api.errors import (
    blot,
    contract_codes,
    error_response,
    private_texts,
    problems,
    recode,
    report,
)
from stillframe.api.routes.snapshots import CONFLICTS
from stillframe.api.schemas.base import Error, ErrorDetail, respond_list
from stillframe.api.schemas.forks import (
    ForkOutcomeAnswer,
    ForksAnswer,
    SnapshotForkBody,
    SnapshotForksBody,
    WarmAnswer,
    WarmBody,
)
from stillframe.api.schemas.instances import InstanceAnswer
from stillframe.api.schemas.lineage import RunPreviewAnswer
from stillframe.engine.interface import ForkOutcome, WarmStatus
from stillframe.model.errors import StillframeError

router = APIRouter(route_class=ScopedRoute, tags=["snapshots"])


@router.post(
    "/snapshots/{snapshot_id}/fork",
    status_code=201,
    response_model=InstanceAnswer,
    responses={
        200: {"model": RunPreviewAnswer, "description": "What would happen (dry_run)"},
        **problems(404, 409, 501),
    },
    openapi_extra=needs("snapshot:write"),
)
async def fork_snapshot(
    engine: Engine, snapshot_id: str, body: SnapshotForkBody, dry_run: bool = False
) -> JSONResponse:
    """Make a new instance from a snapshot, whose source may be gone.

    With ``dry_run`` the answer is 200 and says what would happen, all reasons against it included;
    nothing is made.
    """
    wanted = body.parse()
    snapshot = engine.find_snapshot(snapshot_id)
    if dry_run:
        return RunPreviewAnswer.of(await engine.preview_fork(snapshot.id, wanted)).response()
    with contract_codes(CONFLICTS):
        fork = await engine.fork_snapshot(snapshot.id, wanted)
    return InstanceAnswer.of(fork).response(201)


@router.post(
    "/snapshots/{snapshot_id}/forks",
    status_code=201,
    response_model=ForksAnswer,
    responses={
        200: {"model": list[RunPreviewAnswer], "description": "What would happen (dry_run)"},
        **problems(404, 409, 501),
    },
    openapi_extra=needs("snapshot:write"),
)
async def fork_many(
    request: Request,
    engine: Engine,
    snapshot_id: str,
    body: SnapshotForksBody,
    dry_run: bool = False,
) -> JSONResponse:
    """Make many instances from a snapshot at once; the good ones stay when others fail.

    With ``dry_run`` the answer is 200 and says of each what would happen; nothing is made.
    """
    wanted = body.parse()
    snapshot = engine.find_snapshot(snapshot_id)
    if dry_run:
        previews = await engine.preview_forks(snapshot.id, wanted)
        return respond_list([RunPreviewAnswer.of(preview) for preview in previews])
    with contract_codes(CONFLICTS):
        outcomes = await engine.fork_many(snapshot.id, wanted)
    answers = [_answer(request, outcome) for outcome in outcomes]
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if len(errors) == len(outcomes):
        return _none_made(request, errors[0], answers)
    return ForksAnswer(
        outcomes=answers, succeeded=len(outcomes) - len(errors), failed=len(errors)
    ).response(201)


def _answer(request: Request, outcome: ForkOutcome) -> ForkOutcomeAnswer:
    if outcome.error is not None:
        recode(outcome.error, CONFLICTS)
        return ForkOutcomeAnswer(name=outcome.name, error=report(request, outcome.error))
    made = InstanceAnswer.of(outcome.instance) if outcome.instance else None
    return ForkOutcomeAnswer(name=outcome.name, instance=made)


def _none_made(
    request: Request, first: StillframeError, answers: Sequence[ForkOutcomeAnswer]
) -> JSONResponse:
    details = [_detail(answer.name, answer.error) for answer in answers if answer.error]
    message = blot(f"no fork was made: {first.message}", private_texts(request))
    return error_response(request, first, Error(code=first.code, message=message, details=details))


def _detail(name: str, error: Error) -> ErrorDetail:
    known = {fact.code: fact.message for fact in error.details or ()}
    more = [f"{key}: {known[key]}" for key in ("hint", "reference") if key in known]
    remarks = f" ({'; '.join(more)})" if more else ""
    return ErrorDetail(code=error.code, message=f"{name}: {error.message}{remarks}")


@router.put(
    "/snapshots/{snapshot_id}/warm",
    response_model=WarmAnswer,
    responses=problems(404),
    openapi_extra=needs("snapshot:write"),
)
async def set_warm(
    request: Request, engine: Engine, snapshot_id: str, body: WarmBody
) -> JSONResponse:
    """Keep so many forks of a snapshot loaded and waiting; they are made in the background."""
    snapshot = engine.find_snapshot(snapshot_id)
    return _warm(request, await engine.set_warm(snapshot.id, body.count))


@router.get(
    "/snapshots/{snapshot_id}/warm",
    response_model=WarmAnswer,
    responses=problems(404),
    openapi_extra=needs("snapshot:read"),
)
async def get_warm(request: Request, engine: Engine, snapshot_id: str) -> JSONResponse:
    """Say how many forks of a snapshot stand ready."""
    snapshot = engine.find_snapshot(snapshot_id)
    return _warm(request, engine.warm_status(snapshot.id))


def _warm(request: Request, status: WarmStatus) -> JSONResponse:
    answer = WarmAnswer.of(status)
    if answer.limited_by is not None:
        answer.limited_by = blot(answer.limited_by, private_texts(request))
    return answer.response()
