"""Captures that are disturbed: by failure, a deletion beside them, or the end of the server."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine import capture as capturing
from stillframe.engine.context import Context
from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.machines import resources_of
from stillframe.engine.verbs import fork as forking
from stillframe.host.files import fsync_data
from stillframe.model.errors import DamagedData, VmmFailure
from stillframe.model.units import MIB
from stillframe.model.values import SnapshotKind
from stillframe.model.verification import Depth
from stillframe.store.manifest import EXTENT
from stillframe.vmm.driver import MachineStatus
from stillframe.vmm.fake.driver import FakeDriver, FakeMachine
from support.engine import ask, make_engine, open_engine, running, traces
from support.payloads import flip, verified

LIVE = SnapshotKind.STANDBY
LAST_PAGE = EXTENT - 4096  # of the extent in which the guest keeps what it is told


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


@pytest.mark.parametrize("step", ["clone", "update_table"])
async def test_the_snapshot_below_may_be_deleted_at_any_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Between the clones of its image and of its digests, and while digests are made."""
    source = await running(engine)
    first = await engine.snapshot(source.id, kind=LIVE)
    await ask(engine, source.id, "set", "word", "changed")
    directory = engine.context.data.snapshot(first.id).directory
    known = getattr(capturing, step)

    def then_lose(*arguments: Any, **how: Any) -> Any:
        if step == "clone":
            known(*arguments, **how)
        shutil.rmtree(directory, ignore_errors=True)
        return None if step == "clone" else known(*arguments, **how)

    monkeypatch.setattr(capturing, step, then_lose)
    second = await engine.snapshot(source.id, kind=LIVE)
    assert not directory.exists()
    assert verified(engine.context.data.snapshot(second.id)).damage == ()


async def test_damage_of_the_snapshot_below_is_found_and_not_vouched_for(engine: Engine) -> None:
    """The guest's own memory is whole; the page that rots shares an extent with one it writes."""
    source = await running(engine)
    first = await engine.snapshot(source.id, kind=LIVE, name="first")
    await ask(engine, source.id, "set", "word", "changed")
    flip(engine.context.data.snapshot(first.id).memory, LAST_PAGE * 8)
    with pytest.raises(DamagedData, match="first, on which this one built, is damaged") as caught:
        await engine.snapshot(source.id, kind=LIVE)
    assert caught.value.facts["offset"] == 0
    assert "memory" in (engine.find_snapshot(first.id).damaged or "")
    assert [found.id for found in engine.list_snapshots()] == [first.id]
    second = await engine.snapshot(source.id, kind=LIVE)
    assert verified(engine.context.data.snapshot(second.id)).damage == ()
    fork = await engine.fork_snapshot(second.id, ForkRequest("fork"))
    assert await ask(engine, fork.id, "get", "word") == "changed"


async def test_nothing_is_built_on_a_snapshot_that_is_known_to_be_damaged(engine: Engine) -> None:
    source = await running(engine)
    first = await engine.snapshot(source.id, kind=LIVE)
    flip(engine.context.data.snapshot(first.id).memory, (10 * MIB) * 8)
    assert (await engine.verify_snapshot(first.id, Depth.FULL)).damage
    second = await engine.snapshot(source.id, kind=LIVE)
    assert verified(engine.context.data.snapshot(second.id)).damage == ()


async def test_a_table_below_that_its_manifest_does_not_know_is_found(engine: Engine) -> None:
    source = await running(engine)
    payload = engine.context.data.snapshot((await engine.snapshot(source.id, kind=LIVE)).id)
    flip(payload.table("memory"), 10 * MIB // EXTENT * 32 * 8)
    with pytest.raises(DamagedData, match="does not match its digest"):
        await engine.snapshot(source.id, kind=LIVE)
    second = await engine.snapshot(source.id, kind=LIVE)
    assert verified(engine.context.data.snapshot(second.id)).damage == ()


async def test_memory_that_rots_under_a_guest_is_not_captured(
    engine: Engine, tmp_path: Path
) -> None:
    source = await running(engine)
    first = await engine.snapshot(source.id, kind=LIVE)
    fork = await engine.fork_snapshot(first.id, ForkRequest("fork"))
    await ask(engine, fork.id, "set", "word", "changed")
    flip(engine.context.data.instance(fork.id).memory, LAST_PAGE * 8)
    for _ in range(2):
        with pytest.raises(DamagedData, match="memory image that fork runs on is damaged"):
            await engine.snapshot(fork.id, kind=LIVE)
    with pytest.raises(DamagedData):
        await engine.standby(fork.id)
    assert await ask(engine, fork.id, "get", "word") == "changed"
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == [first.id]


async def test_a_standby_that_is_cancelled_at_the_very_end_of_its_capture_leaves_a_guest_that_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    close = capturing._Capture.close

    async def cancelled(capture: Any) -> None:
        falling_asleep.cancel()
        await asyncio.sleep(0)
        await close(capture)

    monkeypatch.setattr(capturing._Capture, "close", cancelled)
    falling_asleep = asyncio.create_task(engine.standby(source.id))
    await asyncio.wait([falling_asleep])
    assert falling_asleep.cancelled()
    assert await engine.context.live[source.id].machine.status() is MachineStatus.RUNNING
    assert await ask(engine, source.id, "true") == ""


async def test_disks_that_are_copied_keep_no_other_work_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are copied by threads that do nothing else."""
    source = await running(engine)
    await engine.stop(source.id)
    copying: set[str] = set()

    def noticed(path: Path) -> None:
        copying.add(threading.current_thread().name)
        fsync_data(path)

    monkeypatch.setattr(forking, "fsync_data", noticed)
    await asyncio.gather(*(engine.fork(source.id, name=f"fork-{n}") for n in range(8)))
    assert copying
    assert all(name.startswith("copy") for name in copying)
