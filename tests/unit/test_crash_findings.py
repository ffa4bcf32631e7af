"""What the crash harness found in the verbs, each as the scenario that shows it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping.expanded import link_in_place
from stillframe.host.files import exchange, remove_tree
from stillframe.host.orphans import kill_orphans, processes_naming
from stillframe.host.sockets import bind_unix
from stillframe.model.errors import HostFailure, StorageFull
from stillframe.model.retention import Retention
from stillframe.model.schedules import ScheduleRequest, marks
from stillframe.model.states import InstanceState
from stillframe.model.values import Instance, SnapshotKind
from stillframe.store.paths import DataDirectory
from stillframe.store.records import Intent, Records
from support.engine import ask, make_engine, open_engine, running, traces
from support.payloads import listing, verified

LIVE = SnapshotKind.STANDBY
AT_REST = ["config.raw", "logs", "overlay.raw"]


@contextlib.contextmanager
def full() -> Iterator[Any]:
    raise StorageFull("the records could not be written")
    yield


async def test_the_digests_of_an_earlier_memory_image_do_not_vouch_for_a_fresh_one(
    engine: Engine,
) -> None:
    source = await running(engine)
    await engine.standby(source.id)
    await engine.restore(source.id)  # it maps an image with digests now
    await engine.stop(source.id)
    await engine.start(source.id)
    await running_again(engine, source.id)
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    assert verified(engine.context.data.snapshot(snapshot.id)).damage == ()


async def running_again(engine: Engine, identifier: str) -> None:
    await engine.wait(identifier, state=InstanceState.RUNNING, timeout=timedelta(seconds=60))


async def test_an_instance_at_rest_keeps_nothing_of_its_vmm(engine: Engine) -> None:
    source = await running(engine)
    directory = engine.context.data.instance(source.id).directory
    await engine.standby(source.id)
    assert listing(directory) == [*AT_REST, "standby"]
    await engine.restore(source.id)
    await engine.stop(source.id)
    assert listing(directory) == AT_REST


async def test_a_start_clears_what_a_killed_start_left_of_a_vmm(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await engine.stop(source.id)
        directory = engine.context.data.instance(source.id).directory
    bind_unix(directory / "control.sock").close()
    for name in ("memory", "memory.blake3", "memory.new", "config.raw.new"):
        (directory / name).write_bytes(b"x")
    async with open_engine(tmp_path):
        assert listing(directory) == AT_REST


async def test_a_delete_that_was_cut_off_after_its_vmm_is_finished_by_the_next_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tmp_path)
    await engine.open()
    source = await running(engine)

    class CutOffError(BaseException):
        """Stands for kill -9."""

    def cut_off(_: Path) -> None:
        raise CutOffError

    monkeypatch.setattr("stillframe.engine.verbs.stop.remove_tree", cut_off)
    with pytest.raises(CutOffError):
        await engine.delete(source.id)
    await engine.close()
    async with open_engine(tmp_path) as again:
        assert again.list_instances() == []
        assert traces(tmp_path) == []


async def test_files_that_cannot_be_removed_leave_a_stopped_instance_that_can_be_deleted_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)

    def refuse(_: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("stillframe.engine.verbs.stop.remove_tree", refuse)
        with pytest.raises(HostFailure):
            await engine.delete(source.id)
    left = engine.find_instance(source.id)
    assert (left.state, left.process) == (InstanceState.STOPPED, None)
    assert "delete it again" in (left.state_error or "")
    await engine.delete(source.id)
    assert traces(tmp_path) == []


def test_a_removal_that_fails_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "file").touch()
    tries: list[bool] = []
    real = shutil.rmtree

    def failing_once(path: Path, ignore_errors: bool = False) -> None:
        tries.append(ignore_errors)
        if len(tries) > 1:
            real(path)

    monkeypatch.setattr(shutil, "rmtree", failing_once)
    remove_tree(tree)
    assert not tree.exists()
    assert tries == [True, False]


async def test_a_disk_that_stays_full_leaves_no_intent_once_there_is_room(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    records = engine.context.records
    with monkeypatch.context() as patch:

        def publish(*_: object) -> None:  # from here on nothing can be written
            patch.setattr(records, "transaction", full)

        patch.setattr("stillframe.engine.verbs.snapshot.publish", publish)
        with pytest.raises(StorageFull):
            await engine.snapshot(source.id, kind=LIVE, name="wanted")
    assert records.intents == {}
    assert (await engine.snapshot(source.id, kind=LIVE, name="wanted")).name == "wanted"
    again = Records(DataDirectory(tmp_path).database)
    assert again.intents == {}
    again.close()


def test_what_cannot_be_taken_back_now_goes_with_the_next_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "db")
    records.intend(Intent("one", "snapshot", {}))
    with monkeypatch.context() as patch:
        patch.setattr(records, "transaction", full)
        records.fulfil("one")
    assert records.intents == {}
    crashed = Records(tmp_path / "db")  # the intent still stands for it
    assert list(crashed.intents) == ["one"]
    crashed.close()
    records.intend(Intent("two", "snapshot", {}))
    records.close()
    again = Records(tmp_path / "db")
    assert list(again.intents) == ["two"]
    again.close()


async def test_a_stop_on_a_full_disk_stops(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.context.records, "transaction", full)
        stopped = await engine.stop(source.id)
    assert stopped.state is InstanceState.STOPPED
    assert engine.find_instance(source.id).state is InstanceState.STOPPED
    assert not processes_naming(tmp_path / "instances")


async def test_orphans_are_dead_when_they_have_been_killed(engine: Engine, tmp_path: Path) -> None:
    source = await running(engine)
    await ask(engine, source.id, "true")
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    killed = await asyncio.to_thread(kill_orphans, tmp_path / "instances", ())
    assert len(killed) == 2
    assert not processes_naming(tmp_path / "instances")


async def test_what_cannot_be_undone_at_a_start_does_not_keep_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await engine.stop(source.id)
        lost = engine.context.new_id()
        engine.context.records.intend(Intent(lost, "snapshot", {}))

    def refuse(path: Path) -> None:
        if lost in path.name:
            raise OSError(5, "Input/output error")
        remove_tree(path)

    with monkeypatch.context() as patch:
        patch.setattr("stillframe.engine.verbs.recover.remove_tree", refuse)
        async with open_engine(tmp_path) as again:
            assert [i.id for i in again.list_instances()] == [source.id]
            assert list(again.context.records.intents) == [lost]  # for the next start
    async with open_engine(tmp_path) as third:
        assert third.context.records.intents == {}


async def test_the_vmm_of_an_instance_whose_record_cannot_be_read_is_left_alone(
    tmp_path: Path,
) -> None:
    engine = make_engine(tmp_path)
    await engine.open()
    source = await running(engine)
    with engine.context.records.transaction() as sql:
        sql.execute("UPDATE instances SET document = '{' WHERE id = ?", (source.id,))
    await engine.close()
    async with open_engine(tmp_path) as again:
        assert again.list_instances() == []
        assert source.process is not None
        assert processes_naming(tmp_path / "instances") == [source.process.pid]


async def test_a_template_that_was_half_made_goes_at_the_next_start(tmp_path: Path) -> None:
    async with open_engine(tmp_path):
        (tmp_path / "templates" / ".overlay-1.ext4.half").touch()
    async with open_engine(tmp_path):
        assert listing(tmp_path / "templates") == []


async def test_a_guest_that_is_ready_runs_though_it_cannot_be_written_down_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_engine(tmp_path) as engine:
        records = engine.context.records
        write = records.put_instance

        def refuse(instance: Instance, *, can_wait: bool = False, **rest: Any) -> None:
            if instance.state is InstanceState.RUNNING and not can_wait:
                raise HostFailure("the records cannot be written: Input/output error")
            write(instance, can_wait=can_wait, **rest)

        monkeypatch.setattr(records, "put_instance", refuse)
        await running(engine)


async def test_retention_that_a_killed_server_owed_is_done_by_the_next(tmp_path: Path) -> None:
    """F23: the run's snapshot is there, and the end came before the oldest was deleted."""
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        wanted = ScheduleRequest(Retention(max_count=1), interval=timedelta(days=1))
        engine.set_schedule(source.id, wanted)
        first = await engine.run_schedule(source.id)
        schedule = engine.find_schedule(source.id)
        second = await engine.snapshot(
            source.id, kind=SnapshotKind.STANDBY, name="second", tags=marks(source.id)
        )
        engine.context.records.put_schedule(
            replace(schedule, pending="second", last_snapshot_id=None)
        )
    async with open_engine(tmp_path) as engine:
        await engine.scheduler.settled()
        assert [snapshot.id for snapshot in engine.list_snapshots()] == [second.id]
        settled = engine.find_schedule(source.id)
        assert (settled.pending, settled.last_snapshot_id) == (None, second.id)
        assert first.last_snapshot_id != second.id


def test_a_link_that_cannot_take_its_place_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore on a full disk left ``memory.new`` with the sleeping instance."""
    (tmp_path / "image").touch()

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        link_in_place(tmp_path / "image", tmp_path / "memory")
    assert listing(tmp_path) == ["image"]


async def test_a_restore_that_fails_on_a_full_disk_gives_the_old_state_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old state waited beside, and a rename back that needed space left it there."""
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await ask(engine, source.id, "set", "nonce", "past")
        past = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
        await ask(engine, source.id, "set", "nonce", "present")
        await engine.standby(source.id)

        def refuse(self: Path, target: Path) -> Path:
            raise OSError(28, "No space left on device")

        async def fail(*_: object, **__: object) -> None:
            monkeypatch.setattr(Path, "rename", refuse)
            monkeypatch.setattr(Path, "replace", refuse)
            raise StorageFull("no space")

        with monkeypatch.context() as patch:
            patch.setattr("stillframe.engine.verbs.restore_snapshot._run", fail)
            with pytest.raises(StorageFull):
                await engine.restore_snapshot(source.id, past.id)
        monkeypatch.undo()
        assert [path.name for path in (tmp_path / "instances").iterdir()] == [source.id]
        assert engine.context.records.intents == {}
        await engine.restore(source.id)
        assert await ask(engine, source.id, "get", "nonce") == "present"


@pytest.mark.parametrize("swapped", [False, True])
async def test_a_restore_that_a_server_did_not_finish_is_taken_back_by_the_next(
    tmp_path: Path, swapped: bool
) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await ask(engine, source.id, "set", "nonce", "present")
        await engine.standby(source.id)
        engine.context.records.intend(Intent(source.id, "restore snapshot", {}))
        current = engine.context.data.instance(source.id)
        staged = engine.context.data.instance_staged(source.id)
        shutil.copytree(current.directory, staged.directory)
        (staged.standby.memory).write_bytes(b"of another time")
        staged.restored.touch()
        if swapped:
            exchange(staged.directory, current.directory)
    async with open_engine(tmp_path) as engine:
        assert [path.name for path in (tmp_path / "instances").iterdir()] == [source.id]
        await engine.restore(source.id)
        assert await ask(engine, source.id, "get", "nonce") == "present"
