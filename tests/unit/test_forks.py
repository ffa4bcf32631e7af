"""Many forks at once, and forks that stand ready before anybody asks."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from stillframe.engine import loaded
from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest, WarmStatus
from stillframe.engine.verbs.warm import WarmFork
from stillframe.model.errors import Conflict, InvalidRequest, NotFound, VmmFailure
from stillframe.model.states import InstanceState
from stillframe.model.values import Snapshot, SnapshotKind
from support.engine import ask, make_engine, open_engine, running, traces

pytestmark = pytest.mark.usefixtures("vms_end")

LIVE, DISK = SnapshotKind.STANDBY, SnapshotKind.STOPPED


async def captured(engine: Engine) -> Snapshot:
    source = await running(engine)
    await ask(engine, source.id, "set", "who", "source")
    return await engine.snapshot(source.id, kind=LIVE)


async def ready(engine: Engine, snapshot_id: str, count: int) -> WarmStatus:
    """Wait until the ``count`` warm forks that were asked for stand ready."""
    async with asyncio.timeout(60):
        status = await engine.context.warm.settled(snapshot_id)
    assert (status.ready, status.limited_by) == (count, None)
    return status


# -- many at once ---------------------------------------------------------------------------------
async def test_many_forks_each_have_an_outcome_and_the_good_ones_stay(engine: Engine) -> None:
    snapshot = await captured(engine)
    requests = [
        ForkRequest("web-1", tags={"role": "first"}),
        ForkRequest("source"),  # taken
        ForkRequest("web-2", env={"MODE": "two"}),
        ForkRequest("Not A Name"),
        ForkRequest("web-3", InstanceState.STANDBY),
    ]
    outcomes = await engine.fork_many(snapshot.id, requests)
    assert [outcome.name for outcome in outcomes] == [request.name for request in requests]
    kinds = [type(outcome.error) if outcome.error else None for outcome in outcomes]
    assert kinds == [None, Conflict, None, InvalidRequest, None]
    first, _, second, _, third = (outcome.instance for outcome in outcomes)
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.state, third.state) == (InstanceState.RUNNING, InstanceState.STANDBY)
    assert dict(first.tags) == {"role": "first"}
    for fork in (first, second):
        assert await ask(engine, fork.id, "get", "who") == "source"
    assert {i.name for i in engine.list_instances()} == {"source", "web-1", "web-2", "web-3"}


async def test_a_forks_environment_is_seen_by_the_commands_it_runs(engine: Engine) -> None:
    snapshot = await captured(engine)
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork", env={"MODE": "two"}))
    assert fork.env["MODE"] == "two"
    assert await ask(engine, fork.id, "sh", "-c", "echo $MODE") == "two"


async def test_two_requests_for_one_name_in_one_call_make_one_fork(engine: Engine) -> None:
    snapshot = await captured(engine)
    outcomes = await engine.fork_many(snapshot.id, [ForkRequest("same"), ForkRequest("same")])
    assert sorted(outcome.error is None for outcome in outcomes) == [False, True]


async def test_forks_of_a_snapshot_that_is_not_there_are_refused(engine: Engine) -> None:
    with pytest.raises(NotFound):
        await engine.fork_many("a" * 24, [ForkRequest("fork")])


async def test_cancelling_many_forks_leaves_no_half_made_one(
    engine: Engine, tmp_path: Path
) -> None:
    snapshot = await captured(engine)
    before = traces(tmp_path)
    task = asyncio.create_task(
        engine.fork_many(snapshot.id, [ForkRequest(f"fork-{n}") for n in range(8)])
    )
    while len(engine.list_instances()) < 4:  # noqa: ASYNC110 - until some are under way
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    finished = [i for i in engine.list_instances() if i.state is InstanceState.RUNNING]
    for fork in finished:
        if fork.name != "source":
            await engine.delete(fork.id, graceful=False)
    assert sorted(traces(tmp_path)) == sorted(before)
    assert engine.context.records.intents == {}


# -- warm forks -----------------------------------------------------------------------------------
async def test_a_warm_fork_goes_on_from_the_snapshot_and_is_replaced(engine: Engine) -> None:
    snapshot = await captured(engine)
    assert (await engine.set_warm(snapshot.id, 2)).target == 2
    assert (await ready(engine, snapshot.id, 2)).memory_bytes > 0
    assert [i.name for i in engine.list_instances()] == ["source"]  # nobody sees them yet
    fork = await engine.fork_snapshot(
        snapshot.id, ForkRequest("fork", tags={"a": "b"}, env={"MODE": "warm"})
    )
    assert fork.state is InstanceState.RUNNING
    assert "load" not in fork.timings_ms  # that was done before it was asked for
    assert (fork.parent_snapshot_id, dict(fork.tags)) == (snapshot.id, {"a": "b"})
    assert await ask(engine, fork.id, "get", "who") == "source"
    assert await ask(engine, fork.id, "sh", "-c", "echo $MODE") == "warm"
    await ready(engine, snapshot.id, 2)
    again = await engine.snapshot(fork.id, kind=LIVE)
    child = await engine.fork_snapshot(again.id, ForkRequest("child"))
    assert await ask(engine, child.id, "get", "who") == "source"


async def test_more_forks_than_are_warm_are_made_all_the_same(engine: Engine) -> None:
    snapshot = await captured(engine)
    await engine.set_warm(snapshot.id, 2)
    await ready(engine, snapshot.id, 2)
    outcomes = await engine.fork_many(snapshot.id, [ForkRequest(f"fork-{n}") for n in range(5)])
    instances = [outcome.instance for outcome in outcomes if outcome.instance is not None]
    assert len(instances) == 5
    assert sum("load" not in instance.timings_ms for instance in instances) == 2
    for instance in instances:
        assert await ask(engine, instance.id, "get", "who") == "source"


async def test_turning_warm_off_ends_them_and_leaves_nothing(
    engine: Engine, tmp_path: Path
) -> None:
    snapshot = await captured(engine)
    before = traces(tmp_path)
    await engine.set_warm(snapshot.id, 3)
    await ready(engine, snapshot.id, 3)
    assert len(traces(tmp_path)) == len(before) + 6  # a directory and a process each
    status = await engine.set_warm(snapshot.id, 0)
    assert (status.target, status.ready) == (0, 0)
    assert sorted(traces(tmp_path)) == sorted(before)
    assert engine.context.records.intents == {}


async def test_deleting_the_snapshot_ends_its_warm_forks_and_not_the_real_ones(
    engine: Engine, tmp_path: Path
) -> None:
    snapshot = await captured(engine)
    await engine.set_warm(snapshot.id, 1)
    await ready(engine, snapshot.id, 1)
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    await ready(engine, snapshot.id, 1)
    await engine.delete_snapshot(snapshot.id)
    assert await ask(engine, fork.id, "get", "who") == "source"
    assert {i.id for i in engine.list_instances()} == {
        path.name for path in (tmp_path / "instances").iterdir()
    }


async def test_warm_forks_are_made_again_by_the_next_server(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        snapshot = await captured(engine)
        await engine.set_warm(snapshot.id, 1)
        await ready(engine, snapshot.id, 1)
    async with open_engine(tmp_path) as again:
        assert again.warm_status(snapshot.id).target == 1
        await ready(again, snapshot.id, 1)
        fork = await again.fork_snapshot(snapshot.id, ForkRequest("fork"))
        assert "load" not in fork.timings_ms


async def test_warm_forks_of_a_server_that_was_killed_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tmp_path)
    await engine.open()
    snapshot = await captured(engine)
    await engine.set_warm(snapshot.id, 1)
    await ready(engine, snapshot.id, 1)
    (left,) = (warm.machine.process.pid for warm in engine.context.warm.waiting())
    # A killed server ends nothing.
    monkeypatch.setattr(engine.context.warm, "close", engine.context.quiet)
    await engine.close()
    os.kill(left, 0)  # it is there still
    async with open_engine(tmp_path) as again:
        await ready(again, snapshot.id, 1)
        with pytest.raises(ProcessLookupError):
            os.kill(left, 0)
        assert len(list((tmp_path / "instances").iterdir())) == 2


async def test_a_warm_vmm_that_dies_is_replaced(engine: Engine) -> None:
    snapshot = await captured(engine)
    await engine.set_warm(snapshot.id, 1)
    await ready(engine, snapshot.id, 1)
    (first,) = engine.context.warm.waiting()
    os.kill(first.machine.process.pid, signal.SIGKILL)
    assert first.watch is not None
    await first.watch
    await ready(engine, snapshot.id, 1)
    assert engine.context.warm.waiting() != [first]
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    assert await ask(engine, fork.id, "get", "who") == "source"


async def test_the_memory_budget_limits_them_and_says_so(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    engine.context.settings = replace(engine.context.settings, warm_memory_bytes=1)
    async with open_engine(tmp_path, engine):
        snapshot = await captured(engine)
        await engine.set_warm(snapshot.id, 3)
        async with asyncio.timeout(60):
            status = await engine.context.warm.settled(snapshot.id)
        assert status.limited_by is not None
        assert "budget" in status.limited_by
        assert status.ready == 1  # the first tells what one needs


async def test_a_taken_name_costs_no_warm_fork(engine: Engine) -> None:
    snapshot = await captured(engine)
    await engine.set_warm(snapshot.id, 1)
    await ready(engine, snapshot.id, 1)
    with pytest.raises(Conflict):
        await engine.fork_snapshot(snapshot.id, ForkRequest("source"))
    assert engine.warm_status(snapshot.id).ready == 1


async def test_what_cannot_be_kept_warm_is_refused(engine: Engine) -> None:
    snapshot = await captured(engine)
    for count in (-1, 1001):
        with pytest.raises(InvalidRequest):
            await engine.set_warm(snapshot.id, count)
    (source,) = engine.list_instances()
    await engine.stop(source.id)
    disk = await engine.snapshot(source.id, kind=DISK)
    with pytest.raises(InvalidRequest, match="memory"):
        await engine.set_warm(disk.id, 1)
    with pytest.raises(NotFound):
        await engine.set_warm("a" * 24, 1)


async def test_a_warm_fork_that_cannot_run_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = await captured(engine)
    before = traces(tmp_path)
    await engine.set_warm(snapshot.id, 1)
    await ready(engine, snapshot.id, 1)

    async def refused(*_: object, **__: object) -> None:
        raise VmmFailure("the VMM refuses")

    monkeypatch.setattr(loaded, "let_run", refused)
    monkeypatch.setattr("stillframe.engine.verbs.warm.let_run", refused)
    with pytest.raises(VmmFailure):
        await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    monkeypatch.undo()
    await engine.set_warm(snapshot.id, 0)
    assert sorted(traces(tmp_path)) == sorted(before)
    assert engine.context.records.intents == {}


async def test_a_failure_to_keep_one_warm_is_tried_again_and_ends_nobody_elses(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = await captured(engine)
    other = await engine.snapshot(snapshot.source_instance_id, kind=LIVE)
    warm, make = engine.context.warm, engine.context.warm._make
    tries: list[str] = []

    async def fails_twice(wanted: Snapshot) -> WarmFork:
        if wanted.id == snapshot.id and len(tries) < 2:
            tries.append(wanted.id)
            raise (
                VmmFailure("the VMM refuses") if len(tries) == 1 else ValueError("a fault of ours")
            )
        return await make(wanted)

    monkeypatch.setattr("stillframe.engine.verbs.warm._AFTER_FAILURE", 0.2)
    monkeypatch.setattr(warm, "_make", fails_twice)
    await engine.set_warm(snapshot.id, 1)
    assert (await warm.settled(snapshot.id)).limited_by == "it failed: the VMM refuses"
    await engine.set_warm(other.id, 1)
    await ready(engine, other.id, 1)
    with engine.context.listening(snapshot.id) as changed:
        async with asyncio.timeout(60):
            while engine.warm_status(snapshot.id).ready < 1:
                await changed.wait()
                changed.clear()
    assert len(tries) == 2


async def test_an_end_that_fails_does_not_end_the_filling(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = await captured(engine)
    warm, make = engine.context.warm, engine.context.warm._make

    async def unwanted(wanted: Snapshot) -> WarmFork:
        made = await make(wanted)
        monkeypatch.undo()
        await engine.set_warm(snapshot.id, 0)  # while it was being made
        made.undo.push_async_callback(broken)
        return made

    async def broken() -> None:
        raise OSError("the disk fails")

    monkeypatch.setattr(warm, "_make", unwanted)
    await engine.set_warm(snapshot.id, 1)
    with engine.context.listening(snapshot.id) as changed:
        await changed.wait()
    await engine.set_warm(snapshot.id, 1)
    await ready(engine, snapshot.id, 1)


async def test_a_fork_or_an_end_makes_room_for_others(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    engine.context.settings = replace(engine.context.settings, warm_memory_bytes=1)
    async with open_engine(tmp_path, engine):
        snapshot = await captured(engine)
        other = await engine.snapshot(snapshot.source_instance_id, kind=LIVE)
        await engine.set_warm(snapshot.id, 1)
        await ready(engine, snapshot.id, 1)
        await engine.set_warm(other.id, 1)
        async with asyncio.timeout(60):
            limited = await engine.context.warm.settled(other.id)
        assert "budget" in (limited.limited_by or "")
        await engine.set_warm(snapshot.id, 0)
        with engine.context.listening(other.id) as changed:
            async with asyncio.timeout(60):
                while engine.warm_status(other.id).ready < 1:
                    await changed.wait()
                    changed.clear()
