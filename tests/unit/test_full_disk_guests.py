"""Guests that the VMM stopped because their disk found no space: said, and mended by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillframe.engine import space
from stillframe.engine.engine import Engine
from stillframe.engine.space import LACKS_SPACE
from stillframe.model.errors import GuestFailure, NotFound
from stillframe.model.states import InstanceState
from stillframe.model.values import SnapshotKind
from stillframe.vmm.driver import MachineStatus
from stillframe.vmm.fake.driver import FakeMachine
from stillframe.vmm.qemu.driver import QemuMachine
from support.engine import ask, make_engine, open_engine, running


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    monkeypatch.setattr(space, "_SETTLED", 0.05)
    async with open_engine(tmp_path) as opened:
        yield opened


async def starved(engine: Engine, name: str = "source") -> tuple[str, FakeMachine]:
    """A guest that stands still as QEMU's do when the file system is full; it is said so."""
    instance = await running(engine, name)
    machine = engine.context.live[instance.id].machine
    assert isinstance(machine, FakeMachine)
    await machine.pause()
    machine.lacks_space.set()
    await told(engine, instance.id, LACKS_SPACE)
    return instance.id, machine


async def told(engine: Engine, instance_id: str, error: str | None) -> None:
    """Return when the record has that error."""
    async with asyncio.timeout(30):
        with engine.context.listening(instance_id) as changed:
            while engine.find_instance(instance_id).state_error != error:
                await changed.wait()
                changed.clear()


async def in_vain(machine: FakeMachine) -> None:
    """Instead of ``resume``: the write is repeated, and finds no space again."""
    machine.lacks_space.clear()
    asyncio.get_running_loop().call_soon(machine.lacks_space.set)


async def ask_in_vain(engine: Engine, instance_id: str) -> None:
    """Whoever wants something of such a guest is told at once."""
    with pytest.raises(GuestFailure, match="no space"):
        await ask(engine, instance_id, "true")


async def goes_on(engine: Engine, instance_id: str) -> bool:
    """Whether the guest runs and answers, once nothing is said of it any more."""
    await told(engine, instance_id, None)
    return await ask(engine, instance_id, "echo", "here") == "here"


async def test_a_guest_without_space_is_told_of_and_goes_on_after_a_deletion(
    engine: Engine,
) -> None:
    other = await running(engine, "other")
    instance_id, machine = await starved(engine)
    assert engine.find_instance(instance_id).state is InstanceState.RUNNING
    assert await machine.status() is MachineStatus.PAUSED
    await ask_in_vain(engine, instance_id)
    await engine.delete(other.id, graceful=False)
    assert await goes_on(engine, instance_id)


async def test_it_goes_on_when_somebody_else_frees_space(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_INTERVAL", 0.05)
    instance_id, machine = await starved(engine)
    await told(engine, instance_id, None)
    assert await machine.status() is MachineStatus.RUNNING


async def test_while_there_is_still_no_space_it_is_still_told_of(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = asyncio.Semaphore(0)

    async def counted(self: FakeMachine) -> None:
        await in_vain(self)
        tries.release()

    monkeypatch.setattr(space, "_INTERVAL", 0.01)
    monkeypatch.setattr(FakeMachine, "resume", counted)
    instance_id, machine = await starved(engine)
    async with asyncio.timeout(30):
        for _ in range(3):
            await tries.acquire()
    assert engine.find_instance(instance_id).state_error == LACKS_SPACE
    monkeypatch.undo()
    engine.context.space_freed()
    await told(engine, instance_id, None)
    assert await machine.status() is MachineStatus.RUNNING


async def test_a_guest_that_stands_still_for_a_capture_is_left_to_that(engine: Engine) -> None:
    instance_id, machine = await starved(engine)
    async with engine.context.exclusive(instance_id, "a capture"):
        engine.context.space_freed()
        await asyncio.sleep(0.1)
        assert await machine.status() is MachineStatus.PAUSED
    await told(engine, instance_id, None)
    snapshot = await engine.snapshot(instance_id, kind=SnapshotKind.STANDBY)
    assert snapshot.template.state_error is None


async def test_it_can_be_stopped_and_deleted_while_it_stands_still(engine: Engine) -> None:
    instance_id, _ = await starved(engine)
    async with asyncio.timeout(60):
        stopped = await engine.stop(instance_id)
    assert (stopped.state, stopped.state_error) == (InstanceState.STOPPED, None)
    other_id, _ = await starved(engine, "other")
    await engine.delete(other_id, graceful=False)
    with pytest.raises(NotFound):
        engine.find_instance(other_id)


async def test_an_adopted_guest_without_space_is_made_itself_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: its memory must not be lost to a full disk."""
    monkeypatch.setattr(space, "_SETTLED", 0.05)
    first = make_engine(tmp_path)
    async with open_engine(tmp_path, first):
        instance_id, _ = await starved(first)
        await ask_in_vain(first, instance_id)
        await first.close()
        second = make_engine(tmp_path)
        object.__setattr__(second.context.settings, "agent_timeout", 0.2)
        monkeypatch.setattr(FakeMachine, "resume", in_vain)
        async with open_engine(tmp_path, second):
            greeting = second.context.live[instance_id].greeting
            assert greeting is not None
            await asyncio.wait([greeting], timeout=1)
            assert not greeting.done()
            await ask_in_vain(second, instance_id)
            monkeypatch.undo()
            object.__setattr__(second.context.settings, "agent_timeout", 30.0)
            second.context.space_freed()
            assert await goes_on(second, instance_id)


async def test_what_an_earlier_server_said_is_unsaid_when_the_guest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_SETTLED", 0.05)
    first = make_engine(tmp_path)
    async with open_engine(tmp_path, first):
        instance_id, _ = await starved(first)
        await first.close()
        async with open_engine(tmp_path) as second:
            assert await goes_on(second, instance_id)


async def test_qemu_tells_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = object.__new__(QemuMachine)
    machine.lacks_space = asyncio.Event()
    failed = {"action": "stop", "operation": "write", "nospace": True, "reason": "No space"}
    for data, expected in (
        ({**failed, "action": "report"}, False),  # the guest was told of an error
        ({"action": "stop", "operation": "read", "reason": "I/O error"}, False),
        (failed, True),
    ):
        machine._on_event({"event": "BLOCK_IO_ERROR", "data": data})
        assert machine.lacks_space.is_set() is expected
    machine._on_event({"event": "STOP"})
    assert machine.lacks_space.is_set()
    machine._on_event({"event": "RESUME"})
    assert not machine.lacks_space.is_set()
