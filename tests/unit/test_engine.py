"""The verbs under failure, races and crashes, on the fake hypervisor."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine import capture as capturing
from stillframe.engine import greeting, loaded, machines
from stillframe.engine.context import Phases
from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ExecRequest, ForkRequest
from stillframe.host.capture import MemoryCapture
from stillframe.host.orphans import kill_orphans
from stillframe.model.errors import (
    Conflict,
    DamagedData,
    GuestFailure,
    InvalidRequest,
    InvalidState,
    NameConflict,
    NotFound,
    StillframeError,
    StorageFull,
    VmmFailure,
)
from stillframe.model.states import InstanceState
from stillframe.model.values import SnapshotKind
from support.engine import ask, expect_going_on, make_engine, open_engine, running, traces

pytestmark = pytest.mark.usefixtures("vms_end")

LIVE, DISK = SnapshotKind.STANDBY, SnapshotKind.STOPPED


def full_disk(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


async def refused(*_: object, **__: object) -> Any:
    raise VmmFailure("the VMM refuses")


async def silent(*_: object, **__: object) -> Any:
    raise GuestFailure("the agent is silent")


async def test_memory_goes_on_in_a_fork_and_parts_from_the_source(engine: Engine) -> None:
    source = await running(engine)
    await ask(engine, source.id, "set", "who", "source")
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    assert await ask(engine, fork.id, "get", "who") == "source"
    await ask(engine, fork.id, "set", "who", "fork")
    assert await ask(engine, source.id, "get", "who") == "source"
    assert fork.parent_snapshot_id == snapshot.id
    assert snapshot.pause_ms is not None
    assert set(fork.timings_ms) >= {"load", "resume", "total"}
    assert "identify" in engine.find_instance(fork.id).timings_ms


async def test_the_image_a_fork_maps_never_changes(engine: Engine, tmp_path: Path) -> None:
    source = await running(engine)
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    image = tmp_path / "snapshots" / snapshot.id / "memory"
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    await ask(engine, fork.id, "set", "key", "value")
    await engine.snapshot(fork.id, kind=LIVE)
    await engine.standby(fork.id)
    assert hashlib.sha256(image.read_bytes()).hexdigest() == before


async def test_deleting_source_and_snapshot_takes_nothing_from_a_fork(engine: Engine) -> None:
    source = await running(engine)
    await ask(engine, source.id, "set", "key", "kept")
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    await engine.delete(source.id)
    await engine.delete_snapshot(snapshot.id)
    await engine.standby(fork.id)
    await engine.restore(fork.id)
    assert await ask(engine, fork.id, "get", "key") == "kept"
    again = await engine.snapshot(fork.id, kind=LIVE)
    child = await engine.fork_snapshot(again.id, ForkRequest("child"))
    assert await ask(engine, child.id, "get", "key") == "kept"


async def test_fifty_creates_of_one_name_make_one_instance(engine: Engine) -> None:
    request = CreateRequest("same", "stillframe/base")
    results = await asyncio.gather(
        *(engine.create(request) for _ in range(50)), return_exceptions=True
    )
    made = [result for result in results if not isinstance(result, BaseException)]
    refusals = [result for result in results if isinstance(result, InvalidRequest)]
    assert (len(made), len(refusals)) == (1, 49)
    assert {refusal.code for refusal in refusals} == {"already_exists"}
    assert [i.name for i in engine.list_instances()] == ["same"]


async def test_sixteen_forks_at_once_all_run(engine: Engine) -> None:
    source = await running(engine)
    await ask(engine, source.id, "set", "key", "value")
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    forks = await asyncio.gather(
        *(engine.fork_snapshot(snapshot.id, ForkRequest(f"fork-{n}")) for n in range(16))
    )
    values = await asyncio.gather(*(ask(engine, fork.id, "get", "key") for fork in forks))
    assert set(values) == {"value"}
    randoms = await asyncio.gather(*(ask(engine, fork.id, "random") for fork in forks))
    assert len(set(randoms)) == 16


async def test_a_snapshot_deleted_while_it_is_forked_is_one_or_the_other(engine: Engine) -> None:
    source = await running(engine)
    for turn in range(10):
        snapshot = await engine.snapshot(source.id, kind=LIVE)
        forked, deleted = await asyncio.gather(
            engine.fork_snapshot(snapshot.id, ForkRequest(f"fork-{turn}")),
            engine.delete_snapshot(snapshot.id),
            return_exceptions=True,
        )
        assert deleted is None
        if isinstance(forked, BaseException):
            assert isinstance(forked, NotFound)
        else:
            assert await ask(engine, forked.id, "true") == ""
            await engine.delete(forked.id, graceful=False)
    assert engine.list_snapshots() == []


async def test_names_are_refused_with_the_contract_s_codes(engine: Engine) -> None:
    source = await running(engine)
    await engine.snapshot(source.id, kind=LIVE, name="one")
    with pytest.raises(Conflict) as caught:
        await engine.snapshot(source.id, kind=LIVE, name="one")
    assert caught.value.code == "conflict"
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    with pytest.raises(Conflict) as caught:
        await engine.fork_snapshot(snapshot.id, ForkRequest("source"))
    assert caught.value.code == "conflict"
    with pytest.raises(NameConflict):
        await engine.fork(source.id, name="source", from_running=True)
    with pytest.raises(InvalidState):
        await engine.fork(source.id, name="fork")


@pytest.mark.parametrize("where", ["make_overlay_disk", "write_config_disk", "boot"])
async def test_a_failed_create_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "make_overlay_disk":
        monkeypatch.setattr("stillframe.engine.verbs.create.make_overlay_disk", full_disk)
    elif where == "write_config_disk":
        monkeypatch.setattr(machines, "write_config_disk", full_disk)
    else:
        monkeypatch.setattr(machines, "boot", refused)
    with pytest.raises((StorageFull, VmmFailure)):
        await engine.create(CreateRequest("name", "stillframe/base"))
    assert traces(tmp_path) == []
    assert engine.list_instances() == []
    assert engine.context.records.intents == {}
    monkeypatch.undo()
    assert (await running(engine, "name")).state is InstanceState.RUNNING


@pytest.mark.parametrize("where", ["clone", "after", "seal"])
async def test_a_full_disk_during_a_snapshot_leaves_the_source_running_and_nothing_else(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source = await running(engine)
    monkeypatch.setattr(MemoryCapture if where == "after" else capturing, where, full_disk)
    with pytest.raises(StorageFull):
        await engine.snapshot(source.id, kind=LIVE, name="wanted")
    monkeypatch.undo()
    assert not list((tmp_path / "snapshots").iterdir())
    assert engine.list_snapshots() == []
    before = int(await ask(engine, source.id, "counter"))
    assert int(await ask(engine, source.id, "counter")) >= before
    snapshot = await engine.snapshot(source.id, kind=LIVE, name="wanted")
    assert snapshot.name == "wanted"


@pytest.mark.parametrize("where", ["after", "seal"])
async def test_a_failed_standby_leaves_the_guest_running(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source = await running(engine)
    await ask(engine, source.id, "set", "key", "value")
    monkeypatch.setattr(MemoryCapture if where == "after" else capturing, where, full_disk)
    with pytest.raises(StorageFull):
        await engine.standby(source.id)
    monkeypatch.undo()
    assert engine.find_instance(source.id).state is InstanceState.RUNNING
    assert await ask(engine, source.id, "get", "key") == "value"
    assert not list((tmp_path / "instances" / source.id).glob("standby*"))


async def test_a_fork_that_cannot_be_loaded_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    before = traces(tmp_path)
    monkeypatch.setattr(loaded, "load", refused)
    with pytest.raises(VmmFailure):
        await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    monkeypatch.undo()
    assert sorted(traces(tmp_path)) == sorted(before)
    assert [i.name for i in engine.list_instances()] == ["source"]
    assert (
        await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    ).state is InstanceState.RUNNING


async def test_a_cancelled_snapshot_lets_the_guest_go_on(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    loop = asyncio.get_running_loop()
    measure = Phases.measure
    phases = (await engine.snapshot(source.id, kind=LIVE)).timings_ms.keys() - {"total"}
    for phase in sorted(phases):
        tasks: list[asyncio.Task[Any]] = []

        def cancelled_in(
            phases: Phases, name: str, phase: str = phase, tasks: list[asyncio.Task[Any]] = tasks
        ) -> Any:
            if name == phase:
                loop.call_soon_threadsafe(tasks[0].cancel)
            return measure(phases, name)

        monkeypatch.setattr(Phases, "measure", cancelled_in)
        tasks.append(asyncio.create_task(engine.snapshot(source.id, kind=LIVE)))
        await asyncio.gather(*tasks, return_exceptions=True)
        await expect_going_on(engine, source.id)
    known = {snapshot.id for snapshot in engine.list_snapshots()}
    assert {path.name for path in (tmp_path / "snapshots").iterdir()} == known


async def test_a_standby_cancelled_during_the_pause_lets_the_guest_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    reading = MemoryCapture.still
    loop = asyncio.get_running_loop()

    def cancel_meanwhile(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(task.cancel)
        return reading(*arguments)

    monkeypatch.setattr(MemoryCapture, "still", cancel_meanwhile)
    task = asyncio.create_task(engine.standby(source.id))
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    await expect_going_on(engine, source.id)


async def test_damaged_device_state_is_refused_and_the_snapshot_kept(
    engine: Engine, tmp_path: Path
) -> None:
    source = await running(engine)
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    devices = tmp_path / "snapshots" / snapshot.id / "devices"
    data = bytearray(devices.read_bytes())
    data[len(data) // 2] ^= 1
    devices.write_bytes(data)
    with pytest.raises(DamagedData):
        await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    assert [s.id for s in engine.list_snapshots()] == [snapshot.id]
    assert [i.name for i in engine.list_instances()] == ["source"]


async def test_a_fork_without_an_identity_of_its_own_is_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    monkeypatch.setattr(greeting, "identify_guest", silent)
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    with pytest.raises(StillframeError):  # nobody talks to it before it is itself
        await engine.exec(fork.id, ExecRequest(("true",)))
    result = await engine.wait(fork.id, state=InstanceState.STOPPED, timeout=timedelta(seconds=30))
    assert result.state is InstanceState.STOPPED
    assert "identity" in (result.state_error or "")
    assert fork.id not in engine.context.live


async def test_a_failed_restore_in_place_puts_the_old_state_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    await ask(engine, source.id, "set", "key", "old")
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    await ask(engine, source.id, "set", "key", "new")
    await engine.standby(source.id)
    monkeypatch.setattr(loaded, "load", refused)
    with pytest.raises(VmmFailure):
        await engine.restore_snapshot(source.id, snapshot.id)
    monkeypatch.undo()
    assert engine.find_instance(source.id).state is InstanceState.STANDBY
    await engine.restore(source.id)
    assert await ask(engine, source.id, "get", "key") == "new"
    await engine.standby(source.id)
    await engine.restore_snapshot(source.id, snapshot.id)
    assert await ask(engine, source.id, "get", "key") == "old"


async def test_a_fork_reaches_every_allowed_state(engine: Engine) -> None:
    source = await running(engine)
    await ask(engine, source.id, "set", "key", "value")
    live = await engine.snapshot(source.id, kind=LIVE)
    asleep = await engine.fork_snapshot(live.id, ForkRequest("a", InstanceState.STANDBY))
    stopped = await engine.fork_snapshot(live.id, ForkRequest("b", InstanceState.STOPPED))
    assert (asleep.state, stopped.state) == (InstanceState.STANDBY, InstanceState.STOPPED)
    await engine.restore(asleep.id)
    assert await ask(engine, asleep.id, "get", "key") == "value"
    await engine.stop(source.id)
    disk = await engine.snapshot(source.id, kind=DISK)
    with pytest.raises(InvalidRequest):
        await engine.fork_snapshot(disk.id, ForkRequest("c", InstanceState.STANDBY))
    assert (await engine.fork_snapshot(disk.id, ForkRequest("c"))).state is InstanceState.STOPPED


async def test_a_new_engine_adopts_what_runs_and_ends_what_it_does_not_know(
    tmp_path: Path,
) -> None:
    first = make_engine(tmp_path)
    await first.open()
    try:
        source = await running(first)
        await ask(first, source.id, "set", "key", "value")
        stranger = await running(first, "stranger")
    finally:
        await first.close()  # the VMs run on
    async with open_engine(tmp_path) as second:
        assert await ask(second, source.id, "get", "key") == "value"
        second.context.records.drop_instance(stranger.id)
    async with open_engine(tmp_path) as third:
        pid = stranger.process.pid if stranger.process else 0
        assert f"pid {pid}" not in traces(tmp_path)
        assert [i.id for i in third.list_instances()] == [source.id]


class CrashError(BaseException):
    """Stands for kill -9: no clean-up of ours may run."""


@pytest.mark.parametrize("step", ["seal", "publish", "put_snapshot"])
async def test_a_crash_during_a_snapshot_is_undone_and_the_source_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    engine = make_engine(tmp_path)
    await engine.open()
    source = await running(engine)
    records = engine.context.records

    def crash(*_: object, **__: object) -> Any:
        raise CrashError

    async def leave(_: Path) -> None:
        """A dead server cleans nothing up."""

    monkeypatch.setattr("stillframe.engine.verbs.snapshot.remove", leave)
    monkeypatch.setattr(records, "fulfil", lambda _: None)
    targets: dict[str, Any] = {"seal": capturing, "put_snapshot": records}
    if step == "publish":
        monkeypatch.setattr("stillframe.engine.verbs.snapshot.publish", crash)
    else:
        monkeypatch.setattr(targets[step], step, crash)
    with pytest.raises(CrashError):
        await engine.snapshot(source.id, kind=LIVE, name="lost")
    assert list((tmp_path / "snapshots").iterdir())
    await engine.close()
    monkeypatch.undo()
    async with open_engine(tmp_path) as again:
        assert again.list_snapshots() == []
        assert not list((tmp_path / "snapshots").iterdir())
        assert again.find_instance(source.id).state is InstanceState.RUNNING
        assert (await again.snapshot(source.id, kind=LIVE, name="lost")).name == "lost"


async def test_a_guest_left_standing_still_by_a_crash_runs_again(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    await engine.open()
    source = await running(engine)
    await engine.context.live[source.id].machine.pause()
    await engine.close()
    async with open_engine(tmp_path) as again:
        await expect_going_on(again, source.id)


async def test_after_a_host_reboot_standby_restores_and_running_is_stopped(
    tmp_path: Path,
) -> None:
    """F39."""
    engine = make_engine(tmp_path)
    await engine.open()
    awake, asleep = await running(engine, "awake"), await running(engine, "asleep")
    await ask(engine, asleep.id, "set", "key", "value")
    await engine.standby(asleep.id)
    await engine.close()
    kill_orphans(tmp_path / "instances", ())
    async with open_engine(tmp_path) as again:
        assert again.find_instance(awake.id).state is InstanceState.STOPPED
        await again.restore(asleep.id)
        assert await ask(again, asleep.id, "get", "key") == "value"


async def test_a_vmm_that_dies_during_a_snapshot_fails_it_and_is_recorded(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F25."""
    source = await running(engine)
    assert source.process is not None
    pid = source.process.pid

    def die(*_: object) -> Any:
        os.kill(pid, 9)
        raise VmmFailure("gone")

    monkeypatch.setattr(MemoryCapture, "still", die)
    with pytest.raises(VmmFailure):
        await engine.snapshot(source.id, kind=LIVE)
    monkeypatch.undo()
    result = await engine.wait(
        source.id, state=InstanceState.STOPPED, timeout=timedelta(seconds=30)
    )
    assert result.state is InstanceState.STOPPED
    assert not list((tmp_path / "snapshots").iterdir())
