"""What snapshots take, told so that all together take the sum, whoever goes; and the quota."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping.quota import expected_stored, stored_bytes
from stillframe.host.extents import allocated_in
from stillframe.model.errors import InsufficientResources
from stillframe.model.values import Instance, Snapshot, SnapshotKind
from support.compressing import ZSTD, settled
from support.engine import ask, make_engine, open_engine, running

LIVE = SnapshotKind.STANDBY
HELD = 50_000  # bytes of a guest's memory
OVERLAY = 200_000  # fewer than its empty disk takes
pytestmark = pytest.mark.timeout(120)


def on_disk(engine: Engine) -> int:
    """What lies there, hard links counted once."""
    return allocated_in(engine.context.data.snapshots, set())


async def fill(engine: Engine, instance_id: str) -> None:
    """Have the guest write memory."""
    await ask(engine, instance_id, "set", "much", "m" * HELD)


async def asleep(engine: Engine) -> tuple[Instance, Snapshot, Snapshot]:
    """An instance in Standby and two snapshots of it: three names for one memory image."""
    source = await running(engine)
    await fill(engine, source.id)
    source = await engine.standby(source.id)
    one, two = [await engine.snapshot(source.id, kind=LIVE) for _ in range(2)]
    return source, one, two


async def test_memory_that_is_shared_is_counted_once_and_never_lost(engine: Engine) -> None:
    if engine.context.shares_blocks:
        pytest.skip("a walk counts shared extents many times")
    source, one, two = await asleep(engine)
    memory = engine.context.data.snapshot(one.id).memory.stat().st_blocks * 512
    assert one.stored_bytes - two.stored_bytes >= memory > HELD
    assert stored_bytes(engine.context) == on_disk(engine)
    await engine.delete(source.id)
    assert stored_bytes(engine.context) == on_disk(engine)  # it is the snapshots' alone now
    await engine.delete_snapshot(one.id)
    heir = engine.find_snapshot(two.id)
    assert heir.stored_bytes == one.stored_bytes
    assert stored_bytes(engine.context) == on_disk(engine)
    answer = await engine.resources()
    assert answer.disk_use.snapshots == answer.snapshots.stored_bytes == heir.stored_bytes


async def test_of_several_heirs_one_takes_over(engine: Engine) -> None:
    source, one, two = await asleep(engine)
    three = await engine.snapshot(source.id, kind=LIVE)
    total = stored_bytes(engine.context)
    await engine.delete_snapshot(two.id)
    await engine.delete_snapshot(one.id)
    assert engine.find_snapshot(three.id).stored_beside is None
    assert engine.find_snapshot(three.id).stored_bytes == one.stored_bytes
    assert stored_bytes(engine.context) < total


async def test_a_compressed_snapshot_leaves_its_memory_to_who_shares_it(engine: Engine) -> None:
    if engine.context.shares_blocks:
        pytest.skip("a walk counts shared extents many times")
    source = await running(engine)
    await engine.standby(source.id)
    one = await engine.snapshot(source.id, kind=LIVE, compression=ZSTD)
    two = await engine.snapshot(source.id, kind=LIVE)
    await settled(engine, one.id)
    await asyncio.wait_for(engine.context.compressor.settled(one.id), 60)
    assert engine.find_snapshot(two.id).stored_beside == one.id
    assert stored_bytes(engine.context) == on_disk(engine)


async def test_the_next_server_measures_what_a_killed_one_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(*_: object) -> None:
        pass

    async with open_engine(tmp_path) as engine:
        _, one, two = await asleep(engine)
        monkeypatch.setattr("stillframe.engine.verbs.snapshot.measure_heirs", killed)
        await engine.delete_snapshot(one.id)
        assert engine.find_snapshot(two.id).stored_bytes == two.stored_bytes
    async with open_engine(tmp_path) as engine:
        assert engine.find_snapshot(two.id).stored_bytes == one.stored_bytes


async def test_a_pruned_base_is_counted_for_who_was_built_on_it(reflink_dir: Path) -> None:
    async with open_engine(reflink_dir / "data") as engine:
        source = await running(engine)
        await fill(engine, source.id)
        base = await engine.snapshot(source.id, kind=LIVE)
        second, third = [await engine.snapshot(source.id, kind=LIVE) for _ in range(2)]
        assert base.stored_bytes > OVERLAY > second.stored_bytes > 0
        before = stored_bytes(engine.context)
        await engine.delete_snapshot(base.id)
        assert engine.find_snapshot(second.id).stored_bytes > OVERLAY
        assert engine.find_snapshot(third.id).stored_bytes == third.stored_bytes
        assert 0 <= before - stored_bytes(engine.context) < base.stored_bytes // 2
        fork = await engine.fork_snapshot(third.id, ForkRequest("fork"))
        child = await engine.snapshot(fork.id, kind=LIVE)
        assert (child.stored_beside, child.stored_bytes < OVERLAY) == (third.id, True)


async def test_captures_at_once_cannot_pass_the_quota_together(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    async with open_engine(tmp_path, engine):
        sources = [await running(engine, name) for name in ("one", "two")]
        for source in sources:
            await fill(engine, source.id)
        settings = engine.context.settings
        object.__setattr__(settings, "max_snapshot_bytes", 1 << 60)
        each = [await expected_stored(engine.context, source, LIVE) for source in sources]
        room = sum(each) * 3 // 4  # for one of them, not for both
        object.__setattr__(settings, "max_snapshot_bytes", room)
        outcomes = await asyncio.gather(
            *(engine.snapshot(source.id, kind=LIVE) for source in sources), return_exceptions=True
        )
        (refused,) = [one for one in outcomes if isinstance(one, BaseException)]
        assert isinstance(refused, InsufficientResources)
        assert refused.facts["max_snapshot_bytes"] == room
        assert stored_bytes(engine.context) <= room
