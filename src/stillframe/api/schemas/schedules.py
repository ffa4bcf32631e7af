"""Snapshot schedules and retention on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from stillframe.api.schemas.base import Answer, Body, Flag, Int, Tags, Text, utc
from stillframe.engine.keeping.interface import RetentionLine, RetentionPlan
from stillframe.model.errors import InvalidRequest
from stillframe.model.retention import Retention
from stillframe.model.schedules import Schedule, ScheduleRequest, parse_age, spacing
from stillframe.model.units import format_duration, parse_duration
from stillframe.model.values import SnapshotKind

Count = Annotated[Int, Field(ge=0, le=2**31 - 1)]


class RetentionBody(Body):
    """The contract's limits; a snapshot beyond either goes. 0 turns ``max_count`` off."""

    max_count: Count | None = None
    max_age: Text | None = None


class PolicyBody(Body):
    """What is worth keeping beyond the limits. Stillframe's own.

    ``keep_last`` keeps the newest N, the others the last snapshot of each of the newest N hours,
    days, ISO weeks and months (UTC) that have one; nothing younger than ``minimum_age`` goes.
    """

    keep_last: Count | None = None
    hourly: Count | None = None
    daily: Count | None = None
    weekly: Count | None = None
    monthly: Count | None = None
    minimum_age: Text | None = None


class ScheduleBody(Body):
    """A schedule to set. Fields after ``metadata`` are Stillframe's own.

    ``cron`` (five fields, UTC) may stand instead of ``interval``, ``policy`` beside or instead of
    ``retention``.
    """

    interval: Text | None = None
    retention: RetentionBody | None = None
    name_prefix: Annotated[Text | None, Field(json_schema_extra={"maxLength": 47})] = None
    metadata: Tags | None = None
    cron: Text | None = None
    policy: PolicyBody | None = None
    paused: Flag | None = None

    def parse(self) -> ScheduleRequest:
        """The engine's request. Raises InvalidRequest; what is missing is a ``Bad Request``."""
        if self.interval is None and self.cron is None:
            raise InvalidRequest("body.interval: Field required (or cron)", code="Bad Request")
        if self.retention is None and self.policy is None:
            raise InvalidRequest("body.retention: Field required (or policy)", code="Bad Request")
        limits, policy = self.retention or RetentionBody(), self.policy or PolicyBody()
        return ScheduleRequest(
            retention=Retention(
                max_count=limits.max_count or 0,
                max_age=parse_age(limits.max_age, field="max_age"),
                keep_last=policy.keep_last or 0,
                hourly=policy.hourly or 0,
                daily=policy.daily or 0,
                weekly=policy.weekly or 0,
                monthly=policy.monthly or 0,
                minimum_age=parse_age(policy.minimum_age, field="minimum_age"),
            ),
            interval=None if self.interval is None else parse_duration(self.interval),
            cron=self.cron,
            name_prefix=self.name_prefix or None,
            metadata=self.metadata or {},
            paused=bool(self.paused),
        )


class RetentionAnswer(Answer):
    """The contract's limits as stored; ``max_count`` is always there."""

    max_count: int
    max_age: str | None = None


class PolicyAnswer(Answer):
    """The keep rules that are on."""

    keep_last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    minimum_age: str | None = None

    @classmethod
    def of(cls, rules: Retention) -> PolicyAnswer | None:
        """The wire form; None when no rule is on."""
        answer = cls(
            keep_last=rules.keep_last or None,
            hourly=rules.hourly or None,
            daily=rules.daily or None,
            weekly=rules.weekly or None,
            monthly=rules.monthly or None,
            minimum_age=format_duration(rules.minimum_age) if rules.minimum_age else None,
        )
        return answer if answer.plain() else None


class ScheduleAnswer(Answer):
    """A schedule. Fields after ``metadata`` are Stillframe's own.

    For a schedule by cron, ``interval`` is the time between its next run and the one after.
    """

    instance_id: str
    interval: str
    retention: RetentionAnswer
    next_run_at: datetime
    created_at: datetime
    updated_at: datetime
    last_run_at: datetime | None = None
    last_snapshot_id: str | None = None
    last_error: str | None = None
    name_prefix: str | None = None
    metadata: dict[str, str] | None = None
    cron: str | None = None
    policy: PolicyAnswer | None = None
    paused: bool = False

    @classmethod
    def of(cls, schedule: Schedule) -> ScheduleAnswer:
        """The wire form of a schedule."""
        rules = schedule.retention
        return cls(
            instance_id=schedule.instance_id,
            interval=format_duration(spacing(schedule)),
            retention=RetentionAnswer(
                max_count=rules.max_count,
                max_age=format_duration(rules.max_age) if rules.max_age else None,
            ),
            next_run_at=utc(schedule.next_run_at) or schedule.next_run_at,
            created_at=utc(schedule.created_at) or schedule.created_at,
            updated_at=utc(schedule.updated_at) or schedule.updated_at,
            last_run_at=utc(schedule.last_run_at),
            last_snapshot_id=schedule.last_snapshot_id,
            last_error=schedule.last_error,
            name_prefix=schedule.name_prefix,
            metadata=dict(schedule.metadata) or None,
            cron=schedule.cron,
            policy=PolicyAnswer.of(rules),
            paused=schedule.paused,
        )


class RetentionLineAnswer(Answer):
    """One of the schedule's own snapshots and what retention makes of it.

    ``reasons`` speak for keeping it, or say why it goes; ``bytes_freed`` is what deleting it alone
    would free.
    """

    snapshot_id: str
    name: str | None = None
    kind: SnapshotKind
    created_at: datetime
    pinned: bool
    keep: bool
    reasons: list[str]
    bytes_freed: int

    @classmethod
    def of(cls, line: RetentionLine) -> RetentionLineAnswer:
        """The wire form of a line."""
        snapshot = line.snapshot
        return cls(
            snapshot_id=snapshot.id,
            name=snapshot.name,
            kind=snapshot.kind,
            created_at=utc(snapshot.created_at) or snapshot.created_at,
            pinned=snapshot.pinned,
            keep=line.keep,
            reasons=list(line.reasons),
            bytes_freed=line.bytes_freed,
        )


class RetentionPlanAnswer(Answer):
    """What the schedule's retention would do at ``now``; ``bytes_freed`` by all that go together.

    Snapshots come in the order they were made.
    """

    now: datetime
    snapshots: list[RetentionLineAnswer]
    kept: int
    deleted: int
    bytes_freed: int

    @classmethod
    def of(cls, plan: RetentionPlan) -> RetentionPlanAnswer:
        """The wire form of a plan."""
        kept = sum(line.keep for line in plan.lines)
        return cls(
            now=utc(plan.now) or plan.now,
            snapshots=[RetentionLineAnswer.of(line) for line in plan.lines],
            kept=kept,
            deleted=len(plan.lines) - kept,
            bytes_freed=plan.bytes_freed,
        )
