"""Storage faults of the catalogue that are not the crash harness's, each by its id."""

from __future__ import annotations

import importlib.metadata
import shutil
import stat
from pathlib import Path

import pytest

from stillframe.engine.interface import ForkRequest
from stillframe.model.errors import Conflict
from stillframe.model.values import SnapshotKind
from support.engine import ask, make_engine, open_engine, running, traces

pytestmark = pytest.mark.timeout(120)


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


def test_f56_no_decompressor_can_be_missing() -> None:
    needed = importlib.metadata.requires("stillframe") or []
    always = {
        line.partition(";")[0].strip().partition(">")[0] for line in needed if ";" not in line
    }
    assert {"zstandard", "lz4"} <= {name.partition("=")[0].strip("~<> ") for name in always}


async def test_f57_a_long_line_of_forks_needs_none_of_its_ancestors(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        last = await running(engine, "generation-0")
        for generation in range(1, 9):
            await ask(engine, last.id, "set", "nonce", f"of-{generation}")
            taken = await engine.snapshot(last.id, kind=SnapshotKind.STANDBY)
            young = await engine.fork_snapshot(taken.id, ForkRequest(f"generation-{generation}"))
            await engine.delete(last.id)
            await engine.delete_snapshot(taken.id)
            last = young
        assert await ask(engine, last.id, "get", "nonce") == "of-8"
        assert [i.name for i in engine.list_instances()] == ["generation-8"]


async def test_f58_a_directory_that_everybody_may_read_is_closed_at_the_start(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o777)
    data.chmod(0o777)
    async with open_engine(data):
        assert stat.S_IMODE(data.stat().st_mode) == 0o700


async def test_f59_a_data_directory_that_was_moved_works_where_it_is(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    async with open_engine(before) as engine:
        source = await running(engine)
        await ask(engine, source.id, "set", "nonce", "kept")
        taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
        await engine.standby(source.id)
    before.rename(after)
    async with open_engine(after, make_engine(after)) as engine:
        await engine.restore(source.id)
        fork = await engine.fork_snapshot(taken.id, ForkRequest("fork"))
        for one in (source.id, fork.id):
            assert await ask(engine, one, "get", "nonce") == "kept"
