"""Restores in place that fail and cannot be undone at once: the next verb undoes them first."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.verbs import restore_snapshot as restoring
from stillframe.host.files import exchange
from stillframe.model.errors import HostFailure, VmmFailure
from stillframe.model.states import InstanceState
from stillframe.model.units import MIB
from stillframe.model.values import (
    CompressionAlgorithm,
    CompressionConfig,
    Instance,
    Snapshot,
    SnapshotKind,
)
from stillframe.store.records import Intent
from stillframe.vmm.fake.driver import FakeMachine
from support.engine import ask, open_engine, running, traces

pytestmark = pytest.mark.usefixtures("vms_end")

LIVE = SnapshotKind.STANDBY
NEWEST = b"the newest state"
PLACE = 20 * MIB
WAYS = ["its VMM does not end", "its files cannot be put back"]


async def refused(self: FakeMachine) -> None:
    raise VmmFailure("the VMM refuses")


def cannot_exchange(one: Path, other: Path) -> None:
    raise OSError(5, "Input/output error")


def exchange_there_only(one: Path, other: Path) -> None:
    """Changes the places once; back it fails."""
    if (other / ".restored").exists():
        cannot_exchange(one, other)
    exchange(one, other)


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, way: str) -> Iterator[None]:
    """Guests may not run, and what was done for them cannot be undone."""
    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "resume", refused)
        if way == WAYS[0]:
            patch.setattr(FakeMachine, "kill", refused)
        else:
            patch.setattr(restoring, "exchange", exchange_there_only)
        yield


def disk(engine: Engine, instance_id: str) -> Path:
    return engine.context.data.instance(instance_id).overlay


def write(path: Path, data: bytes, place: int = PLACE) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def read(path: Path, place: int = PLACE) -> bytes:
    with path.open("rb") as file:
        file.seek(place)
        return file.read(len(NEWEST))


async def not_undone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, way: str
) -> tuple[Instance, Snapshot]:
    """A Stopped instance whose disk is beside, and the snapshot whose disk is in its place."""
    source = await running(engine)
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    source = await engine.stop(source.id)
    write(disk(engine, source.id), NEWEST)
    with failing(monkeypatch, way), pytest.raises(HostFailure):
        await engine.restore_snapshot(source.id, snapshot.id)
    assert engine.find_instance(source.id).state is InstanceState.STOPPED
    assert read(disk(engine, source.id)) != NEWEST
    return source, snapshot


async def up(engine: Engine, instance_id: str) -> Instance:
    minute = timedelta(seconds=60)
    await engine.wait(instance_id, state=InstanceState.RUNNING, timeout=minute)
    return engine.find_instance(instance_id)


# -- the verbs after it ---------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
async def test_the_same_again_does_what_was_wanted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    source, snapshot = await not_undone(engine, monkeypatch, way)
    restored = await engine.restore_snapshot(source.id, snapshot.id)
    assert restored.state is InstanceState.RUNNING
    assert await ask(engine, source.id, "echo", "here") == "here"
    assert read(disk(engine, source.id)) != NEWEST
    assert engine.context.records.intents == {}


@pytest.mark.parametrize("way", WAYS)
async def test_the_same_again_that_fails_again_keeps_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    async with open_engine(tmp_path) as engine:
        source, snapshot = await not_undone(engine, monkeypatch, way)
        with failing(monkeypatch, way):
            with pytest.raises(HostFailure, match="cannot be undone yet") as caught:
                await engine.restore_snapshot(source.id, snapshot.id)
            assert "try again" in (caught.value.hint or "")
            with pytest.raises(HostFailure, match="cannot be undone yet"):
                await engine.start(source.id)
    async with open_engine(tmp_path) as engine:
        assert engine.find_instance(source.id).state is InstanceState.STOPPED
        assert read(disk(engine, source.id)) == NEWEST
        assert sorted(traces(tmp_path)) == [f"instances/{source.id}", f"snapshots/{snapshot.id}"]


async def start(engine: Engine, source: Instance) -> Path:
    await engine.start(source.id)
    return disk(engine, source.id)


async def snapshot(engine: Engine, source: Instance) -> Path:
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)
    return engine.context.data.snapshot(taken.id).overlay


async def fork(engine: Engine, source: Instance) -> Path:
    forked = await engine.fork(source.id, name="fork")
    return disk(engine, forked.id)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", [start, snapshot, fork])
async def test_every_verb_works_on_the_instance_s_own_disk(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    verb: Callable[[Engine, Instance], Awaitable[Path]],
) -> None:
    source, _ = await not_undone(engine, monkeypatch, way)
    assert read(await verb(engine, source)) == NEWEST


@pytest.mark.parametrize("way", WAYS)
async def test_what_is_done_since_is_there_at_the_next_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    later = PLACE + MIB
    async with open_engine(tmp_path) as engine:
        source, _ = await not_undone(engine, monkeypatch, way)
        await engine.start(source.id)
        before = await up(engine, source.id)
        write(disk(engine, source.id), NEWEST, later)
        await engine.close()
        async with open_engine(tmp_path) as again:
            assert again.find_instance(source.id).process == before.process
            assert await ask(again, source.id, "echo", "here") == "here"
            assert read(disk(again, source.id)) == NEWEST
            assert read(disk(again, source.id), later) == NEWEST


@pytest.mark.parametrize("way", WAYS)
async def test_a_deletion_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    source, taken = await not_undone(engine, monkeypatch, way)
    await engine.delete(source.id)
    assert traces(tmp_path) == [f"snapshots/{taken.id}"]
    assert engine.context.records.intents == {}


# -- what can only not be removed -----------------------------------------------------------------
def cannot_remove(path: Path) -> None:
    raise OSError(5, "Input/output error")


async def with_a_remainder(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Instance:
    """A Stopped instance with its own state, whose failed restore in place left a directory."""
    source = await running(engine)
    taken = await engine.snapshot(source.id, kind=LIVE)
    source = await engine.stop(source.id)
    write(disk(engine, source.id), NEWEST)
    with monkeypatch.context() as patch:

        async def run(*_: object, **__: object) -> Instance:
            patch.setattr(restoring, "remove_tree", cannot_remove)
            raise VmmFailure("the VMM refuses")

        patch.setattr(restoring, "_run", run)
        with pytest.raises(VmmFailure):
            await engine.restore_snapshot(source.id, taken.id)
    assert engine.context.data.instance_staged(source.id).directory.exists()
    return source


async def test_a_remainder_of_a_restore_in_place_ends_no_vm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_engine(tmp_path) as engine:
        source = await with_a_remainder(engine, monkeypatch)
        await engine.start(source.id)
        before = await up(engine, source.id)
        await engine.close()
        async with open_engine(tmp_path) as again:
            assert again.find_instance(source.id).process == before.process
            assert await ask(again, source.id, "echo", "here") == "here"
            assert read(disk(again, source.id)) == NEWEST
            assert not again.context.data.instance_staged(source.id).directory.exists()


async def test_a_deletion_takes_the_remainder_along(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await with_a_remainder(engine, monkeypatch)
    await engine.delete(source.id)
    assert [trace for trace in traces(tmp_path) if source.id in trace] == []


async def test_a_deletion_that_a_server_did_not_finish_takes_the_remainder_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_engine(tmp_path) as engine:
        source = await with_a_remainder(engine, monkeypatch)
        engine.context.records.intend(Intent(source.id, "delete", {}))
    async with open_engine(tmp_path) as engine:
        assert engine.list_instances() == []
        assert [trace for trace in traces(tmp_path) if source.id in trace] == []


# -- what goes on in the background ---------------------------------------------------------------
async def test_logs_are_looked_at_though_it_cannot_be_undone_yet(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = await not_undone(engine, monkeypatch, WAYS[0])
    context = engine.context
    context.settings = replace(context.settings, max_log_bytes=0)
    with failing(monkeypatch, WAYS[0]):
        assert source.id in context.live
        await context.logs.look()
    assert source.id in context.records.intents


async def test_a_state_in_the_wrong_place_is_not_compressed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    taken = await engine.snapshot(source.id, kind=LIVE)
    config = CompressionConfig(True, CompressionAlgorithm.LZ4, 1)
    await engine.standby(source.id, compression=config, compression_delay=timedelta(hours=1))
    compressor = engine.context.compressor
    assert source.id in compressor._jobs
    with failing(monkeypatch, WAYS[1]), pytest.raises(HostFailure):
        await engine.restore_snapshot(source.id, taken.id)
    assert source.id not in compressor._jobs
    await engine.fork(source.id, name="fork")
    assert source.id in compressor._jobs
