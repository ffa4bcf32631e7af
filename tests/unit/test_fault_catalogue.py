"""Storage faults of the catalogue that are not the crash harness's, each by its id."""

from __future__ import annotations

import asyncio
import lzma
import os
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.model.errors import Conflict, DamagedData, HostFailure, InvalidRequest
from stillframe.model.states import InstanceState
from stillframe.model.values import (
    CompressionAlgorithm,
    CompressionState,
    Instance,
    Snapshot,
    SnapshotKind,
)
from support.compressing import ZSTD
from support.engine import ask, make_engine, open_engine, running, traces
from support.payloads import broken_reads
from support.registry import layer

pytestmark = pytest.mark.timeout(240)


async def test_f50_a_second_directory_of_a_snapshot_is_told_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await ask(engine, source.id, "set", "nonce", "kept")
        taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY, name="one")
        await engine.delete(source.id)
    directory = tmp_path / "snapshots" / taken.id
    twin = directory.with_name("x" * len(taken.id))
    shutil.copytree(directory, twin)
    async with open_engine(tmp_path) as engine:
        assert [snapshot.id for snapshot in engine.list_snapshots()] == [taken.id]
        assert f"{twin} is left alone" in caplog.text
        assert (twin / "manifest.json").exists()
        fork = await engine.fork_snapshot(taken.id, ForkRequest("fork"))
        assert await ask(engine, fork.id, "get", "nonce") == "kept"


async def test_f50_two_snapshots_of_one_name_cannot_be(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await engine.snapshot(source.id, kind=SnapshotKind.STANDBY, name="one")
        before = traces(tmp_path)
        with pytest.raises(Conflict):
            await engine.snapshot(source.id, kind=SnapshotKind.STANDBY, name="one")
        assert traces(tmp_path) == before


async def test_f54_a_base_that_is_deleted_takes_nothing_from_its_forks(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await ask(engine, source.id, "set", "nonce", "kept")
        base = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
        fork = await engine.fork_snapshot(base.id, ForkRequest("fork"))
        await engine.delete_snapshot(base.id)
        await engine.delete(source.id)
        assert await ask(engine, fork.id, "get", "nonce") == "kept"
        again = await engine.snapshot(fork.id, kind=SnapshotKind.STANDBY)
        second = await engine.fork_snapshot(again.id, ForkRequest("second"))
        assert await ask(engine, second.id, "get", "nonce") == "kept"


# -- F45: data that cannot be read ----------------------------------------------------------------
def break_file(monkeypatch: pytest.MonkeyPatch, path: Path, how: str) -> None:
    """Have reads of a file fail as with a bad sector, or end early."""
    if how == "EIO":
        broken_reads(monkeypatch, path, path.stat().st_size // 2)
    else:
        os.truncate(path, path.stat().st_size - (1 if how == "one byte short" else 4096))


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[tuple[Engine, Instance, Snapshot]]:
    """A sleeping instance and a snapshot of when it ran."""
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
        yield engine, await engine.standby(source.id), taken


async def no_vm_runs(engine: Engine, source: Instance, taken: Snapshot) -> None:
    """Neither a fork nor a restore in place is made, and nothing is left of them."""
    before = sorted(traces(engine.context.data.root))
    with pytest.raises((DamagedData, HostFailure)):
        await engine.fork_snapshot(taken.id, ForkRequest("fork"))
    with pytest.raises((DamagedData, HostFailure)):
        await engine.restore_snapshot(source.id, taken.id, target_state=InstanceState.RUNNING)
    assert sorted(traces(engine.context.data.root)) == before
    assert not [trace for trace in before if trace.startswith("pid")]
    assert engine.find_instance(source.id).state is InstanceState.STANDBY
    assert engine.context.records.intents == {}


@pytest.mark.parametrize(("name", "how"), [
    ("devices", "EIO"), ("manifest.json", "one byte short"), ("devices", "one byte short"),
    ("memory", "one byte short"), ("memory", "one page short"), ("overlay.raw", "one byte short"),
])  # fmt: skip
async def test_f45_no_vm_runs_from_data_that_cannot_be_read(
    kept: tuple[Engine, Instance, Snapshot], monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    engine, source, taken = kept
    directory = engine.context.data.snapshot(taken.id).directory
    with monkeypatch.context() as patch:
        break_file(patch, directory / name, how)
        await no_vm_runs(engine, source, taken)
    if how == "EIO":  # it was the device: the data is as good as before
        await engine.fork_snapshot(taken.id, ForkRequest("fork"))
    await engine.restore(source.id)  # it has data of its own


async def test_f45_no_vm_runs_from_compressed_memory_that_cannot_be_read(
    kept: tuple[Engine, Instance, Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, source, _ = kept
    await engine.restore(source.id)
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY, compression=ZSTD)
    await engine.standby(source.id)
    await engine.context.compressor.settled(taken.id)
    packed = engine.context.data.snapshot(taken.id).compressed(CompressionAlgorithm.ZSTD)
    with monkeypatch.context() as patch:
        broken_reads(patch, packed, 20)  # of the first frame
        await no_vm_runs(engine, source, engine.find_snapshot(taken.id))


async def test_f45_no_vm_wakes_from_a_standby_image_that_cannot_be_read(
    kept: tuple[Engine, Instance, Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, source, _ = kept
    devices = engine.context.data.instance(source.id).standby.devices
    with monkeypatch.context() as patch:
        broken_reads(patch, devices, 3)
        with pytest.raises((DamagedData, HostFailure)):
            await engine.restore(source.id)
        assert not [t for t in traces(engine.context.data.root) if t.startswith("pid")]
        assert engine.find_instance(source.id).state is InstanceState.STANDBY
    assert (await engine.restore(source.id)).state is InstanceState.RUNNING


# -- F56: what compresses or expands is not there -------------------------------------------------
async def test_f56_without_a_compressor_the_raw_image_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await ask(engine, source.id, "set", "nonce", "kept")

        def missing(*_: object, **__: object) -> None:
            raise zstandard.ZstdError("this build has no compressor")

        with monkeypatch.context() as patch:
            patch.setattr(zstandard, "ZstdCompressor", missing)
            taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY, compression=ZSTD)
            await engine.context.compressor.settled(taken.id)
        told = engine.find_snapshot(taken.id)
        assert told.compression_state is CompressionState.ERROR
        assert told.compression_error
        assert engine.context.data.snapshot(taken.id).memory.is_file()
        fork = await engine.fork_snapshot(taken.id, ForkRequest("fork"))
        assert await ask(engine, fork.id, "get", "nonce") == "kept"


async def test_f56_memory_of_an_unknown_algorithm_is_refused_and_kept(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY, compression=ZSTD)
        await engine.context.compressor.settled(taken.id)
        packed = engine.context.data.snapshot(taken.id).compressed(CompressionAlgorithm.ZSTD)
        data = bytearray(packed.read_bytes())
        entries, fields = slice(-60 - 36 * 64, -60), slice(-60, -40)  # 64 frames of 1 MiB
        data[-60 + 16] = 9  # the algorithm; docs/format.md has the layout
        data[-40:-8] = blake3(bytes(data[entries]) + bytes(data[fields])).digest()
        packed.write_bytes(data)
        before = sorted(traces(tmp_path))
        with pytest.raises(DamagedData, match="not known"):
            await engine.fork_snapshot(taken.id, ForkRequest("fork"))
        assert sorted(traces(tmp_path)) == before
        assert packed.read_bytes() == data


async def test_f56_a_layer_that_nobody_here_can_expand_is_refused(tmp_path: Path) -> None:
    async with open_engine(tmp_path / "data") as engine:
        source = tmp_path / "image.tar.xz"
        source.write_bytes(lzma.compress(layer(("etc/name", b"x"))))
        with pytest.raises(InvalidRequest, match="compression other than gzip or zstd"):
            await engine.import_image("other", source)
        assert list(engine.context.data.images.iterdir()) == []


# -- F57: long chains -----------------------------------------------------------------------------
async def test_f57_the_thirtieth_generation_needs_none_of_its_ancestors(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        last = await running(engine, "generation-0")
        for generation in range(1, 31):
            await ask(engine, last.id, "set", "nonce", f"of-{generation}")
            taken = await engine.snapshot(last.id, kind=SnapshotKind.STANDBY)
            young = await engine.fork_snapshot(taken.id, ForkRequest(f"generation-{generation}"))
            await engine.delete(last.id, graceful=False)
            await engine.delete_snapshot(taken.id)
            last = young
        assert await ask(engine, last.id, "get", "nonce") == "of-30"
        assert [i.name for i in engine.list_instances()] == ["generation-30"]
        assert len(engine.context.records.forebears) == 1  # not thirty


# -- F58 and F59: the data directory --------------------------------------------------------------
@pytest.mark.parametrize("mode", [0o777, 0o755, 0o711, 0o000])
async def test_f58_a_directory_of_another_mode_is_mended_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    data = tmp_path / "data"
    async with open_engine(data):
        pass
    (data / "snapshots").chmod(mode)
    data.chmod(mode)
    async with open_engine(data):
        assert {stat.S_IMODE(path.stat().st_mode) for path in (data, data / "snapshots")} == {0o700}
    assert f"{data} had mode {mode:04o}" in caplog.text


def test_f58_a_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(data, 65534, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(HostFailure, match="belongs to user"):
        make_engine(data)
    assert list(data.iterdir()) == []


def test_f58_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a file")
    with pytest.raises(HostFailure, match="cannot use the data directory"):
        make_engine(tmp_path / "data")


def copy_all(source: Path, target: Path) -> None:
    """Copy a tree with its modes, holes and hard links, as who moves house does."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True, timeout=60)


@pytest.mark.parametrize("how", ["rename", "copy"])
async def test_f59_a_data_directory_that_was_moved_works_where_it_is(
    tmp_path: Path, another_file_system: Path, how: str
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    async with open_engine(before) as engine:
        source = await running(engine)
        await ask(engine, source.id, "set", "nonce", "kept")
        taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
        await engine.standby(source.id)
    if how == "rename":
        before.rename(after)
    else:
        after = another_file_system / "after"
        await asyncio.to_thread(copy_all, before, after)
        shutil.rmtree(before)
        assert after.stat().st_dev != tmp_path.stat().st_dev
    async with open_engine(after, make_engine(after)) as engine:
        await engine.restore(source.id)
        fork = await engine.fork_snapshot(taken.id, ForkRequest("fork"))
        again = await engine.snapshot(fork.id, kind=SnapshotKind.STANDBY)
        second = await engine.fork_snapshot(again.id, ForkRequest("second"))
        for one in (source.id, fork.id, second.id):
            assert await ask(engine, one, "get", "nonce") == "kept"
