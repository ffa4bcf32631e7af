"""Guests that are loaded but may not run, VMMs that do not end, guests slow to come up."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine import machines
from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ForkRequest
from stillframe.engine.verbs import restore_snapshot as restoring
from stillframe.model.errors import VmmFailure
from stillframe.model.states import InstanceState
from stillframe.model.values import Instance, SnapshotKind
from stillframe.vmm.fake.driver import FakeMachine
from support.engine import ask, make_engine, open_engine, running, traces

pytestmark = pytest.mark.usefixtures("vms_end")

LIVE = SnapshotKind.STANDBY


async def refused(self: FakeMachine) -> None:
    raise VmmFailure("the VMM refuses")


async def lost(self: FakeMachine) -> None:
    await self._process.kill()
    raise VmmFailure("the VMM is gone")


RESUME = FakeMachine.resume


async def answer_lost(self: FakeMachine) -> None:
    await RESUME(self)
    raise VmmFailure("the VMM did not answer in time")


async def asleep(engine: Engine) -> Instance:
    """An instance in Standby that remembers something."""
    source = await running(engine)
    await ask(engine, source.id, "set", "key", "value")
    return await engine.standby(source.id)


async def settled(engine: Engine, instance: Instance, state: InstanceState) -> str | None:
    result = await engine.wait(instance.id, state=state, timeout=timedelta(seconds=60))
    assert result.state is state
    return result.state_error


def remains(directory: Path, instance: Instance) -> set[str]:
    return {path.name for path in (directory / "instances" / instance.id).iterdir()}


# -- restore from standby -------------------------------------------------------------------------
async def test_a_restore_whose_guest_may_not_run_is_still_in_standby(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await asleep(engine)
    before = traces(tmp_path), remains(tmp_path, source)
    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "resume", refused)
        with pytest.raises(VmmFailure, match="refuses"):
            await engine.restore(source.id)
    assert engine.find_instance(source.id) == source
    assert (traces(tmp_path), remains(tmp_path, source)) == before
    await engine.restore(source.id)
    assert await ask(engine, source.id, "get", "key") == "value"


async def test_a_restore_that_loses_its_vmm_at_the_last_moment_says_so(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await asleep(engine)
    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "resume", lost)
        with pytest.raises(VmmFailure, match="gone"):
            await engine.restore(source.id)
    stopped = engine.find_instance(source.id)
    assert stopped.state is InstanceState.STOPPED
    assert "gone" in (stopped.state_error or "")
    assert remains(tmp_path, source) == {"overlay.raw", "config.raw", "logs"}
    await engine.start(source.id)
    await settled(engine, source, InstanceState.RUNNING)
    assert (await engine.standby(source.id)).state is InstanceState.STANDBY


async def test_a_restore_whose_answer_is_lost_though_the_guest_runs_is_done(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await asleep(engine)
    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "resume", answer_lost)
        assert (await engine.restore(source.id)).state is InstanceState.RUNNING
    assert await ask(engine, source.id, "get", "key") == "value"


async def test_a_restore_cancelled_at_its_last_step_is_done_and_can_sleep_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await asleep(engine)

    async def cancel(self: FakeMachine) -> None:
        task.cancel()
        await asyncio.sleep(0)
        await RESUME(self)

    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "resume", cancel)
        task = asyncio.ensure_future(engine.restore(source.id))
        with pytest.raises(asyncio.CancelledError):
            await task
    assert engine.find_instance(source.id).state is InstanceState.RUNNING
    assert "standby" not in remains(tmp_path, source)
    assert await ask(engine, source.id, "get", "key") == "value"
    assert (await engine.standby(source.id)).state is InstanceState.STANDBY


# -- restore in place and forks -------------------------------------------------------------------
@pytest.mark.parametrize("resume", [refused, lost])
@pytest.mark.parametrize("state", [InstanceState.STANDBY, InstanceState.STOPPED])
async def test_a_restore_in_place_whose_guest_may_not_run_is_undone(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resume: Any,
    state: InstanceState,
) -> None:
    source = await running(engine)
    await ask(engine, source.id, "set", "key", "old")
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    await ask(engine, source.id, "set", "key", "new")
    verb = engine.standby if state is InstanceState.STANDBY else engine.stop
    source = await verb(source.id)
    before = sorted(traces(tmp_path)), remains(tmp_path, source)
    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "resume", resume)
        with pytest.raises(VmmFailure):
            await engine.restore_snapshot(source.id, snapshot.id)
    assert engine.find_instance(source.id) == source
    assert (sorted(traces(tmp_path)), remains(tmp_path, source)) == before
    assert engine.context.records.intents == {}
    if state is InstanceState.STANDBY:
        await engine.restore(source.id)
        assert await ask(engine, source.id, "get", "key") == "new"


async def test_a_restore_in_place_that_cannot_be_undone_is_undone_by_the_next_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(5, "Input/output error")

    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        snapshot = await engine.snapshot(source.id, kind=LIVE)
        await ask(engine, source.id, "set", "key", "new")
        await engine.standby(source.id)
        with monkeypatch.context() as patch:
            patch.setattr(FakeMachine, "resume", refused)
            patch.setattr(restoring, "put_back", failing)
            with pytest.raises(OSError, match="Input/output"):
                await engine.restore_snapshot(source.id, snapshot.id)
        assert engine.find_instance(source.id).state is InstanceState.STANDBY
    async with open_engine(tmp_path) as engine:
        assert engine.find_instance(source.id).state is InstanceState.STANDBY
        await engine.restore(source.id)
        assert await ask(engine, source.id, "get", "key") == "new"


@pytest.mark.parametrize("warm", [False, True])
async def test_a_fork_whose_guest_may_not_run_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    source = await running(engine)
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    before = sorted(traces(tmp_path))
    if warm:
        await engine.set_warm(snapshot.id, 1)
        await engine.context.warm.settled(snapshot.id)
    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "resume", refused)
        with pytest.raises(VmmFailure):
            await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    await engine.set_warm(snapshot.id, 0)
    await engine.context.warm.close()
    assert sorted(traces(tmp_path)) == before
    assert engine.context.records.intents == {}


# -- VMMs that cannot be ended --------------------------------------------------------------------
@pytest.mark.parametrize("verb", ["stop", "delete"])
async def test_a_vmm_that_ends_after_all_is_recorded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    source = await running(engine)
    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "kill", refused)
        with pytest.raises(VmmFailure):  # the guest shuts down all the same
            await getattr(engine, verb)(source.id)
    await settled(engine, source, InstanceState.STOPPED)
    assert source.id not in engine.context.live
    assert engine.context.records.intents == {}
    await engine.start(source.id)
    await settled(engine, source, InstanceState.RUNNING)


async def test_a_vmm_that_does_not_end_is_still_watched(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "kill", refused)
        with pytest.raises(VmmFailure):
            await engine.delete(source.id, graceful=False)
    assert await ask(engine, source.id, "echo", "still here") == "still here"
    live = engine.context.live[source.id]
    await live.machine.power_button()
    await settled(engine, source, InstanceState.STOPPED)


async def test_a_standby_whose_vmm_does_not_end_keeps_its_memory(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    await ask(engine, source.id, "set", "key", "value")
    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "kill", refused)
        with pytest.raises(VmmFailure):
            await engine.standby(source.id)
        assert engine.find_instance(source.id).state is InstanceState.STANDBY
        with pytest.raises(VmmFailure):  # there cannot be two of them
            await engine.restore(source.id)
    await engine.restore(source.id)
    assert await ask(engine, source.id, "get", "key") == "value"


# -- guests slow to come up -----------------------------------------------------------------------
async def test_a_slow_guest_says_why_it_is_not_running_and_runs_in_the_end(
    tmp_path: Path,
) -> None:
    slow = make_engine(tmp_path)
    patient = slow.context.settings
    slow.context.settings = replace(patient, boot_timeout=0.0)
    async with open_engine(tmp_path, slow) as engine:
        new = await engine.create(CreateRequest("slow", "stillframe/base"))
        with engine.context.listening(new.id) as changed:
            while engine.find_instance(new.id).state_error is None:
                await asyncio.wait_for(changed.wait(), 60)
                changed.clear()
        assert engine.find_instance(new.id).state is InstanceState.INITIALIZING
        engine.context.settings = patient
        assert await settled(engine, new, InstanceState.RUNNING) is None


async def test_a_connection_that_breaks_while_the_workload_starts_is_made_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled: list[Any] = []
    dial = machines.dial

    async def breaking(live: Any, timeout: float) -> Any:
        connection = await dial(live, timeout)
        if not dialled:  # as long as it is starting, and then the stream is gone
            connection._hello = replace(connection.hello, workload="starting")
            asyncio.get_running_loop().call_soon(connection._writer.close)
        dialled.append(connection)
        return connection

    monkeypatch.setattr(machines, "dial", breaking)
    await running(engine)
    assert len(dialled) == 2


async def test_a_guest_that_ends_before_it_came_up_is_stopped(tmp_path: Path) -> None:
    slow = make_engine(tmp_path)
    slow.context.settings = replace(slow.context.settings, boot_timeout=0.0)
    async with open_engine(tmp_path, slow) as engine:
        new = await engine.create(CreateRequest("slow", "stillframe/base"))
        await engine.context.live[new.id].machine._process.kill()  # type: ignore[attr-defined]
        await settled(engine, new, InstanceState.STOPPED)
