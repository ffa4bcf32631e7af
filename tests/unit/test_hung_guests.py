"""Guests that do not answer: nobody waits for them for ever, and they hold up nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ExecRequest, ForkRequest
from stillframe.engine.verbs import stop as stopping
from stillframe.guest.connection import AgentConnection
from stillframe.guest.wire import Frame, FrameType
from stillframe.model.errors import GuestFailure, NotFound
from stillframe.model.retention import Retention
from stillframe.model.schedules import ScheduleRequest
from stillframe.model.states import InstanceState
from stillframe.model.values import Instance, SnapshotKind
from stillframe.vmm.driver import AgentStream
from stillframe.vmm.fake.driver import FakeMachine
from support.clock import HOUR, SetClock
from support.engine import ask, make_engine, open_engine, running

MIB = 1 << 20


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    """An engine with less patience than people have."""
    monkeypatch.setattr(stopping, "_STOP_GRACE", 0.1)
    monkeypatch.setattr(stopping, "_DELETE_GRACE", 0.1)
    async with open_engine(tmp_path) as opened:
        yield opened


def impatient(engine: Engine) -> None:
    object.__setattr__(engine.context.settings, "agent_timeout", 0.5)


async def hung(engine: Engine, name: str = "hung", *, connected: bool = True) -> Instance:
    """A Running instance whose guest has stopped, which nothing says."""
    instance = await running(engine, name)
    live = engine.context.live[instance.id]
    if connected:
        await ask(engine, instance.id, "true")
    elif live.connection is not None:
        await live.connection.close()
    await live.machine.pause()
    return instance


def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on agents greet, and answer nothing else."""
    monkeypatch.setattr(AgentConnection, "_dispatch", lambda *_: None)


@pytest.mark.parametrize("connected", [True, False])
async def test_a_guest_that_hangs_is_stopped_and_deleted_all_the_same(
    engine: Engine, connected: bool
) -> None:
    instance = await hung(engine, connected=connected)
    other = await hung(engine, "other", connected=connected)
    async with asyncio.timeout(60):
        assert (await engine.stop(instance.id)).state is InstanceState.STOPPED
        await engine.delete(other.id)
    with pytest.raises(NotFound):
        engine.find_instance(other.id)
    assert (await engine.start(instance.id)).state is InstanceState.INITIALIZING


async def test_an_agent_that_ignores_the_request_does_not_keep_its_vm_alive(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = await running(engine)
    deaf(monkeypatch)
    async with asyncio.timeout(60):
        assert (await engine.stop(instance.id)).state is InstanceState.STOPPED


async def test_bytes_that_a_hung_guest_does_not_take_are_dropped(engine: Engine) -> None:
    """Both the exec session and the VM can be ended with a full stream between us."""
    instance = await running(engine)
    session = await engine.exec(instance.id, ExecRequest(("cat",)))
    await engine.context.live[instance.id].machine.pause()
    feeding = asyncio.create_task(session.write_stdin(bytes(MIB)))
    await asyncio.wait([feeding], timeout=0.2)
    assert not feeding.done()
    async with asyncio.timeout(60):
        await session.close()
        await engine.delete(instance.id, graceful=False)
        await feeding  # what a command that has ended was sent is dropped


async def test_an_upload_into_a_hung_guest_ends(engine: Engine) -> None:
    instance = await hung(engine)
    impatient(engine)

    async def content() -> AsyncIterator[bytes]:
        while True:  # a client that goes on for as long as it is listened to
            yield bytes(MIB)

    async with asyncio.timeout(60):
        with pytest.raises(GuestFailure, match="did not answer"):
            await engine.write_path(instance.id, "/tmp/file", content())


async def test_a_fork_whose_agent_only_greets_is_ended_and_its_callers_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    snapshot = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    impatient(engine)
    deaf(monkeypatch)
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    async with asyncio.timeout(60):
        with pytest.raises(GuestFailure, match="did not answer"):
            await engine.exec(fork.id, ExecRequest(("true",)))
        result = await engine.wait(
            fork.id, state=InstanceState.STOPPED, timeout=timedelta(seconds=60)
        )
    assert result.state is InstanceState.STOPPED
    assert "did not answer within 0.5 s" in (result.state_error or "")
    assert fork.id not in engine.context.live


async def test_an_agent_that_came_back_without_our_session_is_greeted_anew(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = await running(engine)
    await ask(engine, instance.id, "true")
    impatient(engine)
    with monkeypatch.context() as patched:
        deaf(patched)
        with pytest.raises(GuestFailure, match="did not answer"):
            await engine.stat(instance.id, "/", follow=True)
    assert (await engine.stat(instance.id, "/", follow=True)).is_dir
    assert await ask(engine, instance.id, "echo", "again") == "again"


def deaf_for_now(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on nothing is heard of any agent, not even a greeting, until what is returned."""
    dial, is_deaf = FakeMachine.dial_agent, True

    async def dial_in_vain(self: FakeMachine) -> AgentStream:
        reader, writer = await dial(self)
        return (asyncio.StreamReader() if is_deaf else reader), writer

    def hear() -> None:
        nonlocal is_deaf
        is_deaf = False

    monkeypatch.setattr(FakeMachine, "dial_agent", dial_in_vain)
    return hear


async def told(engine: Engine, instance_id: str, wanted: str) -> None:
    """Return when the instance's ``state_error`` has these words; empty: when there is none."""
    async with asyncio.timeout(60):
        with engine.context.listening(instance_id) as changed:
            while True:
                said = engine.find_instance(instance_id).state_error or ""
                if wanted in said and bool(wanted) is bool(said):
                    return
                await changed.wait()
                changed.clear()


@pytest.mark.parametrize("how", ["adopted", "restored"])
async def test_a_guest_that_was_busy_when_it_was_to_be_identified_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    first = make_engine(tmp_path)
    await first.open()
    source = await running(first)
    if how == "restored":
        await first.standby(source.id)
    await first.close()
    hear = deaf_for_now(monkeypatch)
    second = make_engine(tmp_path)
    impatient(second)
    async with open_engine(tmp_path, second) as engine:
        if how == "restored":
            await engine.restore(source.id)
        await told(engine, source.id, "an identity of its own")
        with pytest.raises(GuestFailure, match=r"did not answer within 0\.2 s"):
            await engine.exec(source.id, ExecRequest(("true",), wait_for_agent=0.2))
        assert engine.find_instance(source.id).state is InstanceState.RUNNING
        hear()
        assert await ask(engine, source.id, "echo", "again") == "again"
        await told(engine, source.id, "")


async def test_who_has_time_for_an_agent_waits_longer_than_the_first_greeting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    await engine.standby(source.id)
    impatient(engine)
    hear = deaf_for_now(monkeypatch)
    await engine.restore(source.id)
    patient = ExecRequest(("echo", "at last"), wait_for_agent=60)
    asking = asyncio.create_task(engine.exec(source.id, patient))
    await told(engine, source.id, "did not answer within 0.5 s")
    assert not asking.done()
    hear()
    async with asyncio.timeout(60):
        session = await asking
        assert b"".join([data async for _, data in session.output()]) == b"at last\n"


@pytest.mark.parametrize("identified", [False, True])
async def test_of_adopted_forks_only_one_that_never_was_itself_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, identified: bool
) -> None:
    """The server ends before a fork was identified, or later; the next one finds it silent."""
    first = make_engine(tmp_path)
    await first.open()
    source = await running(first)
    snapshot = await first.snapshot(source.id, kind=SnapshotKind.STANDBY)
    hear = deaf_for_now(monkeypatch)
    if identified:
        hear()
    fork = await first.fork_snapshot(snapshot.id, ForkRequest("fork"))
    if identified:
        await ask(first, fork.id, "true")
        deaf_for_now(monkeypatch)
    await first.close()
    second = make_engine(tmp_path)
    impatient(second)
    async with open_engine(tmp_path, second) as engine:
        await told(engine, fork.id, "an identity of its own")
        state = engine.find_instance(fork.id).state
        assert state is (InstanceState.RUNNING if identified else InstanceState.STOPPED)
        assert (fork.id in engine.context.live) is identified
        # When it boots it has random numbers of its own.
        assert not engine.context.data.instance(fork.id).unidentified.exists()


async def test_a_fork_that_falls_asleep_before_it_is_itself_is_known_as_one_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        snapshot = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
        hear = deaf_for_now(monkeypatch)
        fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
        marker = engine.context.data.instance(fork.id).unidentified
        await engine.standby(fork.id)
        assert marker.exists()
        hear()
        await engine.restore(fork.id)
        assert await ask(engine, fork.id, "true") == ""
        assert not marker.exists()


async def test_a_verb_that_takes_its_time_holds_up_no_other_instances_schedule(
    tmp_path: Path,
) -> None:
    engine, clock = make_engine(tmp_path), SetClock()
    clock.rule(engine)
    async with open_engine(tmp_path, engine):
        slow, other = await running(engine, "slow"), await running(engine, "other")
        wanted = ScheduleRequest(Retention(max_count=3), interval=HOUR)
        engine.set_schedule(slow.id, wanted)
        async with engine.context.exclusive(slow.id, "something long"):
            clock.go_on(HOUR)
            engine.scheduler.tick()
            await asyncio.sleep(0)
            async with asyncio.timeout(60):
                engine.set_schedule(other.id, wanted)
                assert (await engine.run_schedule(other.id)).last_error is None
            assert [s.source_instance_id for s in engine.list_snapshots()] == [other.id]
        async with asyncio.timeout(60):
            await engine.scheduler.settled()
        assert {s.source_instance_id for s in engine.list_snapshots()} == {slow.id, other.id}


async def test_words_of_a_guest_that_are_no_text_are_kept_as_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    snapshot = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    dispatch = AgentConnection._dispatch
    words = b"errno\0E\xff\0message\0no \xff\xfe names\0"

    def refusing(self: AgentConnection, frame: Frame) -> None:
        dispatch(self, frame._replace(type=FrameType.ERROR, payload=words))

    monkeypatch.setattr(AgentConnection, "_dispatch", refusing)
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    result = await engine.wait(fork.id, state=InstanceState.STOPPED, timeout=timedelta(seconds=60))
    assert result.state is InstanceState.STOPPED
    assert "no ?? names" in (result.state_error or "")
    with pytest.raises(GuestFailure) as caught:
        await engine.stat(source.id, "/", follow=True)
    assert caught.value.facts["errno"] == "E?"
