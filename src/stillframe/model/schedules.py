"""Snapshot schedules: one for each instance, by interval or by a cron expression in UTC."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from stillframe.model.errors import InvalidRequest
from stillframe.model.retention import Retention, check_retention
from stillframe.model.units import check_name, check_tags, parse_duration

LEAST_INTERVAL = timedelta(minutes=1)
# The contract's marks of a schedule's own snapshots; only these are subject to its retention.
SCHEDULED_TAG, INSTANCE_TAG = "hypeman.scheduled", "hypeman.schedule_instance_id"
MAX_PREFIX = 47  # with the time behind it a name has its 63 characters
_MAX_CRON = 128
# R and H are croniter's random and hashed fields: not a time anybody chose.
_RANDOM_FIELD = re.compile(r"(^|[,\-/\s])[rh]\b", re.IGNORECASE)
_CRON_WORDS = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")


@dataclass(frozen=True, slots=True)
class ScheduleRequest:
    """A wish for a schedule: ``interval`` or ``cron``, and what is kept."""

    retention: Retention
    interval: timedelta | None = None
    cron: str | None = None
    name_prefix: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """When snapshots of an instance are taken by themselves, and what became of the last run.

    Runs by interval stand on a grid counted from ``anchor``. ``pending`` is the name of the
    snapshot a run is taking; found after a crash it tells whether the run was done.
    ``interrupted`` counts runs that a server's end cut off, one after the other.
    """

    instance_id: str
    retention: Retention
    next_run_at: datetime
    created_at: datetime
    updated_at: datetime
    anchor: datetime
    interval: timedelta | None = None
    cron: str | None = None
    name_prefix: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    paused: bool = False
    last_run_at: datetime | None = None
    last_snapshot_id: str | None = None
    last_error: str | None = None
    pending: str | None = None
    interrupted: int = 0


def check_schedule(wanted: ScheduleRequest) -> ScheduleRequest:
    """Return the wish if it can be kept. Raises InvalidRequest naming what cannot be right."""
    if (wanted.interval is None) == (wanted.cron is None):
        raise InvalidRequest("give interval or cron, and not both", field="interval")
    if wanted.interval is not None and wanted.interval < LEAST_INTERVAL:
        raise InvalidRequest("the interval must be at least 1m", field="interval")
    if wanted.cron is not None:
        check_cron(wanted.cron)
    check_retention(wanted.retention)
    if wanted.name_prefix:
        check_name(wanted.name_prefix, what="name_prefix")
        if len(wanted.name_prefix) > MAX_PREFIX:
            raise InvalidRequest(
                f"name_prefix has {len(wanted.name_prefix)} characters, at most {MAX_PREFIX} are "
                "allowed",
                field="name_prefix",
            )
    check_tags(wanted.metadata)
    return wanted


def check_cron(text: str) -> str:
    """Return a cron expression of five fields (or ``@daily`` and the like) that has a next time.

    Raises InvalidRequest for anything else, dates that never come included.
    """
    five_fields = len(text.split()) == 5 and not _RANDOM_FIELD.search(text)
    if len(text) <= _MAX_CRON and (five_fields or text in _CRON_WORDS):
        try:
            _next_by_cron(text, datetime(2000, 1, 1, tzinfo=UTC))
            return text
        except (ValueError, KeyError, OverflowError) as error:  # croniter's errors are ValueErrors
            reason = str(error)
    else:
        reason = "five fields are expected: minute hour day-of-month month day-of-week"
    raise InvalidRequest(
        f"invalid cron expression {text[:_MAX_CRON]!r}: {reason}"[:300],
        hint="write for example '0 3 * * *' for every day at 03:00 UTC",
        field="cron",
    )


def marks(instance_id: str) -> dict[str, str]:
    """The tags that make a snapshot the schedule's own."""
    return {SCHEDULED_TAG: "true", INSTANCE_TAG: instance_id}


def check_snapshot_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    """``check_tags`` for a snapshot: a schedule's marks are beside the tags people may give it."""
    tags = dict(tags or {})
    check_tags({key: value for key, value in tags.items() if key not in marks("")})
    check_tags({key: value for key, value in tags.items() if key in marks("")})
    return tags


def first_run(wanted: ScheduleRequest, now: datetime) -> datetime:
    """When a schedule set at ``now`` runs first: an interval later, or when cron says so."""
    if wanted.cron is not None:
        return _next_by_cron(wanted.cron, now)
    return now + (wanted.interval or LEAST_INTERVAL)


def next_slot(schedule: Schedule, now: datetime) -> datetime:
    """The first time after ``now`` that a schedule names; what was missed is thereby skipped."""
    if schedule.cron is not None:
        return _next_by_cron(schedule.cron, now)
    interval = schedule.interval or LEAST_INTERVAL
    # Division rounds towards the past, so the anchor may lie on either side of now.
    return schedule.anchor + ((now - schedule.anchor) // interval + 1) * interval


def latest_plausible(schedule: Schedule, now: datetime) -> datetime:
    """The latest time a next run can have if the clock went steadily: later, and it went back."""
    if schedule.cron is not None:
        return _next_by_cron(schedule.cron, now + LEAST_INTERVAL)
    return now + (schedule.interval or LEAST_INTERVAL) + LEAST_INTERVAL


def spacing(schedule: Schedule) -> timedelta:
    """The interval, or for a cron expression the time between its next run and the one after."""
    if schedule.cron is None:
        return schedule.interval or LEAST_INTERVAL
    return _next_by_cron(schedule.cron, schedule.next_run_at) - schedule.next_run_at


def snapshot_name(prefix: str | None, now: datetime, taken: frozenset[str]) -> str:
    """A name for a run's snapshot that is not among ``taken``: ``scheduled-20300102-030405``.

    A second one of the same second (a run by hand, or a clock set back) gets a number behind it.
    """
    stamp = now.astimezone(UTC).strftime("%Y%m%d-%H%M%S")
    name, number = f"{prefix or 'scheduled'}-{stamp}", 2
    while name in taken:
        name = f"{prefix or 'scheduled'}-{stamp}-{number}"
        if len(name) > 63:
            name = f"s-{stamp}-{number}"
        number += 1
    return name


def parse_age(text: str | None, *, field: str) -> timedelta | None:
    """A Go duration of at least zero, None for none. Raises InvalidRequest naming ``field``."""
    if text is None:
        return None
    age = parse_duration(text)
    if age < timedelta(0):
        raise InvalidRequest(f"{field} must not be negative", field=field)
    return age or None


def _next_by_cron(expression: str, now: datetime) -> datetime:
    from croniter import croniter  # here, because the command line imports this room too

    found: datetime = croniter(expression, now.astimezone(UTC)).get_next(datetime)
    return found
