"""Schedules and expiry on the fake hypervisor, by a clock that the scenarios set."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest
from stillframe.engine.keeping import retain
from stillframe.engine.verbs import snapshot as taking
from stillframe.model.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    StorageFull,
    VmmFailure,
)
from stillframe.model.retention import Retention
from stillframe.model.schedules import ScheduleRequest, check_cron
from stillframe.model.states import InstanceState
from stillframe.model.values import Snapshot, SnapshotKind
from support.clock import DAY, HOUR, MINUTE, START, SetClock, look, stopped
from support.engine import make_engine, open_engine, running

pytestmark = pytest.mark.usefixtures("clock", "vms_end")

HOURLY = ScheduleRequest(Retention(max_count=3), interval=HOUR)


def names(engine: Engine) -> list[str | None]:
    return [snapshot.name for snapshot in engine.context.records.snapshots.values()]


# -- rhythm -----------------------------------------------------------------------------------
async def test_runs_stand_on_the_grid_and_retention_follows(
    engine: Engine, clock: SetClock
) -> None:
    source = await stopped(engine)
    schedule = engine.set_schedule(
        source.id,
        ScheduleRequest(
            Retention(max_count=2), interval=HOUR, name_prefix="nightly", metadata={"team": "a"}
        ),
    )
    assert (schedule.next_run_at, schedule.last_run_at) == (START + HOUR, None)
    assert await look(engine) == []
    clock.go_on(HOUR + 5 * MINUTE)
    (first,) = await look(engine)
    assert first.kind is SnapshotKind.STOPPED
    assert first.name == "nightly-20300101-130500"
    assert first.tags == {
        "team": "a", "hypeman.scheduled": "true", "hypeman.schedule_instance_id": source.id,
    }  # fmt: skip
    after = engine.find_schedule(source.id)
    assert after.next_run_at == START + 2 * HOUR
    assert (after.last_run_at, after.last_snapshot_id) == (clock.wall, first.id)
    for _ in range(2):
        clock.go_on(HOUR)
        await look(engine)
    assert names(engine) == ["nightly-20300101-140500", "nightly-20300101-150500"]


async def test_many_missed_runs_are_made_up_for_by_one(engine: Engine, clock: SetClock) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, HOURLY)
    clock.go_on(7 * HOUR + 20 * MINUTE)
    assert len(await look(engine)) == 1
    assert len(await look(engine)) == 1
    assert engine.find_schedule(source.id).next_run_at == START + 8 * HOUR


async def test_a_schedule_by_cron_runs_when_it_says(engine: Engine, clock: SetClock) -> None:
    source = await stopped(engine)
    wanted = ScheduleRequest(Retention(max_count=5), cron="30 3 * * *")
    schedule = engine.set_schedule(source.id, wanted)
    assert schedule.next_run_at == START.replace(day=2, hour=3, minute=30)
    clock.go_on(schedule.next_run_at - clock.wall)
    (taken,) = await look(engine)
    assert taken.name == "scheduled-20300102-033000"
    assert engine.find_schedule(source.id).next_run_at == schedule.next_run_at + DAY


async def test_a_running_source_is_captured_and_runs_on(engine: Engine, clock: SetClock) -> None:
    source = await running(engine)
    engine.set_schedule(source.id, HOURLY)
    clock.go_on(HOUR)
    (taken,) = await look(engine)
    assert taken.kind is SnapshotKind.STANDBY
    assert engine.find_instance(source.id).state is InstanceState.RUNNING
    await engine.standby(source.id)
    clock.go_on(HOUR)
    await look(engine)
    assert [s.kind.value for s in engine.list_snapshots()] == ["Standby", "Standby"]


async def test_the_task_itself_wakes_when_a_schedule_is_set(
    engine: Engine, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is polled: with nothing to come the scheduler sleeps without an end."""
    source = await stopped(engine)
    assert engine.scheduler.tick() is None
    finished = asyncio.Event()
    finish = engine.scheduler._finish

    def seen(*arguments: Any, **options: Any) -> Any:
        finished.set()
        return finish(*arguments, **options)

    monkeypatch.setattr(engine.scheduler, "_finish", seen)
    engine.set_schedule(source.id, HOURLY)
    clock.go_on(HOUR)
    engine.scheduler.wake()
    async with asyncio.timeout(30):
        await finished.wait()
    await engine.scheduler.settled()
    assert len(engine.list_snapshots()) == 1


async def test_setting_it_again_keeps_the_rhythm_and_a_new_interval_starts_one(
    engine: Engine, clock: SetClock
) -> None:
    source = await stopped(engine)
    made = engine.set_schedule(source.id, HOURLY)
    clock.go_on(20 * MINUTE)
    again = engine.set_schedule(source.id, replace(HOURLY, metadata={"a": "b"}))
    assert (again.next_run_at, again.created_at) == (made.next_run_at, made.created_at)
    assert again.updated_at == clock.wall
    faster = engine.set_schedule(source.id, replace(HOURLY, interval=10 * MINUTE))
    assert faster.next_run_at == clock.wall + 10 * MINUTE


async def test_a_paused_schedule_rests_and_makes_up_for_nothing(
    engine: Engine, clock: SetClock
) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, replace(HOURLY, paused=True))
    clock.go_on(3 * HOUR + MINUTE)
    assert await look(engine) == []
    assert engine.find_schedule(source.id).next_run_at == START + 4 * HOUR
    by_hand = await engine.run_schedule(source.id)
    assert by_hand.last_snapshot_id == engine.list_snapshots()[0].id
    engine.set_schedule(source.id, HOURLY)
    assert len(await look(engine)) == 1
    clock.go_on(HOUR)
    assert len(await look(engine)) == 2


async def test_two_runs_of_one_second_have_names_of_their_own(engine: Engine) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, replace(HOURLY, name_prefix="x" * 47))
    for _ in range(3):
        await engine.run_schedule(source.id)
    stamp = "20300101-120000"
    assert names(engine) == [f"{'x' * 47}-{stamp}", f"s-{stamp}-2", f"s-{stamp}-3"]


# -- retention --------------------------------------------------------------------------------
async def test_only_the_schedule_s_own_snapshots_are_subject_to_retention(
    engine: Engine, clock: SetClock
) -> None:
    source, other = await stopped(engine), await stopped(engine, "other")
    by_hand = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED, name="by-hand")
    marked = {"hypeman.scheduled": "true", "hypeman.schedule_instance_id": source.id}
    stranger = await engine.snapshot(other.id, kind=SnapshotKind.STOPPED, tags=marked)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=1)))
    first = (await engine.run_schedule(source.id)).last_snapshot_id
    assert first is not None
    engine.edit_snapshot(first, {"pinned": True})
    second = (await engine.run_schedule(source.id)).last_snapshot_id
    assert second is not None
    engine.edit_snapshot(second, {"tags": {"kept": "by taking the marks off"}})
    for _ in range(3):
        last = (await engine.run_schedule(source.id)).last_snapshot_id
    assert set(engine.context.records.snapshots) == {by_hand.id, stranger.id, first, second, last}


async def test_retention_is_explained_before_it_happens(engine: Engine, clock: SetClock) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(keep_last=9)))
    for _ in range(3):
        clock.go_on(HOUR)
        await look(engine)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=1)))
    plan = await engine.explain_retention(source.id)
    assert [line.keep for line in plan.lines] == [False, False, True]
    assert plan.lines[0].reasons == ("number 3, beyond max_count 1",)
    assert plan.bytes_freed == sum(line.bytes_freed for line in plan.lines[:2]) > 0
    assert len(engine.list_snapshots()) == 3


async def test_retention_gives_room_to_a_run_that_finds_none(
    engine: Engine, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_age=90 * MINUTE)))
    monkeypatch.setattr(
        engine.context, "settings", replace(engine.context.settings, max_snapshots=2)
    )
    for _ in range(2):
        await engine.run_schedule(source.id)
    with pytest.raises(Conflict) as caught:
        await engine.run_schedule(source.id)
    assert caught.value.code == "insufficient_resources"
    assert engine.find_schedule(source.id).last_error == caught.value.message
    clock.go_on(2 * HOUR)
    assert (await engine.run_schedule(source.id)).last_error is None
    assert len(engine.list_snapshots()) == 1


async def test_a_schedule_outlives_its_instance_until_its_last_snapshot_is_gone(
    engine: Engine, clock: SetClock
) -> None:
    source = await stopped(engine)
    rules = Retention(max_age=3 * HOUR)
    engine.set_schedule(source.id, replace(HOURLY, retention=rules))
    for _ in range(2):
        clock.go_on(HOUR)
        await look(engine)
    await engine.delete(source.id)
    with pytest.raises(NotFound):
        engine.find_schedule(source.id)
    clock.go_on(2 * HOUR)
    assert [s.name for s in await look(engine)] == ["scheduled-20300101-140000"]
    assert list(engine.context.records.schedules) == [source.id]
    clock.go_on(2 * HOUR)
    assert await look(engine) == []
    assert engine.context.records.schedules == {}
    assert engine.scheduler.tick() is None


async def test_a_schedule_that_only_counts_goes_with_its_instance(
    engine: Engine, clock: SetClock
) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, HOURLY)
    await engine.run_schedule(source.id)
    await engine.delete(source.id)
    assert len(await look(engine)) == 1
    assert engine.context.records.schedules == {}


# -- failures ---------------------------------------------------------------------------------
async def test_a_failed_run_is_recorded_and_the_next_one_comes(
    engine: Engine, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = await stopped(engine), await stopped(engine, "other")
    for instance in (source, other):
        engine.set_schedule(instance.id, HOURLY)
    real = taking.snapshot

    async def fails_for_source(context: Any, instance_id: str, **options: Any) -> Snapshot:
        if instance_id == source.id:
            raise VmmFailure("the VMM refuses")
        return await real(context, instance_id, **options)

    monkeypatch.setattr(taking, "snapshot", fails_for_source)
    clock.go_on(HOUR)
    assert [s.source_instance_id for s in await look(engine)] == [other.id]
    failed = engine.find_schedule(source.id)
    assert (failed.last_error, failed.last_snapshot_id) == ("the VMM refuses", None)
    assert (failed.last_run_at, failed.next_run_at) == (START + HOUR, START + 2 * HOUR)
    monkeypatch.undo()
    clock.go_on(HOUR)
    await look(engine)
    assert engine.find_schedule(source.id).last_error is None
    assert len(engine.list_snapshots(source_instance_id=source.id)) == 1


async def test_a_run_in_a_state_without_snapshots_says_so(engine: Engine, clock: SetClock) -> None:
    source = await engine.create(CreateRequest("booting", "stillframe/base"))
    engine.context.records.instances[source.id] = replace(source, state=InstanceState.SHUTDOWN)
    engine.set_schedule(source.id, HOURLY)
    with pytest.raises(Conflict, match="Shutdown"):
        await engine.run_schedule(source.id)
    assert "Shutdown" in (engine.find_schedule(source.id).last_error or "")


async def test_a_schedule_changed_or_deleted_during_its_run_stays_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, HOURLY)
    real = taking.snapshot

    async def changed_meanwhile(*arguments: Any, **options: Any) -> Snapshot:
        taken = await real(*arguments, **options)
        engine.set_schedule(source.id, replace(HOURLY, metadata={"new": "yes"}))
        return taken

    async def deleted_meanwhile(*arguments: Any, **options: Any) -> Snapshot:
        taken = await real(*arguments, **options)
        engine.delete_schedule(source.id)
        return taken

    monkeypatch.setattr(taking, "snapshot", changed_meanwhile)
    done = await engine.run_schedule(source.id)
    assert (done.metadata, done.pending) == ({"new": "yes"}, None)
    assert done.last_snapshot_id is not None
    monkeypatch.setattr(taking, "snapshot", deleted_meanwhile)
    await engine.run_schedule(source.id)
    assert engine.context.records.schedules == {}


async def test_a_record_that_cannot_be_written_is_tried_again_later_not_at_once(
    engine: Engine, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, HOURLY)
    clock.go_on(HOUR)
    tries = []

    def full(schedule: object) -> None:
        tries.append(schedule)
        raise StorageFull("no space left")

    monkeypatch.setattr(engine.context.records, "put_schedule", full)
    second = timedelta(seconds=1)
    for waited, tried in ((0, 1), (0, 1), (1, 2), (1, 2), (1, 3), (3, 3), (1, 4)):
        clock.go_on(waited * second)  # twice as long after each failure
        await look(engine)
        assert len(tries) == tried
    monkeypatch.undo()
    clock.go_on(MINUTE)
    assert len(await look(engine)) == 1


@pytest.mark.parametrize(
    "wanted",
    [
        ScheduleRequest(Retention(max_count=1)),
        ScheduleRequest(Retention(max_count=1), interval=HOUR, cron="@daily"),
        ScheduleRequest(Retention(max_count=1), interval=timedelta(seconds=59)),
        ScheduleRequest(Retention(), interval=HOUR),
        ScheduleRequest(Retention(max_count=1), interval=HOUR, name_prefix="x" * 48),
        ScheduleRequest(Retention(max_count=1), interval=HOUR, name_prefix="Not Good"),
        ScheduleRequest(
            Retention(max_count=1), interval=HOUR, metadata={f"k{n}": "" for n in range(51)}
        ),
    ],
)
async def test_a_wish_that_cannot_be_kept_is_refused(
    engine: Engine, wanted: ScheduleRequest
) -> None:
    source = await engine.create(CreateRequest("source", "stillframe/base"))
    with pytest.raises(InvalidRequest):
        engine.set_schedule(source.id, wanted)
    assert engine.context.records.schedules == {}


@pytest.mark.parametrize(
    "text",
    ["", "* * * *", "* * * * * *", "60 * * * *", "0 0 30 2 *", "R * * * *", "H 3 * * *", "@reboot",
     "*/0 * * * *", "a b c d e", "* " * 200, "1-99999999 * * * *"],
)  # fmt: skip
def test_a_cron_expression_must_name_times_that_come(text: str) -> None:
    with pytest.raises(InvalidRequest, match="cron"):
        check_cron(text)


# -- restarts and crashes ---------------------------------------------------------------------
async def test_times_survive_a_restart_and_one_missed_run_is_made_up_for(
    tmp_path: Path, clock: SetClock
) -> None:
    engine = make_engine(tmp_path)
    clock.rule(engine)
    await engine.open()
    source = await stopped(engine)
    schedule = engine.set_schedule(source.id, HOURLY)
    await engine.close()
    clock.go_on(5 * HOUR + MINUTE)
    again = make_engine(tmp_path)
    clock.rule(again)
    await again.open()
    try:
        assert again.context.records.schedules == {source.id: schedule}
        assert len(await look(again)) == 1
        assert again.find_schedule(source.id).next_run_at == START + 6 * HOUR
    finally:
        await again.close()


class CrashError(BaseException):
    """Stands for kill -9: no clean-up of ours may run."""


@pytest.mark.parametrize("step", ["snapshot", "put_snapshot", "finish", "prune", "first deletion"])
async def test_a_crash_anywhere_in_a_run_is_harmless(
    tmp_path: Path, clock: SetClock, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """F23: at most one run is repeated, none is lost, and the next one prunes."""
    engine = make_engine(tmp_path)
    clock.rule(engine)
    await engine.open()
    source = await stopped(engine)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=1)))
    await engine.run_schedule(source.id)
    clock.go_on(HOUR)

    def crash(*_: object, **__: object) -> Any:
        raise CrashError

    async def leave(_: Path) -> None:
        """A dead server cleans nothing up."""

    records = engine.context.records
    monkeypatch.setattr(taking, "remove", leave)
    monkeypatch.setattr(taking, "remove_tree", lambda _: None)
    monkeypatch.setattr(records, "fulfil", lambda _: None)
    where: dict[str, tuple[object, str]] = {
        "snapshot": (taking, "_fill"), "put_snapshot": (records, "put_snapshot"),
        "finish": (engine.scheduler, "_finish"), "prune": (retain, "prune"),
        "first deletion": (taking, "remove_tree"),
    }  # fmt: skip
    target, name = where[step]
    monkeypatch.setattr(target, name, crash)
    with pytest.raises(CrashError):
        await engine.run_schedule(source.id)
    await engine.close()
    monkeypatch.undo()
    again = make_engine(tmp_path)
    clock.rule(again)
    await again.open()
    try:
        await look(again)
        schedule = again.find_schedule(source.id)
        newest = list(again.context.records.snapshots.values())[-1]
        assert (schedule.pending, schedule.last_snapshot_id) == (None, newest.id)
        assert newest.created_at == START + HOUR
        assert (await again.run_schedule(source.id)).last_error is None
        assert len(again.list_snapshots()) == 1
        assert len(list((tmp_path / "snapshots").iterdir())) == 1
        assert again.context.records.intents == {}
    finally:
        await again.close()


async def test_a_run_that_ends_the_server_twice_is_not_tried_for_ever(
    tmp_path: Path, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F24: the second server dies of the same run during its start."""

    def crash(*_: object, **__: object) -> Any:
        raise CrashError

    engine = make_engine(tmp_path)
    clock.rule(engine)
    await engine.open()
    source = await stopped(engine)
    engine.set_schedule(source.id, HOURLY)
    clock.go_on(HOUR)
    tried = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(taking, "snapshot", crash)
            with pytest.raises(CrashError):
                await engine.scheduler._run_due(source.id)
        tried.append(engine.context.records.schedules[source.id].pending)
        await engine.close()
        engine = make_engine(tmp_path)
        clock.rule(engine)
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "tick", lambda: None)  # it dies before it acts
            await engine.open()
    assert tried == ["scheduled-20300101-130000"] * 2
    try:
        assert await look(engine) == []
        lost = engine.find_schedule(source.id)
        assert (lost.last_error, lost.next_run_at) == (
            "the server ended during the run", START + 2 * HOUR
        )  # fmt: skip
        clock.go_on(HOUR)
        assert len(await look(engine)) == 1
        assert engine.find_schedule(source.id).interrupted == 0
    finally:
        await engine.close()


async def test_nothing_of_it_is_left_in_the_way_of_closing(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        source = await stopped(engine)
        engine.set_schedule(source.id, HOURLY)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("sched")]
