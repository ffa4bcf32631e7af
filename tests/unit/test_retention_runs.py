"""Retention carried out: by the rules of the moment, and with damaged snapshots among the good."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stillframe.engine.context import Context
from stillframe.engine.engine import Engine
from stillframe.engine.keeping import retain
from stillframe.engine.keeping.edit import delete_snapshot
from stillframe.engine.verbs import snapshot as taking
from stillframe.model.errors import Conflict
from stillframe.model.retention import Retention
from stillframe.model.schedules import ScheduleRequest
from stillframe.model.values import Snapshot
from stillframe.model.verification import Depth
from support.clock import HOUR, SetClock, look, stopped
from support.payloads import flip

pytestmark = pytest.mark.usefixtures("clock", "vms_end")

HOURLY = ScheduleRequest(Retention(max_count=3), interval=HOUR)


@pytest.mark.parametrize("meanwhile", ["more allowed", "schedule deleted"])
async def test_retention_goes_by_the_rules_as_they_are_when_the_capture_is_done(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    source = await stopped(engine)
    generous = replace(HOURLY, retention=Retention(max_count=9))
    engine.set_schedule(source.id, generous)
    for _ in range(3):
        await engine.run_schedule(source.id)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=1)))
    real = taking.snapshot

    async def changed_meanwhile(*arguments: Any, **options: Any) -> Snapshot:
        taken = await real(*arguments, **options)
        if meanwhile == "more allowed":
            engine.set_schedule(source.id, generous)
        else:
            engine.delete_schedule(source.id)
        return taken

    monkeypatch.setattr(taking, "snapshot", changed_meanwhile)
    await engine.run_schedule(source.id)
    assert len(engine.list_snapshots()) == 4


@pytest.mark.parametrize("meanwhile", ["taken out", "pinned", "more allowed", "schedule deleted"])
async def test_what_changes_during_a_deletion_counts_for_the_next_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=9)))
    ids = [(await engine.run_schedule(source.id)).last_snapshot_id or "" for _ in range(3)]
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=1)))
    change: dict[str, Any] = {
        "taken out": lambda: engine.edit_snapshot(ids[1], {"tags": {"mine": "yes"}}),
        "pinned": lambda: engine.edit_snapshot(ids[1], {"pinned": True}),
        "more allowed": lambda: engine.set_schedule(source.id, HOURLY),
        "schedule deleted": lambda: engine.delete_schedule(source.id),
    }
    deleted: list[str] = []

    async def slow(context: Context, snapshot_id: str) -> None:
        deleted.append(snapshot_id)
        if len(deleted) == 1:
            change[meanwhile]()
        await delete_snapshot(context, snapshot_id)

    monkeypatch.setattr(retain, "delete_snapshot", slow)
    last = (await engine.run_schedule(source.id)).last_snapshot_id
    going = [ids[0], ids[2]] if meanwhile in ("taken out", "pinned") else [ids[0]]
    assert deleted == going
    assert {s.id for s in engine.list_snapshots()} == {*ids, last} - set(going)


async def test_a_deletion_that_is_refused_is_tried_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await stopped(engine)
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=9)))
    ids = [(await engine.run_schedule(source.id)).last_snapshot_id for _ in range(2)]
    engine.set_schedule(source.id, replace(HOURLY, retention=Retention(max_count=1)))
    tried = []

    async def refused(_: Context, snapshot_id: str) -> None:
        tried.append(snapshot_id)
        raise Conflict("not now")

    monkeypatch.setattr(retain, "delete_snapshot", refused)
    assert (await engine.run_schedule(source.id)).last_error is None
    assert tried == ids
    assert len(engine.list_snapshots()) == 3


async def test_a_damaged_snapshot_takes_no_place_and_stays_until_its_age_lets_it_go(
    engine: Engine, clock: SetClock
) -> None:
    source = await stopped(engine)
    rules = Retention(max_count=2, max_age=9 * HOUR)
    engine.set_schedule(source.id, replace(HOURLY, retention=rules))
    good, bad = [(await engine.run_schedule(source.id)).last_snapshot_id or "" for _ in range(2)]
    flip(engine.context.data.snapshot(bad).overlay, 0)
    assert (await engine.verify_snapshot(bad, Depth.FULL)).damage
    last = (await engine.run_schedule(source.id)).last_snapshot_id
    assert [snapshot.id for snapshot in engine.list_snapshots()] == [good, bad, last]
    lines = {line.snapshot.id: line for line in (await engine.explain_retention(source.id)).lines}
    assert lines[bad].keep
    assert lines[bad].reasons == ("damaged: it takes no place, and stays until max_age 9h0m0s",)
    assert "number 2" in lines[good].reasons[0]
    await engine.delete(source.id)
    clock.go_on(9 * HOUR)
    assert await look(engine) == []
