"""Verification of an engine's snapshots: damage is found at its place and marked, never deleted."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping import verify as verifying
from stillframe.model.errors import DamagedData, NotFound
from stillframe.model.states import InstanceState
from stillframe.model.values import CompressionAlgorithm, CompressionConfig, Snapshot
from stillframe.model.verification import Depth
from stillframe.store.compression import compress
from stillframe.store.payloads import switch_to_compressed
from support.engine import make_engine, running
from support.moving import DISK, LIVE, archive_of, remembering
from support.payloads import flip, noise


async def captured(engine: Engine) -> Snapshot:
    return await engine.snapshot((await remembering(engine)).id, kind=LIVE, name="ready")


def data_byte(path: Path) -> int:
    """The place of a byte that is no hole."""
    with path.open("rb") as file:
        return os.lseek(file.fileno(), 0, os.SEEK_DATA) + 100


async def test_a_whole_snapshot_is_found_whole(engine: Engine) -> None:
    made = await captured(engine)
    for depth in Depth:
        found = await engine.verify_snapshot(made.id, depth)
        assert (found.damage, found.unchecked) == ((), ())
        assert found.checked_bytes == found.total_bytes > 0
    assert found.bytes_per_second > 0
    assert engine.find_snapshot(made.id) == made


async def test_f47_a_flipped_bit_is_found_at_its_place_and_marked(
    engine: Engine, tmp_path: Path
) -> None:
    made = await captured(engine)
    memory = engine.context.data.snapshot(made.id).memory
    place = data_byte(memory)
    flip(memory, place * 8)
    assert (await engine.verify_snapshot(made.id, Depth.MANIFEST)).damage == ()
    found = await engine.verify_snapshot(made.id, Depth.FULL)
    (damage,) = found.damage
    assert damage.file == "memory"
    assert damage.offset <= place < damage.offset + damage.length
    marked = engine.find_snapshot(made.id)
    assert marked.damaged is not None
    assert f"memory: {damage.length} bytes at {damage.offset}" in marked.damaged
    assert [s.id for s in engine.list_snapshots()] == [made.id]
    again = make_engine(tmp_path)  # what the database has
    assert again.context.records.snapshots[made.id].damaged == marked.damaged
    await again.close()
    assert memory.exists()


async def test_a_marked_one_is_not_loaded_until_it_is_found_whole(engine: Engine) -> None:
    source = await engine.stop((await remembering(engine)).id)
    made = await engine.snapshot(source.id, kind=DISK)
    overlay = engine.context.data.snapshot(made.id).overlay
    place = data_byte(overlay)
    flip(overlay, place * 8)
    await engine.verify_snapshot(made.id, Depth.FULL)
    assert not (await engine.compatibility(made.id)).fork
    with pytest.raises(DamagedData, match=r"overlay\.raw"):
        await engine.fork_snapshot(made.id, ForkRequest("fork"))
    with pytest.raises(DamagedData):
        await engine.restore_snapshot(source.id, made.id)
    with pytest.raises(DamagedData):
        await archive_of(engine, made)
    assert [i.name for i in engine.list_instances()] == ["source"]
    flip(overlay, place * 8)
    await engine.verify_snapshot(made.id, Depth.MANIFEST)  # that proves nothing
    assert engine.find_snapshot(made.id).damaged is not None
    await engine.verify_snapshot(made.id, Depth.FULL)
    assert engine.find_snapshot(made.id).damaged is None
    fork = await engine.fork_snapshot(made.id, ForkRequest("fork"))
    assert fork.state is InstanceState.STOPPED


async def test_no_warm_forks_of_a_damaged_one(engine: Engine) -> None:
    made = await captured(engine)
    memory = engine.context.data.snapshot(made.id).memory
    flip(memory, data_byte(memory) * 8)
    await engine.verify_snapshot(made.id, Depth.FULL)
    await engine.set_warm(made.id, 1)
    async with asyncio.timeout(30):
        status = await engine.context.warm.settled(made.id)
    assert status.ready == 0
    assert "damaged" in str(status.limited_by)


@pytest.mark.parametrize("spoilt", ["manifest.json", "devices", "memory.blake3", "gone"])
async def test_whatever_is_damaged_the_list_works(engine: Engine, spoilt: str) -> None:
    made = await captured(engine)
    directory = engine.context.data.snapshot(made.id).directory
    if spoilt == "gone":
        (directory / "memory").unlink()
    else:
        (directory / spoilt).write_bytes(b"\0" * 100)
    found = await engine.verify_snapshot(made.id, Depth.MANIFEST)
    assert [damage.file for damage in found.damage] == ["memory" if spoilt == "gone" else spoilt]
    assert engine.list_snapshots() == [engine.find_snapshot(made.id)]
    assert engine.find_snapshot(made.id).damaged is not None
    await engine.delete_snapshot(made.id)
    assert not directory.exists()


# -- F60: while other things happen ---------------------------------------------------------------
async def big(engine: Engine) -> Snapshot:
    """A snapshot whose verification takes many steps."""
    source = await engine.stop((await running(engine)).id)
    overlay = engine.context.data.instance(source.id).overlay
    with overlay.open("r+b") as file:
        file.seek(4 << 20)
        file.write(noise(1 << 20) * 24)
    return await engine.snapshot(source.id, kind=DISK)


async def test_f60_a_deletion_ends_a_verification(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await big(engine)
    monkeypatch.setattr(verifying, "_STEP_SECONDS", 0.0)
    steps = 0
    original, begun = verifying._go_on, asyncio.Event()
    loop = asyncio.get_running_loop()

    def counted(work: object) -> object:
        nonlocal steps
        steps += 1
        loop.call_soon_threadsafe(begun.set)
        return original(work)  # type: ignore[arg-type]

    monkeypatch.setattr(verifying, "_go_on", counted)
    task = asyncio.create_task(engine.verify_snapshot(made.id, Depth.FULL))
    await begun.wait()
    async with asyncio.timeout(30):
        await engine.delete_snapshot(made.id)
    with pytest.raises(NotFound):
        await task
    assert steps <= 3  # it did not read to the end
    assert not engine.context.data.snapshot(made.id).directory.exists()
    assert made.id not in engine.context.snapshot_users


async def test_f60_compressing_meanwhile_is_no_damage(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await captured(engine)
    payload = engine.context.data.snapshot(made.id)
    monkeypatch.setattr(verifying, "_STEP_SECONDS", 0.0)
    task = asyncio.create_task(engine.verify_snapshot(made.id, Depth.FULL))
    algorithm = CompressionAlgorithm.LZ4
    target = payload.being_built(payload.compressed(algorithm))

    def switch() -> None:
        compress(payload.memory, target, CompressionConfig(True, algorithm))
        switch_to_compressed(payload, algorithm)

    await asyncio.to_thread(switch)
    assert (await task).damage == ()
    assert (await engine.verify_snapshot(made.id, Depth.FULL)).damage == ()
    assert engine.find_snapshot(made.id).damaged is None


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_cancelled_verification_lets_go(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await big(engine)
    monkeypatch.setattr(verifying, "_STEP_SECONDS", 0.0)
    before = open_files()
    task = asyncio.create_task(engine.verify_snapshot(made.id, Depth.FULL))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert open_files() <= before
    await engine.delete_snapshot(made.id)
