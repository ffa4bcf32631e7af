"""Snapshots and standby images become compressed in the background, and serve as before.

The numbers are those of the fault catalogue: F13-F15, F39 and F64.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ForkRequest
from stillframe.engine.keeping import compression as keeping
from stillframe.host.orphans import kill_orphans
from stillframe.model.errors import DamagedData, InvalidRequest, InvalidState, VmmFailure
from stillframe.model.states import InstanceState
from stillframe.model.values import (
    CompressionAlgorithm,
    CompressionConfig,
    CompressionState,
    Instance,
    Snapshot,
    SnapshotKind,
    SnapshotPolicy,
)
from stillframe.store import compression as storing
from stillframe.store.payloads import check, measure, memory_file
from support.clock import START, SetClock
from support.engine import ask, make_engine, open_engine, running, traces
from support.payloads import flip

LIVE, DISK = SnapshotKind.STANDBY, SnapshotKind.STOPPED
ZSTD = CompressionConfig(True, CompressionAlgorithm.ZSTD, 1)
LZ4 = CompressionConfig(True, CompressionAlgorithm.LZ4, 0)
OFF = CompressionConfig(False)


@pytest.fixture(autouse=True)
def no_vm_is_left(tmp_path: Path) -> Iterator[None]:
    """End the VMs of engines that were closed on purpose, also when their scenario fails."""
    yield
    kill_orphans(tmp_path / "instances", ())


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with open_engine(tmp_path) as opened:
        yield opened


class Gate:
    """Stands in for ``compress``: says that it was reached, then waits to be let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.cancelled = False
        monkeypatch.setattr(keeping, "compress", self)

    def __call__(
        self, source: Path, destination: Path, *rest: Any, cancelled: Callable[[], bool]
    ) -> Any:
        """Leave what an unfinished attempt would leave, while it waits."""
        destination.write_bytes(b"unfinished")
        self.reached.set()
        while not self.opened.wait(0.002):
            if cancelled():
                self.cancelled = True
                return None
        destination.unlink()
        return storing.compress(source, destination, *rest, cancelled=cancelled)

    async def until_reached(self) -> None:
        """Return when a compression is at work."""
        assert await asyncio.to_thread(self.reached.wait, 30)


async def captured(engine: Engine, config: CompressionConfig | None = None) -> Snapshot:
    source = await running(engine)
    await ask(engine, source.id, "set", "who", "source")
    return await engine.snapshot(source.id, kind=LIVE, compression=config)


async def settled(engine: Engine, snapshot_id: str) -> Snapshot:
    """The snapshot once its compression is done."""
    async with asyncio.timeout(60):
        await engine.context.compressor.settled(snapshot_id)
    return engine.find_snapshot(snapshot_id)


async def compressed(engine: Engine, config: CompressionConfig = ZSTD) -> Snapshot:
    snapshot = await settled(engine, (await captured(engine, config)).id)
    assert snapshot.compression_state is CompressionState.COMPRESSED, snapshot.compression_error
    return snapshot


def image_of(engine: Engine, instance_id: str) -> os.stat_result:
    """What an instance maps."""
    return engine.context.data.instance(instance_id).memory.stat()


def expanded(engine: Engine) -> list[Path]:
    return sorted(engine.context.data.expanded.iterdir())


async def removed(engine: Engine) -> list[Path]:
    """The expanded images, when all that is being removed is gone."""
    await engine.context.expanded.close()
    return expanded(engine)


async def forked(engine: Engine, snapshot: Snapshot, name: str) -> Instance:
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest(name))
    assert await ask(engine, fork.id, "get", "who") == "source"
    return fork


# -- states ---------------------------------------------------------------------------------------
async def test_states_and_sizes_are_right_at_every_moment(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    taken = await captured(engine, CompressionConfig(True))
    payload = engine.context.data.snapshot(taken.id)
    assert (taken.compression_state, taken.compression) == (CompressionState.COMPRESSING, ZSTD)
    assert (taken.compressed_size_bytes, taken.uncompressed_size_bytes) == (None, None)
    await gate.until_reached()
    assert engine.find_snapshot(taken.id) == taken
    assert payload.memory.exists()
    with engine.context.listening(taken.id) as changed:
        gate.opened.set()
        async with asyncio.timeout(60):
            await changed.wait()
    done = await settled(engine, taken.id)
    stored = payload.directory / "memory.zst"
    assert (done.compression_state, done.compression) == (CompressionState.COMPRESSED, ZSTD)
    assert done.compressed_size_bytes == stored.stat().st_size < taken.size_bytes
    assert done.uncompressed_size_bytes == taken.template.memory_bytes
    assert done.size_bytes == sum(path.stat().st_size for path in payload.directory.iterdir())
    assert done.stored_bytes == measure(payload).stored
    assert memory_file(payload) == (stored, CompressionAlgorithm.ZSTD)
    assert not payload.memory.exists()
    assert 'stillframe_operation_duration_seconds_count{operation="compress"} 1' in (
        engine.metrics().decode()
    )


async def test_without_a_wish_the_memory_stays_raw(engine: Engine) -> None:
    taken = await captured(engine)
    assert (taken.compression_state, taken.compression) == (CompressionState.NONE, None)
    assert await settled(engine, taken.id) == taken
    assert engine.context.data.snapshot(taken.id).memory.exists()


async def test_one_is_compressed_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    first = await captured(engine, ZSTD)
    second = await engine.snapshot(first.source_instance_id, kind=LIVE, compression=LZ4)
    await gate.until_reached()
    built = [
        engine.context.data.snapshot(snapshot.id).directory.glob(".memory.*")
        for snapshot in (first, second)
    ]
    assert [len(list(paths)) for paths in built] == [1, 0]
    gate.opened.set()
    for snapshot in (first, second):
        done = await settled(engine, snapshot.id)
        assert done.compression_state is CompressionState.COMPRESSED
        check(engine.context.data.snapshot(snapshot.id))


@pytest.mark.parametrize(
    ("requested", "policy", "default", "expected"),
    [
        (LZ4, ZSTD, ZSTD, LZ4),
        (None, LZ4, ZSTD, LZ4),
        (None, None, LZ4, LZ4),
        (None, None, None, None),
        (OFF, ZSTD, ZSTD, None),
        (None, OFF, ZSTD, None),
        (CompressionConfig(True, CompressionAlgorithm.LZ4), None, None, LZ4),
    ],
)
async def test_the_request_decides_then_the_instance_then_the_server(
    tmp_path: Path,
    requested: CompressionConfig | None,
    policy: CompressionConfig | None,
    default: CompressionConfig | None,
    expected: CompressionConfig | None,
) -> None:
    engine = make_engine(tmp_path)
    engine.context.settings = replace(engine.context.settings, default_compression=default)
    async with open_engine(tmp_path, engine):
        source = await running(engine)
        of_instance = replace(source, snapshot_policy=SnapshotPolicy(policy))
        assert keeping.chosen(engine.context, of_instance, requested) == expected


async def test_a_policy_works_on_snapshots_and_a_disk_snapshot_has_no_memory(
    engine: Engine,
) -> None:
    source = await engine.create(
        CreateRequest("source", "stillframe/base", snapshot_policy=SnapshotPolicy(LZ4))
    )
    await engine.wait(source.id, state=InstanceState.RUNNING, timeout=timedelta(seconds=60))
    taken = await engine.snapshot(source.id, kind=LIVE)
    assert taken.compression == LZ4
    done = await settled(engine, taken.id)
    assert done.compression_state is CompressionState.COMPRESSED
    raw = await engine.snapshot(source.id, kind=LIVE, compression=OFF)
    assert (raw.compression, raw.compression_state) == (None, CompressionState.NONE)
    await engine.stop(source.id)
    disk = await engine.snapshot(source.id, kind=DISK)
    assert (disk.compression, disk.compression_state) == (None, CompressionState.NONE)
    with pytest.raises(InvalidRequest):
        await engine.snapshot(source.id, kind=DISK, compression=ZSTD)


async def test_a_level_that_is_none_is_refused_before_the_guest_is_paused(engine: Engine) -> None:
    source = await running(engine)
    wrong = CompressionConfig(True, CompressionAlgorithm.ZSTD, 20)
    with pytest.raises(InvalidRequest) as caught:
        await engine.snapshot(source.id, kind=LIVE, compression=wrong)
    assert caught.value.code == "invalid_snapshot_compression"
    with pytest.raises(InvalidRequest):
        await engine.standby(source.id, compression=wrong)
    assert engine.find_instance(source.id).state is InstanceState.RUNNING
    assert engine.context.records.intents == {}


async def test_no_space_while_compressing_keeps_the_raw_image_and_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, destination: Path, *rest: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keeping, "compress", full)
    taken = await captured(engine, ZSTD)
    done = await settled(engine, taken.id)
    assert (done.compression_state, done.compression) == (CompressionState.ERROR, ZSTD)
    assert "No space left" in (done.compression_error or "")
    assert done.size_bytes == taken.size_bytes
    payload = engine.context.data.snapshot(taken.id)
    assert payload.memory.exists()
    check(payload)
    await forked(engine, done, "fork")
    assert 'failures_total{code="storage_full",operation="compress"} 1' in engine.metrics().decode()


# -- forks and restores ---------------------------------------------------------------------------
@pytest.mark.parametrize("config", [ZSTD, LZ4], ids=["zstd", "lz4"])
async def test_forks_share_one_expanded_image_and_the_stored_object_stays(
    engine: Engine, config: CompressionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    snapshot = await captured(engine, config)
    await gate.until_reached()
    raw = engine.context.data.snapshot(snapshot.id).memory.read_bytes()
    gate.opened.set()
    snapshot = await settled(engine, snapshot.id)
    directory = engine.context.data.snapshot(snapshot.id).directory
    before = {path.name: path.stat().st_ino for path in directory.iterdir()}
    outcomes = await engine.fork_many(snapshot.id, [ForkRequest(f"fork-{n}") for n in range(4)])
    forks = [outcome.instance for outcome in outcomes if outcome.instance is not None]
    assert len(forks) == 4
    assert len({image_of(engine, fork.id).st_ino for fork in forks}) == 1
    assert image_of(engine, forks[0].id).st_nlink == 5  # and the one that others will link
    assert engine.context.data.instance(forks[0].id).memory.read_bytes() == raw
    assert "expand" in forks[0].timings_ms
    for fork in forks:
        assert await ask(engine, fork.id, "get", "who") == "source"
    assert {path.name: path.stat().st_ino for path in directory.iterdir()} == before
    assert engine.find_snapshot(snapshot.id) == snapshot
    await engine.delete_snapshot(snapshot.id)
    assert await ask(engine, forks[0].id, "get", "who") == "source"
    for fork in forks:
        assert expanded(engine)
        await engine.delete(fork.id, graceful=False)
    assert await removed(engine) == []


async def test_a_burst_of_forks_expands_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    expand = storing.expand

    def counted(source: Path, destination: Path, **options: Any) -> int | None:
        calls.append(source)
        return expand(source, destination, **options)

    monkeypatch.setattr(storing, "expand", counted)
    snapshot = await compressed(engine)
    await asyncio.gather(*(forked(engine, snapshot, f"fork-{n}") for n in range(3)))
    await forked(engine, snapshot, "later")
    assert len(calls) == 1


async def test_what_is_mapped_already_is_shared_with_forks_to_come(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    snapshot = await captured(engine, ZSTD)
    await gate.until_reached()
    before = await forked(engine, snapshot, "before")  # it does not wait, and calls nothing off
    gate.opened.set()
    done = await settled(engine, snapshot.id)
    assert done.compression_state is CompressionState.COMPRESSED
    after = await forked(engine, done, "after")
    assert image_of(engine, before.id).st_ino == image_of(engine, after.id).st_ino
    for fork in (before, after):
        await engine.delete(fork.id, graceful=False)
    assert await removed(engine) == []


async def test_warm_forks_share_the_expanded_image_too(engine: Engine) -> None:
    snapshot = await compressed(engine)
    await engine.set_warm(snapshot.id, 2)
    async with asyncio.timeout(60):
        status = await engine.context.warm.settled(snapshot.id)
    assert (status.ready, status.limited_by) == (2, None)
    warm = [fork.child.id for fork in engine.context.warm.waiting()]
    assert len({image_of(engine, child).st_ino for child in warm}) == 1
    await engine.set_warm(snapshot.id, 0)
    assert await removed(engine) == []


async def test_restore_in_place_from_a_compressed_snapshot(engine: Engine) -> None:
    snapshot = await compressed(engine)
    source = snapshot.source_instance_id
    await ask(engine, source, "set", "who", "changed")
    await engine.stop(source)
    restored = await engine.restore_snapshot(source, snapshot.id)
    assert restored.state is InstanceState.RUNNING
    assert await ask(engine, source, "get", "who") == "source"
    assert engine.find_snapshot(snapshot.id) == snapshot
    await engine.stop(source)
    asleep = await engine.restore_snapshot(source, snapshot.id, target_state=InstanceState.STANDBY)
    assert await removed(engine) == []
    standby = engine.context.data.instance(source).standby
    assert (standby.directory / "memory.zst").stat().st_nlink == 2  # nothing was expanded for it
    await engine.restore(asleep.id)
    assert await ask(engine, source, "get", "who") == "source"


async def test_a_damaged_compressed_image_is_refused_and_leaves_nothing(
    engine: Engine, tmp_path: Path
) -> None:
    snapshot = await compressed(engine)
    flip(engine.context.data.snapshot(snapshot.id).directory / "memory.zst", 40)
    before = traces(tmp_path)
    outcomes = await engine.fork_many(snapshot.id, [ForkRequest("one"), ForkRequest("two")])
    assert [type(outcome.error) for outcome in outcomes] == [DamagedData, DamagedData]
    assert traces(tmp_path) == before
    assert await removed(engine) == []
    assert engine.context.records.intents == {}


async def test_no_space_while_expanding_leaves_nothing_and_the_next_fork_works(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = await compressed(engine)
    before = traces(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storing, "write_sparse", full)
        (outcome,) = await engine.fork_many(snapshot.id, [ForkRequest("fork")])
        assert outcome.error is not None
        assert outcome.error.code == "storage_full"
    assert traces(tmp_path) == before
    assert await removed(engine) == []
    await forked(engine, snapshot, "fork")


async def test_a_fork_that_is_called_off_while_it_expands_leaves_the_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = await compressed(engine)
    reached, opened, expand = threading.Event(), threading.Event(), storing.expand

    def slow(*arguments: Any, **options: Any) -> int | None:
        reached.set()
        assert opened.wait(30)
        return expand(*arguments, **options)

    monkeypatch.setattr(storing, "expand", slow)
    first = asyncio.create_task(engine.fork_snapshot(snapshot.id, ForkRequest("first")))
    second = asyncio.create_task(engine.fork_snapshot(snapshot.id, ForkRequest("second")))
    assert await asyncio.to_thread(reached.wait, 30)
    use = next(iter(engine.context.expanded._uses.values()))
    while use.users < 2:  # noqa: ASYNC110 - until both wait for it
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    opened.set()
    assert await ask(engine, (await second).id, "get", "who") == "source"
    assert [i.name for i in engine.list_instances()] == ["source", "second"]


# -- deletion and restart -------------------------------------------------------------------------
async def test_deleting_while_compressing_calls_it_off(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    snapshot = await captured(engine, ZSTD)
    await gate.until_reached()
    async with asyncio.timeout(30):
        await engine.delete_snapshot(snapshot.id)
    assert gate.cancelled
    assert engine.list_snapshots() == []
    assert list(engine.context.data.snapshots.iterdir()) == []
    assert await removed(engine) == []


def _interrupted(directory: Path, at: str) -> None:
    """What a crash leaves: F13 mid-stream, F14 before the switch, F15 after it."""
    if at == "F13":
        (directory / ".memory.zst.new").write_bytes(b"half a frame")
        return
    target = directory / "memory.zst"
    storing.compress(directory / "memory", target, ZSTD)
    if at == "F14":
        return  # the raw image is still the valid one
    (directory / "memory").unlink()


@pytest.mark.parametrize("at", ["F13", "F14", "F15"])
async def test_what_a_crash_cut_off_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    with monkeypatch.context() as patch:
        gate = Gate(patch)
        first = make_engine(tmp_path)
        await first.open()
        snapshot = await captured(first, ZSTD)
        await gate.until_reached()
        await first.close()  # a server that is told to end calls it off
        assert gate.cancelled
    directory = first.context.data.snapshot(snapshot.id).directory
    raw = (directory / "memory").read_bytes()
    (directory / ".memory.zst.new").unlink()
    _interrupted(directory, at)
    async with open_engine(tmp_path) as second:
        assert second.find_snapshot(snapshot.id).compression_state is CompressionState.COMPRESSING
        done = await settled(second, snapshot.id)
        assert done.compression_state is CompressionState.COMPRESSED
        files = sorted(
            path.name for path in directory.iterdir() if path.name.startswith(("m", "."))
        )
        assert files == ["manifest.json", "memory.blake3", "memory.zst"]
        fork = await forked(second, done, "fork")
        assert second.context.data.instance(fork.id).memory.read_bytes() == raw
        for instance in second.list_instances():
            await second.delete(instance.id, graceful=False)


async def test_a_start_removes_expanded_images_that_nobody_maps(tmp_path: Path) -> None:
    first = make_engine(tmp_path)
    await first.open()
    snapshot = await compressed(first)
    fork = await forked(first, snapshot, "fork")
    (mapped,) = expanded(first)
    await first.close()
    (mapped.with_name("0" * 64)).write_bytes(b"nobody's")
    (mapped.with_name(f".{mapped.name}.new")).write_bytes(b"half")
    async with open_engine(tmp_path) as second:
        assert await removed(second) == [mapped]
        assert await ask(second, fork.id, "get", "who") == "source"
        again = await forked(second, snapshot, "again")
        assert image_of(second, again.id).st_ino == image_of(second, fork.id).st_ino


# -- standby --------------------------------------------------------------------------------------
async def asleep(engine: Engine, **options: Any) -> Instance:
    source = await running(engine)
    await ask(engine, source.id, "set", "who", "source")
    return await engine.standby(source.id, **options)


async def test_a_standby_image_is_compressed_and_restored(engine: Engine) -> None:
    source = await asleep(engine, compression=LZ4)
    async with asyncio.timeout(60):
        await engine.context.compressor.settled(source.id)
    standby = engine.context.data.instance(source.id).standby
    assert memory_file(standby) == (standby.directory / "memory.lz4", CompressionAlgorithm.LZ4)
    fork = await engine.fork(source.id, name="fork", target_state=InstanceState.RUNNING)
    restored = await engine.restore(source.id)
    assert "expand" in restored.timings_ms
    for instance in (fork, restored):
        assert await ask(engine, instance.id, "get", "who") == "source"
    assert image_of(engine, fork.id).st_ino == image_of(engine, source.id).st_ino
    await ask(engine, source.id, "set", "who", "later")
    await engine.standby(source.id, compression=OFF)
    assert standby.memory.exists()
    await engine.delete(fork.id, graceful=False)
    assert await removed(engine) == []
    await engine.restore(source.id)
    assert await ask(engine, source.id, "get", "who") == "later"


async def test_a_snapshot_of_a_compressed_standby_shares_it_or_is_as_it_was_asked_for(
    engine: Engine,
) -> None:
    source = await asleep(engine, compression=ZSTD)
    await engine.context.compressor.settled(source.id)
    same = await engine.snapshot(source.id, kind=LIVE, compression=ZSTD)
    assert (same.compression, same.compression_state) == (ZSTD, CompressionState.COMPRESSED)
    assert same.uncompressed_size_bytes == source.memory_bytes
    raw = await engine.snapshot(source.id, kind=LIVE)
    assert (raw.compression, raw.compression_state) == (None, CompressionState.NONE)
    assert engine.context.data.snapshot(raw.id).memory.exists()
    other = await engine.snapshot(source.id, kind=LIVE, compression=LZ4)
    assert (await settled(engine, other.id)).compression_state is CompressionState.COMPRESSED
    for number, snapshot in enumerate((same, raw, other)):
        check(engine.context.data.snapshot(snapshot.id))
        await forked(engine, snapshot, f"fork-{number}")


async def test_options_do_not_apply_to_who_is_in_standby_already(engine: Engine) -> None:
    source = await asleep(engine)
    with pytest.raises(InvalidState):
        await engine.standby(source.id, compression=ZSTD)
    with pytest.raises(InvalidRequest) as caught:
        keeping.delay_of(source, timedelta(seconds=-1))
    assert caught.value.code == "invalid_compression_delay"


class Sleep:
    """Stands in for time: says how long it was to wait, and ends when it is told to."""

    def __init__(self, engine: Engine) -> None:
        self.seconds: asyncio.Queue[float] = asyncio.Queue()
        self.over = asyncio.Event()
        engine.context.compressor.sleep = self

    async def __call__(self, seconds: float) -> None:
        """Wait until it is over."""
        self.seconds.put_nowait(seconds)
        await self.over.wait()


async def test_a_standby_image_stays_raw_for_its_delay_also_across_a_restart(
    tmp_path: Path,
) -> None:
    clock, first = SetClock(), make_engine(tmp_path)
    clock.rule(first)
    sleep = Sleep(first)
    await first.open()
    source = await asleep(first, compression=ZSTD, compression_delay=timedelta(minutes=10))
    assert await sleep.seconds.get() == 600
    assert first.find_instance(source.id).standby_compression_at == START + timedelta(minutes=10)
    await first.close()
    clock.go_on(timedelta(minutes=4))
    second = make_engine(tmp_path)
    clock.rule(second)
    sleep = Sleep(second)
    async with open_engine(tmp_path, second):
        assert await sleep.seconds.get() == 360
        standby = second.context.data.instance(source.id).standby
        assert standby.memory.exists()
        sleep.over.set()
        await second.context.compressor.settled(source.id)
        assert not standby.memory.exists()
        await second.restore(source.id)
        assert await ask(second, source.id, "get", "who") == "source"


async def test_the_delay_of_the_policy_holds_unless_the_request_names_one(engine: Engine) -> None:
    source = await running(engine)
    policy = SnapshotPolicy(ZSTD, timedelta(minutes=5))
    of_instance = replace(source, snapshot_policy=policy)
    assert keeping.delay_of(of_instance, None) == timedelta(minutes=5)
    assert keeping.delay_of(of_instance, timedelta(0)) == timedelta(0)
    assert keeping.delay_of(source, None) == timedelta(0)


async def test_a_restore_calls_the_compression_off(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    source = await asleep(engine, compression=ZSTD)
    await gate.until_reached()
    async with asyncio.timeout(30):
        restored = await engine.restore(source.id)
    assert gate.cancelled
    assert "expand" not in restored.timings_ms
    assert await ask(engine, source.id, "get", "who") == "source"
    assert not engine.context.data.instance(source.id).standby.directory.exists()


async def test_after_a_restore_that_failed_it_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    source = await asleep(engine, compression=ZSTD)
    await gate.until_reached()

    async def fails(*_: Any, **__: Any) -> None:
        raise VmmFailure("no VMM today")

    with monkeypatch.context() as patch:
        patch.setattr("stillframe.engine.loaded.load", fails)
        with pytest.raises(VmmFailure):
            await engine.restore(source.id)
    gate.opened.set()
    async with asyncio.timeout(60):
        await engine.context.compressor.settled(source.id)
    standby = engine.context.data.instance(source.id).standby
    assert sorted(path.name for path in standby.directory.glob("*memory.*")) == [
        "memory.blake3", "memory.zst",
    ]  # fmt: skip
    await engine.restore(source.id)
    assert await ask(engine, source.id, "get", "who") == "source"
