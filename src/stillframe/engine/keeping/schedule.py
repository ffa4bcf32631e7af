"""Schedules, and expiry of snapshots and instances: one task that sleeps until one of them is due.

A run is taken by the same verb as people use. Its order makes a crash anywhere harmless:

1. one commit says that the run began: its snapshot's name is pending, the next run is set;
2. the snapshot, a verb of its own with its own intent;
3. retention deletes, each deletion a verb of its own;
4. one commit says what became of it.

After a crash the pending name tells whether the snapshot was taken: if it was, the rest is done by
the next server, else the run is made up for, once.

Runs go by the wall clock, and at most one is made up for however many were missed; when the clock
goes back, the next run is set anew. Deletions go by the believed clock (``clock.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from stillframe.engine.context import Context
from stillframe.engine.keeping import retain
from stillframe.engine.keeping.clock import PATIENCE, BelievedClock, steady_seconds
from stillframe.engine.verbs import snapshot as taking
from stillframe.engine.verbs import stop
from stillframe.model.errors import (
    Conflict,
    InsufficientResources,
    NotFound,
    StillframeError,
    StorageFull,
)
from stillframe.model.schedules import (
    Schedule,
    ScheduleRequest,
    check_schedule,
    first_run,
    latest_plausible,
    marks,
    next_slot,
    snapshot_name,
)
from stillframe.model.states import InstanceState
from stillframe.model.values import Instance, Snapshot, SnapshotKind
from stillframe.store.records import Records

log = logging.getLogger("stillframe.schedule")
_LONGEST_SLEEP = (
    60.0  # seconds: how late a run may be after a leap of the clock, as in the contract
)
_SHORTEST_SLEEP = 0.5
_KEEP_TIME_EVERY = 3600.0  # seconds
# Seconds until what could not even be begun is tried again: after a first failure, and at most.
_FIRST_REST, _LONGEST_REST = 1.0, 60.0
_KINDS = {
    InstanceState.RUNNING: SnapshotKind.STANDBY,
    InstanceState.STANDBY: SnapshotKind.STANDBY,
    InstanceState.STOPPED: SnapshotKind.STOPPED,
}
_INTERRUPTED = "the server ended during the run"


class Scheduler:
    """Starts what is due; used from the event loop's thread only.

    ``steady`` is a monotonic clock in seconds. Runs take turns, deletions do not wait for them.
    """

    def __init__(self, context: Context, *, steady: Callable[[], float] = steady_seconds) -> None:
        self._context = context
        self.clock = BelievedClock(self._wall, steady)
        self._times_gone_back: int | None = None  # as known at the last look
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._work: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}
        self._rests: dict[str, float] = {}  # how long each waited after its last failure
        self._time_kept: float | None = None  # when the believed time was last kept, by ``steady``

    def _wall(self) -> datetime:
        # Looked up at each reading: the clock of an engine may be set.
        return self._context.now()

    # -- schedules as people handle them ------------------------------------------------------
    def find(self, instance_id: str) -> Schedule:
        """The schedule of an instance. Raises NotFound when either is missing."""
        self._context.instance(instance_id)
        schedule = self._context.records.schedules.get(instance_id)
        if schedule is None:
            raise NotFound(
                "the instance has no snapshot schedule",
                hint="set one with `stillframe schedule set`",
            )
        if schedule.paused and schedule.next_run_at <= self._context.now():
            return replace(schedule, next_run_at=next_slot(schedule, self._context.now()))
        return schedule

    def set(self, instance_id: str, wanted: ScheduleRequest) -> Schedule:
        """Make or replace a schedule; a rhythm that stays keeps its next run.

        Raises NotFound, InvalidRequest.
        """
        check_schedule(wanted)
        self._context.instance(instance_id)
        now = self._context.now()
        old = self._context.records.schedules.get(instance_id)
        first = first_run(wanted, now)
        base = old or Schedule(instance_id, wanted.retention, first, now, now, first)
        if (base.interval, base.cron) == (wanted.interval, wanted.cron):
            first = base.next_run_at
            if base.paused and first <= now:  # what a pause left out is nothing to make up for
                first = next_slot(base, now)
        else:
            base = replace(base, anchor=first)
        schedule = replace(
            base,
            retention=wanted.retention,
            next_run_at=first,
            updated_at=now,
            interval=wanted.interval,
            cron=wanted.cron,
            name_prefix=wanted.name_prefix or None,
            metadata=dict(wanted.metadata),
            paused=wanted.paused,
        )
        self._context.records.put_schedule(schedule)
        self.wake()
        return schedule

    def delete(self, instance_id: str) -> None:
        """Forget a schedule; its snapshots stay for good. Raises NotFound."""
        self.find(instance_id)
        self._context.records.drop_schedule(instance_id)
        self.wake()

    async def run(self, instance_id: str) -> Schedule:
        """Take the schedule's snapshot now, paused or not, then apply its retention.

        Raises NotFound and what a snapshot raises, which the schedule records too.
        """
        self.find(instance_id)
        async with self._turn_with(instance_id):
            return await self._run(self._begin(self.find(instance_id)))

    @contextlib.asynccontextmanager
    async def _turn_with(self, instance_id: str) -> AsyncIterator[None]:
        """The turn, when no verb is at work on the instance: others do not wait for its end."""
        while True:
            await self._context.at_rest(instance_id)
            async with self._turn:
                if not self._context.held(instance_id):
                    yield
                    return

    # -- the task -----------------------------------------------------------------------------
    def start(self) -> None:
        """Settle runs that an earlier server did not finish, then look after what is due."""
        records, now = self._context.records, self._context.now()
        self.clock.begin(_newest_time(records, now), records.clock)
        self._time_kept = self.clock.steady()
        if (believed := self.clock.read()) < now - PATIENCE:
            log.warning("the last time known is %s: what expires waits for up to a day", believed)
        for schedule in list(self._context.records.schedules.values()):
            if schedule.pending is not None:
                self._settle(schedule)
        self._context.spawn(self._watch(), name="scheduler")

    def close(self) -> None:
        """Keep the believed time for the next server. Does nothing unless started."""
        if self._time_kept is not None:
            self._keep_time()
            self._time_kept = None

    def _keep_time(self) -> None:
        # An idle server writes no records: those alone would make every restart a leap.
        self._time_kept = self.clock.steady()
        self._context.records.put_clock(self.clock.reading())

    def wake(self) -> None:
        """Look again at what is due: a schedule or an expiry has changed."""
        self._changed.set()

    async def settled(self) -> None:
        """Return when nothing that was started is under way any more."""
        while self._work:
            await asyncio.wait(self._work.values())

    async def _watch(self) -> None:
        while not self._context.closing:
            self._changed.clear()
            sleep: float | None = _LONGEST_SLEEP
            try:
                sleep = self.tick()
            except Exception:  # whatever it is, the other schedules must go on
                log.exception("the scheduler failed; it goes on")
            try:
                async with asyncio.timeout(_KEEP_TIME_EVERY if sleep is None else sleep):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def tick(self) -> float | None:
        """Start everything that is due; seconds until the next look, None if nothing is to come."""
        records, now = self._context.records, self._context.now()
        believed = self.clock.read()
        gone_back: int | None = self.clock.times_gone_back
        went_back = self._times_gone_back != gone_back
        if self._time_kept is not None and (
            self.clock.steady() - self._time_kept >= _KEEP_TIME_EVERY
        ):
            self._keep_time()
        waits: list[timedelta] = []
        for schedule in list(records.schedules.values()):
            try:
                if schedule.instance_id not in records.instances:
                    due = retain.due_without_instance(self._context, schedule, believed)
                    self._at(schedule.instance_id, due, believed, self._retain, waits)
                elif not schedule.paused:
                    due = self._set_anew(schedule, now) if went_back else schedule.next_run_at
                    self._at(schedule.instance_id, due, now, self._run_due, waits)
            except Exception:  # whatever it is, the other schedules must go on
                log.exception("the schedule of %s cannot be looked at", schedule.instance_id)
                gone_back = self._times_gone_back  # for this one it is still to be set anew
                waits.append(timedelta(seconds=_LONGEST_SLEEP))
        self._times_gone_back = gone_back
        for snapshot in list(records.snapshots.values()):
            if snapshot.expires_at is not None and not snapshot.pinned:
                self._at(snapshot.id, snapshot.expires_at, believed, self._expire, waits)
        for instance in list(records.instances.values()):
            # One that is still being made is looked at again when it is.
            if instance.expires_at is not None and instance.state is not InstanceState.CREATED:
                end = partial(self._expire_instance, instance.id)
                self._at(f"end of {instance.id}", instance.expires_at, believed, end, waits)
        if not waits:
            return None
        return min(max(min(waits).total_seconds(), _SHORTEST_SLEEP), _LONGEST_SLEEP)

    def _at(
        self,
        key: str,
        due: datetime,
        now: datetime,
        work: Callable[[str], Coroutine[Any, Any, None]],
        waits: list[timedelta],
    ) -> None:
        """Start ``work(key)`` if it is due and not under way, else note how long until then."""
        if key in self._work:
            return
        if due > now:
            waits.append(due - now)
            return
        rest = self._not_before.get(key, 0.0) - self.clock.steady()
        if rest > 0:
            waits.append(timedelta(seconds=rest))
            return
        self._start(key, work)

    def _start(self, key: str, work: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        task = self._context.spawn(self._supervised(key, work), name=f"scheduled {key}")
        self._work[key] = task
        task.add_done_callback(lambda _: self._ended(key))

    async def _supervised(self, key: str, work: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        self._not_before.pop(key, None)
        rest = self._rests.pop(key, 0.0)
        try:
            await work(key)
        except Exception:
            self._rests[key] = min(2 * rest or _FIRST_REST, _LONGEST_REST)
            self._not_before[key] = self.clock.steady() + self._rests[key]
            raise

    def _ended(self, key: str) -> None:
        self._work.pop(key, None)
        self.wake()

    # -- work ---------------------------------------------------------------------------------
    async def _expire(self, snapshot_id: str) -> None:
        snapshot = self._context.records.snapshots.get(snapshot_id)
        expiry = None if snapshot is None else snapshot.expires_at
        if expiry is not None and expiry <= self.clock.read():
            log.info("snapshot %s has expired", snapshot_id)
            await retain.delete_quietly(self._context, snapshot_id)

    async def _expire_instance(self, instance_id: str, _: str) -> None:
        def expired(instance: Instance) -> bool:
            """Asked in its turn: what was under way before may have given it longer."""
            return instance.expires_at is not None and instance.expires_at <= self.clock.read()

        log.info("instance %s has come to its end", instance_id)
        with contextlib.suppress(NotFound):  # somebody was faster
            await stop.delete(self._context, instance_id, only_if=expired)

    async def _retain(self, instance_id: str) -> None:
        """Apply the retention of a schedule whose instance is gone; end it when all is done."""
        schedule = self._context.records.schedules.get(instance_id)
        if schedule is not None:
            await retain.prune(self._context, instance_id, self.clock.read)
            if retain.is_finished(self._context, schedule, self.clock.read()):
                self._context.records.drop_schedule(instance_id)

    async def _run_due(self, instance_id: str) -> None:
        async with self._turn_with(instance_id):
            schedule = self._context.records.schedules.get(instance_id)
            if schedule is None or schedule.paused or schedule.next_run_at > self._context.now():
                return  # changed, or run by hand, while it waited for its turn
            begun = self._begin(schedule)
            try:
                await self._run(begun)
            except StillframeError as error:  # it is recorded with the schedule
                log.warning("scheduled snapshot of %s: %s", instance_id, error)

    async def _run(self, schedule: Schedule) -> Schedule:
        """The run that ``_begin`` committed to; see the module's text for the order."""
        try:
            taken = await self._take(schedule)
        except StillframeError as error:
            self._finish(schedule, error=error.message)
            raise
        except Exception:
            self._finish(schedule, error="an unforeseen error; the server's log has it")
            raise
        return await self._complete(schedule, taken.id)

    async def _complete(self, schedule: Schedule, snapshot_id: str) -> Schedule:
        """The rest of a run whose snapshot is there: retention, then the record."""
        failure: str | None = None
        try:
            await retain.prune(self._context, schedule.instance_id, self.clock.read)
        except StillframeError as error:
            failure = f"retention: {error.message}"
        return self._finish(schedule, snapshot_id=snapshot_id, error=failure)

    def _begin(self, schedule: Schedule) -> Schedule:
        now, records = self._context.now(), self._context.records
        source = schedule.instance_id
        taken = frozenset(
            s.name for s in records.snapshots.values() if s.source_instance_id == source and s.name
        )
        overdue = schedule.next_run_at <= now
        begun = replace(
            schedule,
            last_run_at=now,
            last_snapshot_id=None,
            last_error=None,
            pending=snapshot_name(schedule.name_prefix, now, taken),
            next_run_at=next_slot(schedule, now) if overdue else schedule.next_run_at,
        )
        records.put_schedule(begun)
        return begun

    async def _take(self, schedule: Schedule) -> Snapshot:
        try:
            return await self._capture(schedule)
        except (InsufficientResources, StorageFull):
            # What retention would delete anyway must not stand in the way.
            if not await retain.prune(self._context, schedule.instance_id, self.clock.read):
                raise
            return await self._capture(schedule)

    async def _capture(self, schedule: Schedule) -> Snapshot:
        instance = self._context.instance(schedule.instance_id)
        return await taking.snapshot(
            self._context,
            instance.id,
            kind=_kind_for(instance),
            name=schedule.pending,
            tags={**schedule.metadata, **marks(instance.id)},
        )

    def _finish(
        self, schedule: Schedule, *, snapshot_id: str | None = None, error: str | None = None
    ) -> Schedule:
        """Write what became of a run into the schedule, as it is by now; gone stays gone."""
        current = self._context.records.schedules.get(schedule.instance_id)
        finished = replace(
            current or schedule,
            pending=None,
            interrupted=0,
            last_snapshot_id=snapshot_id,
            last_error=error,
        )
        if current is not None:
            self._context.records.put_schedule(finished, can_wait=True)  # it has happened
        return finished

    def _settle(self, schedule: Schedule) -> None:
        """Decide on a run that the end of a server cut off: done, to be made up for, or lost."""
        taken = next(
            (
                s
                for s in retain.own_snapshots(self._context, schedule)
                if s.name == schedule.pending
            ),
            None,
        )
        if taken is not None:
            key, found = schedule.instance_id, taken.id

            async def complete(_: str) -> None:
                async with self._turn:
                    await self._complete(schedule, found)

            self._start(key, complete)
            return
        first = schedule.interrupted == 0
        settled = replace(
            schedule,
            pending=None,
            last_error=_INTERRUPTED,
            interrupted=schedule.interrupted + 1,
            # Only once: if it is the run that ends the server, it must not do so for ever.
            next_run_at=self._context.now() if first else schedule.next_run_at,
        )
        # A full disk must not keep a server from starting; the run's own commit says it again.
        self._context.records.put_schedule(settled, can_wait=True)

    def _set_anew(self, schedule: Schedule, now: datetime) -> datetime:
        """The next run after the clock went back: else it would be as far off as that was."""
        if schedule.next_run_at <= latest_plausible(schedule, now):
            return schedule.next_run_at
        anew = replace(schedule, next_run_at=next_slot(schedule, now))
        # It can wait: a server that never read it finds out by its own first look.
        self._context.records.put_schedule(anew, can_wait=True)
        return anew.next_run_at


def _newest_time(records: Records, now: datetime) -> datetime | None:
    """The latest moment at which anything recorded has happened, by a clock that says ``now``."""
    times = [snapshot.created_at for snapshot in records.snapshots.values()]
    for instance in records.instances.values():
        lived = (instance.created_at, instance.phase_since, instance.resumed_at)
        times += [moment for moment in lived if moment is not None]
    for schedule in records.schedules.values():
        times += [schedule.last_run_at or schedule.updated_at, schedule.updated_at]
    # What is yet to come was told by an archive, or by a clock that was set right since.
    return max((moment for moment in times if moment - now <= PATIENCE), default=None)


def _kind_for(instance: Instance) -> SnapshotKind:
    kind = _KINDS.get(instance.state)
    if kind is None:
        raise Conflict(
            f"a snapshot cannot be taken while the instance is {instance.state.value}",
            state=instance.state.value,
        )
    return kind
