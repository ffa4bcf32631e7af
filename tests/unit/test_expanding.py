"""Forks and restores of compressed snapshots: expanded once, shared, gone with the last user."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping import expanded as expanding
from stillframe.model.errors import DamagedData
from stillframe.model.states import InstanceState
from stillframe.model.values import CompressionAlgorithm, CompressionConfig, CompressionState
from stillframe.store import compression as storing
from stillframe.store.paths import Payload
from stillframe.store.payloads import memory_file
from support.compressing import (
    LIVE,
    LZ4,
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
from support.engine import ask, traces
from support.payloads import flip


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


async def test_a_switch_between_the_look_and_the_link_is_noticed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = await compressed(engine)
    looks: list[Payload] = []

    def late(payload: Payload) -> tuple[Path, CompressionAlgorithm | None] | None:
        looks.append(payload)
        return (payload.memory, None) if len(looks) == 1 else memory_file(payload)

    monkeypatch.setattr(expanding, "memory_file", late)
    await forked(engine, snapshot, "fork")
    assert len(looks) == 2


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


async def test_a_fork_in_standby_shares_the_compressed_image_until_it_wakes(
    engine: Engine,
) -> None:
    snapshot = await compressed(engine)
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork", InstanceState.STANDBY))
    assert expanded(engine) == []
    standby = engine.context.data.instance(fork.id).standby
    assert (standby.directory / "memory.zst").stat().st_nlink == 2
    raw = await engine.snapshot(fork.id, kind=LIVE)  # as nobody asked for compression
    assert raw.compression_state is CompressionState.NONE
    assert engine.context.data.snapshot(raw.id).memory.exists()
    await engine.restore(fork.id)
    assert await ask(engine, fork.id, "get", "who") == "source"
    await forked(engine, raw, "child")


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


async def test_the_family_tree_knows_who_maps_the_expanded_image(engine: Engine) -> None:
    snapshot = await compressed(engine)
    one, two = await forked(engine, snapshot, "one"), await forked(engine, snapshot, "two")
    tree = {relative.id: relative for relative in await engine.family()}

    async def alone(instance_id: str) -> int:
        (found,) = [r for r in await engine.family() if r.id == instance_id]
        assert found.exclusive_bytes is not None
        return found.exclusive_bytes

    assert tree[snapshot.id].shares_memory_with == tuple(sorted((one.id, two.id)))
    assert set(tree[one.id].shares_memory_with) == {snapshot.id, two.id}
    stored = (engine.context.data.snapshot(snapshot.id).directory / "memory.zst").stat()
    assert await alone(snapshot.id) >= stored.st_blocks * 512
    before, shared = await alone(one.id), image_of(engine, one.id).st_blocks * 512
    assert shared > 0
    await engine.delete(two.id, graceful=False)
    # Now it would take the expanded image with it.
    assert await alone(one.id) >= before + shared


async def test_on_a_disk_without_room_for_a_name_an_expanded_image_goes_all_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = await compressed(engine)
    fork = await forked(engine, snapshot, "fork")
    (image,) = expanded(engine)
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if path == image:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    await engine.delete(fork.id, graceful=False)
    assert expanded(engine) == []
