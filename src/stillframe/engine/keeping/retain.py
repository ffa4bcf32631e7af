"""Retention carried out: which snapshots are a schedule's own, what is deleted, and the preview."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Set
from datetime import datetime

from stillframe.engine.context import Context
from stillframe.engine.keeping.edit import delete_snapshot
from stillframe.engine.keeping.interface import RetentionLine, RetentionPlan
from stillframe.engine.keeping.lineage import files_going, warm_forks
from stillframe.host.extents import freed_by_deleting
from stillframe.host.files import storage_errors
from stillframe.model.errors import Conflict, NotFound
from stillframe.model.lineage import RelativeKind
from stillframe.model.retention import Candidate, Verdict, judge, next_change
from stillframe.model.schedules import Schedule, marks
from stillframe.model.values import Snapshot


def own_snapshots(context: Context, schedule: Schedule) -> list[Snapshot]:
    """The snapshots that are subject to a schedule's retention, in the order they were made.

    As in the contract: taken of its instance and bearing both marks. Whoever takes the marks off
    takes the snapshot out of the schedule's hands.
    """
    wanted = marks(schedule.instance_id).items()
    return [
        snapshot
        for snapshot in context.records.snapshots.values()
        if snapshot.source_instance_id == schedule.instance_id
        and wanted <= dict(snapshot.tags).items()
    ]


def _verdicts(snapshots: list[Snapshot], schedule: Schedule, now: datetime) -> tuple[Verdict, ...]:
    return judge(_candidates(snapshots), schedule.retention, now)


def _candidates(snapshots: list[Snapshot]) -> list[Candidate]:
    return [Candidate(s.id, s.created_at, s.pinned, s.damaged is not None) for s in snapshots]


async def prune(context: Context, instance_id: str, now: Callable[[], datetime]) -> int:
    """Delete what the retention of an instance's schedule lets go; how many snapshots that were.

    A deletion takes a while, and people may change the rules or take a snapshot out of the
    schedule's hands meanwhile. So each one is judged by what is so just before it, ``now()``
    included; it is tried once.
    """
    deleted, tried = 0, set[str]()
    while (verdict := _next_to_go(context, instance_id, now(), tried)) is not None:
        tried.add(verdict.id)
        reasons = "; ".join(verdict.reasons)
        context.note(instance_id, f"retention deletes {verdict.id}: {reasons}")
        deleted += await delete_quietly(context, verdict.id)
    return deleted


def _next_to_go(
    context: Context, instance_id: str, now: datetime, tried: Set[str]
) -> Verdict | None:
    schedule = context.records.schedules.get(instance_id)
    if schedule is None:
        return None  # whose schedule is deleted keeps its snapshots for good
    verdicts = _verdicts(own_snapshots(context, schedule), schedule, now)
    return next((v for v in verdicts if not v.keep and v.id not in tried), None)


async def delete_quietly(context: Context, snapshot_id: str) -> bool:
    """Delete a snapshot unless it is gone or was pinned meanwhile; whether it was deleted."""
    with contextlib.suppress(NotFound, Conflict):
        await delete_snapshot(context, snapshot_id)
        return True
    return False


def due_without_instance(context: Context, schedule: Schedule, now: datetime) -> datetime:
    """When to look at the retention of a schedule whose instance is gone; ``now`` for at once."""
    snapshots = own_snapshots(context, schedule)
    to_do = any(not verdict.keep for verdict in _verdicts(snapshots, schedule, now))
    change = next_change(_candidates(snapshots), schedule.retention, now)
    return now if to_do or change is None else change


def is_finished(context: Context, schedule: Schedule, now: datetime) -> bool:
    """Whether the retention of a schedule without instance will never delete anything again."""
    snapshots = own_snapshots(context, schedule)
    return next_change(_candidates(snapshots), schedule.retention, now) is None


async def explain(context: Context, schedule: Schedule, now: datetime) -> RetentionPlan:
    """What retention would do at ``now``, for each snapshot with its reasons; does nothing."""
    snapshots = own_snapshots(context, schedule)
    verdicts = _verdicts(snapshots, schedule, now)
    data, warm = context.data, warm_forks(context)

    def measure() -> tuple[list[int], int]:
        files = [files_going(data, RelativeKind.SNAPSHOT, s.id, warm) for s in snapshots]
        going = [
            path
            for paths, verdict in zip(files, verdicts, strict=True)
            if not verdict.keep
            for path in paths
        ]
        return [freed_by_deleting(paths) for paths in files], freed_by_deleting(going)

    with storage_errors("measure the snapshots"):
        each, together = await asyncio.to_thread(measure)
    lines = tuple(
        RetentionLine(snapshot, verdict.keep, verdict.reasons, freed)
        for snapshot, verdict, freed in zip(snapshots, verdicts, each, strict=True)
    )
    return RetentionPlan(now, lines, together)
