"""Schedules and expiry when the clock leaps, and beside forks of the same snapshots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping.clock import PATIENCE, BelievedClock
from stillframe.model.errors import NotFound, StorageFull
from stillframe.model.retention import Retention
from stillframe.model.schedules import Schedule, ScheduleRequest
from stillframe.model.states import InstanceState
from stillframe.model.values import Snapshot, SnapshotKind
from stillframe.store.records import Records
from support.clock import DAY, HOUR, MINUTE, START, SetClock, look, stopped
from support.engine import make_engine, open_engine, running

pytestmark = pytest.mark.usefixtures("clock", "vms_end")

HOURLY = ScheduleRequest(Retention(max_count=3), interval=HOUR)


@contextlib.contextmanager
def full() -> Iterator[Any]:
    raise StorageFull("the records could not be written")
    yield


async def test_an_expired_snapshot_goes_and_a_pinned_one_stays(
    engine: Engine, clock: SetClock
) -> None:
    source = await stopped(engine)
    take = engine.snapshot
    brief, pinned, lasting = [
        await take(source.id, kind=SnapshotKind.STOPPED, name=name)
        for name in ("brief", "pinned", "lasting")
    ]
    for snapshot in (brief, pinned):
        engine.edit_snapshot(snapshot.id, {"expires_at": START + HOUR})
    engine.edit_snapshot(pinned.id, {"pinned": True})
    clock.go_on(HOUR - MINUTE)
    assert len(await look(engine)) == 3
    clock.go_on(MINUTE)
    assert [s.id for s in await look(engine)] == [pinned.id, lasting.id]
    engine.edit_snapshot(pinned.id, {"pinned": False})
    assert [s.id for s in await look(engine)] == [lasting.id]


async def test_a_leap_of_a_day_forward_deletes_nothing_and_runs_once(
    engine: Engine, clock: SetClock
) -> None:
    """F35, forward: what would go by the new time stays until the clock has held to it."""
    source = await stopped(engine)
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)
    engine.edit_snapshot(taken.id, {"expires_at": START + 2 * HOUR})
    rules = Retention(max_age=5 * HOUR)
    engine.set_schedule(source.id, replace(HOURLY, retention=rules))
    first = (await engine.run_schedule(source.id)).last_snapshot_id
    await look(engine)
    clock.leap(DAY)
    assert len(await look(engine)) == 3
    assert engine.find_schedule(source.id).next_run_at == START + DAY + HOUR
    clock.leap(-DAY)
    assert {taken.id, first} <= {s.id for s in await look(engine)}
    clock.go_on(2 * HOUR)
    assert taken.id not in {s.id for s in await look(engine)}


async def test_a_leap_that_lasts_is_believed_after_a_day(engine: Engine, clock: SetClock) -> None:
    source = await stopped(engine)
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)
    engine.edit_snapshot(taken.id, {"expires_at": START + 10 * DAY})
    await look(engine)
    clock.leap(30 * DAY)
    for _ in range(23):
        assert len(await look(engine)) == 1
        clock.go_on(HOUR)
    clock.go_on(HOUR)
    assert await look(engine) == []


@pytest.mark.parametrize(("away", "left"), [(12 * HOUR, 0), (30 * DAY, 1)])
async def test_a_clock_far_ahead_at_the_start_is_believed_after_a_day(
    tmp_path: Path, clock: SetClock, away: timedelta, left: int
) -> None:
    """A host that boots in the future deletes nothing; one that was down for a night does."""
    first = make_engine(tmp_path)
    clock.rule(first)
    async with open_engine(tmp_path, first):
        source = await stopped(first)
        taken = await first.snapshot(source.id, kind=SnapshotKind.STOPPED)
        first.edit_snapshot(taken.id, {"expires_at": START + 10 * HOUR})
    clock.leap(away)
    second = make_engine(tmp_path)
    clock.rule(second)
    async with open_engine(tmp_path, second):
        assert len(await look(second)) == left
        clock.go_on(9 * HOUR)  # by the time that is believed it has not expired
        assert len(await look(second)) == left
        clock.go_on(15 * HOUR)
        assert await look(second) == []


async def one_day(
    tmp_path: Path, clock: SetClock, up: timedelta, *, killed: bool = False
) -> list[Snapshot]:
    """A server of which nothing is asked, up for a while of a day; the snapshots at its end."""
    engine = make_engine(tmp_path)
    clock.rule(engine)
    async with open_engine(tmp_path, engine):
        for _ in range(up // HOUR):
            clock.go_on(HOUR)
            left = await look(engine)
        if killed:  # then nobody says what time it is
            engine.scheduler.close = lambda: None  # type: ignore[method-assign]
    clock.go_on(DAY - up)
    return left


async def with_a_snapshot(tmp_path: Path, clock: SetClock, *, lives: timedelta) -> None:
    """A data directory with a snapshot that expires, whose server has been stopped."""
    engine = make_engine(tmp_path)
    clock.rule(engine)
    async with open_engine(tmp_path, engine):
        source = await stopped(engine)
        taken = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)
        engine.edit_snapshot(taken.id, {"expires_at": clock.wall + lives})


@pytest.mark.parametrize("killed", [False, True])
async def test_an_idle_server_that_is_restarted_daily_lets_snapshots_expire(
    tmp_path: Path, clock: SetClock, killed: bool
) -> None:
    await with_a_snapshot(tmp_path, clock, lives=70 * HOUR)
    left = [len(await one_day(tmp_path, clock, 23 * HOUR, killed=killed)) for _ in range(3)]
    assert left == [1, 1, 0]


async def test_patience_is_counted_over_restarts(tmp_path: Path, clock: SetClock) -> None:
    """A host that was away for a week and is up for eight hours a day needs three of them."""
    await with_a_snapshot(tmp_path, clock, lives=5 * DAY)
    clock.go_on(7 * DAY)
    assert [len(await one_day(tmp_path, clock, 8 * HOUR)) for _ in range(3)] == [1, 1, 0]


async def test_patience_begins_anew_when_the_clock_leaps_again(
    tmp_path: Path, clock: SetClock
) -> None:
    await with_a_snapshot(tmp_path, clock, lives=5 * DAY)
    for _ in range(4):
        clock.leap(30 * DAY)
        assert len(await one_day(tmp_path, clock, 8 * HOUR)) == 1


async def test_a_record_of_a_clock_that_had_leapt_is_not_believed_by_the_next_server(
    tmp_path: Path, clock: SetClock
) -> None:
    await with_a_snapshot(tmp_path, clock, lives=5 * DAY)
    first = make_engine(tmp_path)
    clock.rule(first)
    async with open_engine(tmp_path, first):
        await look(first)
        clock.leap(30 * DAY)
        (source,) = first.list_instances()
        await first.snapshot(source.id, kind=SnapshotKind.STOPPED)
        assert len(await look(first)) == 2
    second = make_engine(tmp_path)
    clock.rule(second)
    async with open_engine(tmp_path, second):
        assert len(await look(second)) == 2
        clock.leap(-30 * DAY)
        clock.go_on(5 * DAY)
        assert len(await look(second)) == 1


async def test_a_record_of_the_far_future_hides_no_leap_from_a_server_without_a_reading(
    tmp_path: Path, clock: SetClock
) -> None:
    """As an earlier version left it, which took the times of archives as they were told."""
    await with_a_snapshot(tmp_path, clock, lives=5 * DAY)
    records = Records(tmp_path / "stillframe.db")
    (snapshot,) = records.snapshots.values()
    records.update_snapshot(replace(snapshot, created_at=START.replace(year=2500)))
    with records.transaction() as sql:
        sql.execute("DELETE FROM clock")
    records.close()
    clock.leap(400 * DAY)
    assert len(await one_day(tmp_path, clock, 23 * HOUR)) == 1


async def test_the_time_is_kept_hourly_and_a_full_disk_does_no_harm(
    engine: Engine, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = engine.context.records
    clock.go_on(HOUR - MINUTE)
    await look(engine)
    assert records.clock is None
    with monkeypatch.context() as disk:
        disk.setattr(records, "transaction", full)
        clock.go_on(MINUTE)
        await look(engine)
        assert (records.clock, records._owed) == (None, [])
    clock.go_on(HOUR - MINUTE)
    await look(engine)
    assert records.clock is None
    clock.go_on(MINUTE)
    await look(engine)
    assert records.clock is not None
    assert records.clock.believed == records.clock.wall == clock.wall


async def test_a_leap_of_a_day_back_delays_no_run_by_a_day(engine: Engine, clock: SetClock) -> None:
    """F35, back: the next run is set anew, and the newest snapshot does not look the oldest."""
    source = await stopped(engine)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=2)))
    daily = await stopped(engine, "daily")
    by_cron = replace(HOURLY, interval=None, cron="0 3 * * *")
    engine.set_schedule(daily.id, by_cron)
    await engine.run_schedule(source.id)
    await engine.run_schedule(source.id)
    clock.leap(-DAY - 30 * MINUTE)
    await look(engine)
    assert engine.find_schedule(source.id).next_run_at == START - DAY
    assert engine.find_schedule(daily.id).next_run_at == START.replace(hour=3)
    clock.go_on(30 * MINUTE)
    await look(engine)
    last = engine.find_schedule(source.id).last_snapshot_id
    assert last in {s.id for s in engine.list_snapshots(source_instance_id=source.id)}
    names = [snapshot.name for snapshot in engine.context.records.snapshots.values()]
    assert names == ["scheduled-20300101-120000-2", "scheduled-20291231-120000"]


async def test_a_leap_back_on_a_full_disk_puts_no_run_off(
    engine: Engine, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await stopped(engine, "one"), await stopped(engine, "two")
    for source in (one, two):
        engine.set_schedule(source.id, HOURLY)
    await look(engine)
    clock.leap(-DAY)
    with monkeypatch.context() as disk:
        disk.setattr(engine.context.records, "transaction", full)
        await look(engine)
    for source in (one, two):
        assert engine.find_schedule(source.id).next_run_at == START - DAY + HOUR
    clock.go_on(HOUR)
    await look(engine)
    assert {s.source_instance_id for s in engine.list_snapshots()} == {one.id, two.id}


async def test_a_schedule_that_cannot_be_set_anew_holds_up_no_other_and_is_tried_again(
    engine: Engine, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await stopped(engine, "one"), await stopped(engine, "two")
    for source in (one, two):
        engine.set_schedule(source.id, HOURLY)
    await look(engine)
    set_anew = engine.scheduler._set_anew

    def but_not_one(schedule: Schedule, now: datetime) -> datetime:
        if schedule.instance_id == one.id:
            raise ValueError("not this one")
        return set_anew(schedule, now)

    clock.leap(-DAY)
    with monkeypatch.context() as spoilt:
        spoilt.setattr(engine.scheduler, "_set_anew", but_not_one)
        await look(engine)
    expected = START - DAY + HOUR
    assert engine.find_schedule(one.id).next_run_at == expected + DAY
    assert engine.find_schedule(two.id).next_run_at == expected
    await look(engine)
    assert engine.find_schedule(one.id).next_run_at == expected


async def test_a_clock_that_is_slewed_moves_no_run(engine: Engine, clock: SetClock) -> None:
    source = await stopped(engine)
    schedule = engine.set_schedule(source.id, HOURLY)
    for _ in range(5):
        clock.leap(-timedelta(seconds=1))
        await look(engine)
    assert engine.find_schedule(source.id).next_run_at == schedule.next_run_at


def test_the_believed_clock_follows_drift_and_holds_leaps_back() -> None:
    clock = SetClock()
    believed = BelievedClock(clock.now, clock.steady)
    assert believed.read() == START
    for _ in range(100):  # a minute too fast each hour is drift, also in the sum
        clock.go_on(HOUR)
        clock.leap(MINUTE)
        assert believed.read() == clock.wall
    clock.leap(3 * HOUR)
    before = clock.wall - 3 * HOUR
    assert believed.read() == before
    clock.go_on(PATIENCE / 2)
    clock.leap(HOUR)  # a second leap: its day begins anew
    assert believed.read() == before + PATIENCE / 2
    clock.go_on(PATIENCE - MINUTE)
    assert believed.read() < clock.wall
    clock.go_on(MINUTE)
    assert believed.read() == clock.wall
    clock.leap(-10 * DAY)
    assert believed.read() == clock.wall


async def test_deletion_by_expiry_waits_for_a_fork_under_way_and_holds_up_nothing(
    engine: Engine, clock: SetClock
) -> None:
    """F64: the snapshot is gone for newcomers at once, its files when the fork has them."""
    source = await stopped(engine)
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)
    engine.edit_snapshot(taken.id, {"expires_at": START + MINUTE})
    other = await stopped(engine, "other")
    engine.set_schedule(other.id, HOURLY)
    clock.go_on(HOUR)
    payload = engine.context.data.snapshot(taken.id).directory
    async with engine.context.using(taken.id):
        engine.scheduler.tick()
        while engine.find_schedule(other.id).last_snapshot_id is None:
            await asyncio.wait(engine.scheduler._work.values(), return_when="FIRST_COMPLETED")
        with pytest.raises(NotFound):
            engine.find_snapshot(taken.id)
        assert payload.exists()
    await engine.scheduler.settled()
    assert not payload.exists()


async def test_retention_and_forks_of_the_same_snapshots_do_not_hurt_each_other(
    engine: Engine, clock: SetClock
) -> None:
    """F64: a fork of a snapshot that retention deletes works, or finds none."""
    source = await running(engine)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=1)))
    for turn in range(5):
        done = await engine.run_schedule(source.id)
        assert done.last_snapshot_id is not None
        forked, ran = await asyncio.gather(
            engine.fork_snapshot(done.last_snapshot_id, ForkRequest(f"fork-{turn}")),
            engine.run_schedule(source.id),
            return_exceptions=True,
        )
        assert not isinstance(ran, BaseException)
        if isinstance(forked, BaseException):
            assert isinstance(forked, NotFound)
        else:
            assert forked.state is InstanceState.RUNNING
            await engine.delete(forked.id, graceful=False)
        assert len(engine.list_snapshots()) == 1
