"""What is done with a snapshot while it is being compressed: states and sizes stay right."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.model.states import InstanceState
from stillframe.model.values import CompressionState, Snapshot
from stillframe.model.verification import Depth
from stillframe.store.payloads import check, measure
from support.compressing import (
    ZSTD,
    Gate,
    captured,
    forked,
    image_of,
    removed,
    settled,
)
from support.engine import ask, make_engine, open_engine


@pytest.fixture
async def halfway(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[Snapshot, Gate]:
    """A snapshot whose compression is under way, and what holds it up."""
    gate = Gate(monkeypatch)
    taken = await captured(engine, ZSTD)
    await gate.until_reached()
    return taken, gate


def still_compressing(engine: Engine, taken: Snapshot) -> None:
    """The record is what it was at the capture, and the payload is raw and whole."""
    assert engine.find_snapshot(taken.id) == taken
    assert taken.compression_state is CompressionState.COMPRESSING
    payload = engine.context.data.snapshot(taken.id)
    assert payload.memory.stat().st_size == taken.template.memory_bytes
    check(payload)


async def compressed_well(engine: Engine, taken: Snapshot, gate: Gate) -> Snapshot:
    """Let the compression end; the record must tell what lies there."""
    gate.opened.set()
    done = await settled(engine, taken.id)
    payload = engine.context.data.snapshot(taken.id)
    assert done.compression_state is CompressionState.COMPRESSED
    assert done.compressed_size_bytes == (payload.directory / "memory.zst").stat().st_size
    assert done.uncompressed_size_bytes == taken.template.memory_bytes
    size = measure(payload)
    assert (done.size_bytes, done.stored_bytes) == (size.size, size.stored)
    assert not payload.memory.exists()
    assert not list(payload.directory.glob(".*"))
    assert (await engine.verify_snapshot(taken.id, Depth.FULL)).damage == ()
    return done


@pytest.mark.parametrize("target", [InstanceState.RUNNING, InstanceState.STANDBY])
async def test_a_restore_in_place_neither_waits_nor_calls_it_off(
    engine: Engine, halfway: tuple[Snapshot, Gate], target: InstanceState
) -> None:
    taken, gate = halfway
    source = taken.source_instance_id
    await ask(engine, source, "set", "who", "later")
    await engine.stop(source)
    async with asyncio.timeout(60):
        restored = await engine.restore_snapshot(source, taken.id, target_state=target)
    assert restored.state is target
    assert not gate.cancelled
    still_compressing(engine, taken)
    if target is InstanceState.RUNNING:
        assert await ask(engine, source, "get", "who") == "source"
    done = await compressed_well(engine, taken, gate)
    if target is InstanceState.STANDBY:
        await engine.restore(source)
    assert await ask(engine, source, "get", "who") == "source"
    fork = await forked(engine, done, "fork")
    if target is InstanceState.RUNNING:  # what was mapped at the switch is what others get
        assert image_of(engine, fork.id).st_ino == image_of(engine, source).st_ino
    for instance in (source, fork.id):
        await engine.delete(instance, graceful=False)
    assert await removed(engine) == []


async def test_forks_before_and_after_the_switch_share_one_image(
    engine: Engine, halfway: tuple[Snapshot, Gate]
) -> None:
    taken, gate = halfway
    before = await forked(engine, taken, "before")
    asleep = await engine.fork_snapshot(
        taken.id, ForkRequest("asleep", target_state=InstanceState.STANDBY)
    )
    still_compressing(engine, taken)
    done = await compressed_well(engine, taken, gate)
    after = await forked(engine, done, "after")
    await engine.restore(asleep.id)
    assert await ask(engine, asleep.id, "get", "who") == "source"
    assert image_of(engine, before.id).st_ino == image_of(engine, after.id).st_ino
    for fork in (before, after, asleep):
        await engine.delete(fork.id, graceful=False)
    assert await removed(engine) == []
    await forked(engine, done, "last")


async def test_deleting_it_calls_it_off_and_takes_nothing_from_a_fork(
    engine: Engine, halfway: tuple[Snapshot, Gate]
) -> None:
    taken, gate = halfway
    fork = await forked(engine, taken, "fork")
    async with asyncio.timeout(60):
        await engine.delete_snapshot(taken.id)
    assert gate.cancelled
    assert engine.list_snapshots() == []
    assert list(engine.context.data.snapshots.iterdir()) == []
    assert await ask(engine, fork.id, "get", "who") == "source"
    assert await removed(engine) == []
    assert engine.context.records.intents == {}


async def test_deleting_its_source_leaves_it_at_work(
    engine: Engine, halfway: tuple[Snapshot, Gate]
) -> None:
    taken, gate = halfway
    await engine.delete(taken.source_instance_id, graceful=False)
    still_compressing(engine, taken)
    await forked(engine, await compressed_well(engine, taken, gate), "fork")


async def test_verifying_it_across_the_switch_raises_no_false_alarm(
    engine: Engine, halfway: tuple[Snapshot, Gate]
) -> None:
    """F60 for a compression that ends while the verification reads."""
    taken, gate = halfway
    verifying = asyncio.ensure_future(engine.verify_snapshot(taken.id, Depth.FULL))
    gate.opened.set()
    assert (await verifying).damage == ()
    done = await compressed_well(engine, taken, gate)
    assert done.damaged is None


async def test_the_next_server_goes_on_while_forks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        gate = Gate(patch)
        first = make_engine(tmp_path)
        await first.open()
        taken = await captured(first, ZSTD)
        await gate.until_reached()
        fork = await forked(first, taken, "fork")
        await first.close()
        assert gate.cancelled
    async with open_engine(tmp_path) as second:
        assert second.find_snapshot(taken.id).compression_state is CompressionState.COMPRESSING
        again = Gate(monkeypatch)
        again.opened.set()
        done = await compressed_well(second, taken, again)
        assert await ask(second, fork.id, "get", "who") == "source"
        later = await forked(second, done, "later")
        assert image_of(second, later.id).st_ino == image_of(second, fork.id).st_ino
