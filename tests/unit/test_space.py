"""The space that is kept free is not taken by compressing or expanding either."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stillframe.engine.context import Context
from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.host.files import allocated_bytes, fsync_data
from stillframe.model.errors import StorageFull
from stillframe.model.states import InstanceState
from stillframe.model.units import format_size
from stillframe.model.values import CompressionConfig, CompressionState
from stillframe.store.payloads import check
from support.compressing import LIVE, ZSTD, captured, compressed, forked, removed, settled
from support.engine import ask, make_engine, open_engine, running, traces

TOO_MUCH = 1 << 60


def keep_free(engine: Engine, size: int) -> None:
    object.__setattr__(engine.context.settings, "min_free_bytes", size)


async def captured_without_space(engine: Engine) -> tuple[str, str]:
    """A snapshot whose compression found no space, and what was said."""
    queue = engine.context.compressor._places
    async with queue:  # the space goes between the capture and its compression
        taken = await captured(engine, ZSTD)
        keep_free(engine, TOO_MUCH)
    failed = await settled(engine, taken.id)
    assert failed.compression_state is CompressionState.ERROR
    assert failed.size_bytes == taken.size_bytes
    payload = engine.context.data.snapshot(taken.id)
    check(payload)
    assert not list(payload.directory.glob(".*"))
    return taken.id, failed.compression_error or ""


async def test_compressing_that_would_take_the_space_kept_free_is_put_off_with_the_figures(
    engine: Engine,
) -> None:
    snapshot_id, said = await captured_without_space(engine)
    image = engine.context.data.snapshot(snapshot_id).memory
    assert f"about {format_size(allocated_bytes(image))}" in said
    assert f"{format_size(TOO_MUCH)} are kept free" in said
    keep_free(engine, 0)
    await forked(engine, engine.find_snapshot(snapshot_id), "fork")  # it is as good as before


async def test_it_is_tried_again_when_something_has_been_deleted(engine: Engine) -> None:
    snapshot_id, _ = await captured_without_space(engine)
    keep_free(engine, 0)
    other = await running(engine, "other")
    assert engine.find_snapshot(snapshot_id).compression_state is CompressionState.ERROR
    await engine.delete(other.id, graceful=False)
    again = engine.find_snapshot(snapshot_id)
    assert (again.compression_state, again.compression_error) == (
        CompressionState.COMPRESSING, None,
    )  # fmt: skip
    done = await settled(engine, snapshot_id)
    assert done.compression_state is CompressionState.COMPRESSED
    assert (done.compressed_size_bytes or 0) < done.template.memory_bytes


async def test_a_deletion_that_frees_too_little_leaves_it_put_off(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_id, said = await captured_without_space(engine)
    tried: list[str] = []
    monkeypatch.setattr(engine.context.compressor, "_try_again", tried.append)
    for name in ("one", "two"):
        other = await running(engine, name)
        await engine.delete(other.id, graceful=False)
        failed = await settled(engine, snapshot_id)
        assert failed.compression_state is CompressionState.ERROR
        assert failed.compression_error
    assert tried == []  # it certainly would fail, and each trial is two commits
    monkeypatch.undo()
    keep_free(engine, 0)
    engine.context.compressor.space_freed()
    assert (await settled(engine, snapshot_id)).compression_state is CompressionState.COMPRESSED
    assert said


async def test_the_next_server_tries_again(tmp_path: Path) -> None:
    first = make_engine(tmp_path)
    await first.open()
    snapshot_id, _ = await captured_without_space(first)
    await first.close()
    async with open_engine(tmp_path) as second:
        done = await settled(second, snapshot_id)
        assert done.compression_state is CompressionState.COMPRESSED
        await forked(second, done, "fork")


async def test_a_standby_image_is_tried_again_too(engine: Engine) -> None:
    source = await running(engine)
    async with engine.context.compressor._places:
        await engine.standby(source.id, compression=ZSTD)
        keep_free(engine, TOO_MUCH)
    async with asyncio.timeout(60):
        await engine.context.compressor.settled(source.id)
    standby = engine.context.data.instance(source.id).standby
    assert standby.memory.exists()
    keep_free(engine, 0)
    engine.context.compressor.space_freed()
    async with asyncio.timeout(60):
        await engine.context.compressor.settled(source.id)
    assert not standby.memory.exists()


async def test_expanding_that_would_take_the_space_kept_free_is_refused_with_the_figures(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "shares_blocks", True)  # the disk is not what this is about
    snapshot = await compressed(engine)
    source = await engine.stop(snapshot.source_instance_id)
    keep_free(engine, TOO_MUCH)
    before = traces(tmp_path)
    with pytest.raises(StorageFull) as caught:
        await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    assert caught.value.status == 507
    assert caught.value.facts["min_free_bytes"] == TOO_MUCH
    expected = caught.value.facts["expected_bytes"]
    assert isinstance(expected, int)
    assert 0 < expected < snapshot.template.memory_bytes  # holes are not written
    with pytest.raises(StorageFull):
        await engine.restore_snapshot(source.id, snapshot.id)
    assert traces(tmp_path) == before
    assert await removed(engine) == []
    keep_free(engine, 0)
    await forked(engine, snapshot, "fork")
    keep_free(engine, TOO_MUCH)
    await forked(engine, snapshot, "again")  # the image is there: it takes no more
    again = engine.find_instance("fork")
    assert await ask(engine, again.id, "get", "who") == "source"
    assert snapshot.kind is LIVE


async def test_nothing_that_captures_or_copies_takes_the_space_kept_free(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "shares_blocks", False)
    source = await running(engine)
    taken = await engine.snapshot(source.id, kind=LIVE)
    overlay = engine.context.data.snapshot(taken.id).overlay
    keep_free(engine, TOO_MUCH)
    pauses = watch_pauses(engine, source.id, monkeypatch)
    before = traces(tmp_path)
    for refused in (
        lambda: engine.standby(source.id),
        lambda: engine.fork(source.id, name="live", from_running=True),
        lambda: engine.snapshot(source.id, kind=LIVE),
        lambda: engine.fork_snapshot(taken.id, ForkRequest("fork")),
    ):
        with pytest.raises(StorageFull) as caught:
            await refused()
        assert caught.value.facts["min_free_bytes"] == TOO_MUCH
        assert traces(tmp_path) == before
    assert caught.value.facts["expected_bytes"] == allocated_bytes(overlay)
    assert pauses == []  # the guest never stood still
    await engine.stop(source.id)
    with pytest.raises(StorageFull):
        await engine.restore_snapshot(source.id, taken.id)
    assert engine.find_instance(source.id).state is InstanceState.STOPPED
    assert engine.context.records.intents == {}


def watch_pauses(engine: Engine, instance_id: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pauses of a guest from now on."""
    machine, pauses = engine.context.live[instance_id].machine, list[str]()
    pause = machine.pause

    async def counted() -> None:
        pauses.append(instance_id)
        await pause()

    monkeypatch.setattr(machine, "pause", counted)
    return pauses


async def test_the_disk_of_a_standby_is_durable_before_its_record_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    pauses = watch_pauses(engine, source.id, monkeypatch)
    overlay = engine.context.data.instance(source.id).overlay
    flushed: list[int] = []

    def watched(path: Path) -> None:
        if path == overlay:
            flushed.append(len(pauses))
        fsync_data(path)

    monkeypatch.setattr("stillframe.engine.capture.fsync_data", watched)
    await engine.standby(source.id)
    assert flushed[-1] == 1  # once more when it stands still: from then on it does not change


async def test_an_image_expanded_for_a_raw_snapshot_goes_with_it(engine: Engine) -> None:
    source = await running(engine)
    await engine.standby(source.id, compression=ZSTD)
    async with asyncio.timeout(60):
        await engine.context.compressor.settled(source.id)
    raw = await engine.snapshot(source.id, kind=LIVE, compression=CompressionConfig(enabled=False))
    assert engine.context.data.snapshot(raw.id).memory.exists()
    await engine.delete_snapshot(raw.id)
    assert await removed(engine) == []
