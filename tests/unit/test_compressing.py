"""Snapshots and standby images become compressed in the background, and serve as before.

The numbers are those of the fault catalogue: F13-F15, F39 and F64.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest
from stillframe.engine.keeping import compression as keeping
from stillframe.model.errors import InvalidRequest, InvalidState, StorageFull, VmmFailure
from stillframe.model.states import InstanceState
from stillframe.model.values import (
    CompressionAlgorithm,
    CompressionConfig,
    CompressionState,
    Instance,
    SnapshotPolicy,
)
from stillframe.store import compression as storing
from stillframe.store import payloads
from stillframe.store.payloads import check, measure, memory_file
from support.clock import START, SetClock
from support.compressing import (
    DISK,
    LIVE,
    LZ4,
    OFF,
    ZSTD,
    Gate,
    captured,
    compressed,
    expanded,
    forked,
    image_of,
    removed,
    settled,
)
from support.engine import ask, make_engine, open_engine, running
from support.payloads import verified

pytestmark = pytest.mark.usefixtures("vms_end")


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


@pytest.mark.parametrize("good_flushes", [0, 1])
async def test_a_flush_that_fails_at_the_switch_leaves_a_record_that_is_right(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, good_flushes: int
) -> None:
    """The first comes before the raw image goes, the second after it."""
    flushes: list[Path] = []

    def failing(directory: Path) -> None:
        flushes.append(directory)
        if len(flushes) == good_flushes + 1:
            raise OSError(errno.EIO, "Input/output error")

    gate = Gate(monkeypatch)
    taken = await captured(engine, ZSTD)
    await gate.until_reached()
    monkeypatch.setattr(payloads, "fsync_directory", failing)
    gate.opened.set()
    done = await settled(engine, taken.id)
    payload = engine.context.data.snapshot(taken.id)
    raw = good_flushes == 0
    expected = CompressionState.ERROR if raw else CompressionState.COMPRESSED
    assert done.compression_state is expected
    assert payload.memory.exists() is raw
    assert (payload.directory / "memory.zst").exists() is not raw
    await forked(engine, done, "fork")


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
        payload = engine.context.data.snapshot(snapshot.id)
        check(payload)
        assert verified(payload).damage == ()
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


# -- a standby image that found no space -----------------------------------------------------------
@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No compression finds space, until this is undone."""

    def full(*_: Any) -> None:
        raise StorageFull("no space", expected_bytes=1)

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "check_free", full)
        yield patch


async def test_a_later_standby_is_compressed_once_and_called_off_whole(
    engine: Engine, full_disk: pytest.MonkeyPatch
) -> None:
    """What an earlier standby image lacked must not have the next one compressed too."""
    other = await running(engine, "other")
    source = await asleep(engine, compression=ZSTD)
    await engine.context.compressor.settled(source.id)
    full_disk.undo()
    sleep = Sleep(engine)
    await engine.restore(source.id)
    await engine.standby(source.id, compression=ZSTD, compression_delay=timedelta(hours=1))
    assert await sleep.seconds.get() > 3000
    await engine.delete(other.id, graceful=False)
    await engine.restore(source.id)
    assert jobs_of(source) == []
    await engine.standby(source.id, compression=OFF)
    sleep.over.set()
    assert (jobs_of(source), sleep.seconds.qsize()) == ([], 0)
    assert engine.context.data.instance(source.id).standby.memory.exists()


async def test_one_that_found_no_space_is_tried_again_when_no_verb_is_at_it(
    engine: Engine, full_disk: pytest.MonkeyPatch
) -> None:
    source = await asleep(engine, compression=ZSTD)
    await engine.context.compressor.settled(source.id)
    full_disk.undo()
    async with engine.context.exclusive(source.id, "try"):
        engine.context.space_freed()
        assert jobs_of(source) == []
    engine.context.space_freed()
    engine.context.space_freed()
    assert len(jobs_of(source)) == 1
    await engine.context.compressor.settled(source.id)
    assert not engine.context.data.instance(source.id).standby.memory.exists()


def jobs_of(instance: Instance) -> list[str]:
    """The compressions at work for an instance, or waiting to be."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name == f"compress {instance.id}"]
