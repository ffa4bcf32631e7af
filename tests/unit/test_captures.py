"""Captures that are disturbed: by failure, a deletion beside them, or the end of the server."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine import capture as capturing
from stillframe.engine.context import Context
from stillframe.engine.engine import Engine
from stillframe.engine.machines import resources_of
from stillframe.model.errors import VmmFailure
from stillframe.model.values import SnapshotKind
from stillframe.vmm.driver import MachineStatus
from stillframe.vmm.fake.driver import FakeDriver, FakeMachine
from support.engine import ask, make_engine, open_engine, running, traces
from support.payloads import verified

LIVE = SnapshotKind.STANDBY


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_disk_copy_that_was_half_begun_is_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """Else its bitmap, and a node that holds the copy open, would stay in the VMM."""
    source = await running(engine)
    monkeypatch.setattr(Context, "shares_blocks", False)
    machine = engine.context.live[source.id].machine
    begun, ended = asyncio.Event(), list[int]()

    async def half(*_: Any) -> bool:
        begun.set()
        if cancelled:
            await asyncio.Event().wait()
        raise VmmFailure("the copy cannot be opened")

    async def end(index: int) -> None:
        ended.append(index)

    monkeypatch.setattr(machine, "begin_disk_copy", half)
    monkeypatch.setattr(machine, "end_disk_copy", end)
    taking = asyncio.create_task(engine.snapshot(source.id, kind=LIVE))
    await begun.wait()
    if cancelled:
        taking.cancel()
    with pytest.raises((VmmFailure, asyncio.CancelledError)):
        await taking
    assert ended == [1]
    monkeypatch.undo()
    await engine.snapshot(source.id, kind=LIVE)
    assert await ask(engine, source.id, "true") == ""


@pytest.mark.parametrize("times", [1, 3])
async def test_the_server_s_end_does_not_leave_a_guest_standing_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Requests are cancelled at the end of a server, perhaps more than once, and not waited for."""
    engine = make_engine(tmp_path)
    async with open_engine(tmp_path, engine):
        source = await running(engine)
        resources = await resources_of(engine.context, source)
        saving = asyncio.Event()
        save = FakeMachine.save_devices

        async def slowly(self: FakeMachine, *arguments: Any) -> None:
            await save(self, *arguments)
            saving.set()
            await asyncio.sleep(0.3)  # as VMMs that write all memory themselves

        monkeypatch.setattr(FakeMachine, "save_devices", slowly)
        taking = asyncio.create_task(engine.snapshot(source.id, kind=LIVE))
        await saving.wait()
        for _ in range(times):
            taking.cancel()
            await asyncio.sleep(0)
        await engine.close()
        assert taking.cancelled()
        assert source.process is not None
        machine = await FakeDriver().adopt(source.process, resources)
        assert await machine.status() is MachineStatus.RUNNING
        await machine.close()
        async with open_engine(tmp_path) as again:
            assert await ask(again, source.id, "true") == ""
            assert again.list_snapshots() == []
        assert list((tmp_path / "snapshots").iterdir()) == []


async def test_a_deletion_under_way_is_finished_before_the_server_ends(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    async with open_engine(tmp_path, engine):
        source = await running(engine)
        deleting = asyncio.create_task(engine.delete(source.id))
        await asyncio.sleep(0)
        await engine.close()
        assert deleting.done()
        await deleting
    assert traces(tmp_path) == []


async def test_the_snapshot_below_may_be_deleted_while_digests_are_made(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its table of digests and the use of it."""
    source = await running(engine)
    await engine.snapshot(source.id, kind=LIVE)
    await ask(engine, source.id, "set", "word", "changed")
    look = capturing._digest_of
    gone: list[Path] = []

    def look_and_lose(table: Path) -> str | None:
        found = look(table)
        shutil.rmtree(table.parent)
        gone.append(table)
        return found

    monkeypatch.setattr(capturing, "_digest_of", look_and_lose)
    second = await engine.snapshot(source.id, kind=LIVE)
    assert len(gone) == 1
    assert verified(engine.context.data.snapshot(second.id)).damage == ()
