"""Dry runs of forks and restores: every reason at once, the bytes, and nothing done."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stillframe.engine.context import Context
from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.host.extents import files_in, freed_by_deleting
from stillframe.host.files import allocated_bytes
from stillframe.model.errors import InvalidRequest, NotFound
from stillframe.model.retention import Retention
from stillframe.model.schedules import ScheduleRequest, marks
from stillframe.model.states import InstanceState
from stillframe.model.units import MIB
from stillframe.model.values import Hypervisor, SnapshotKind
from support.clock import HOUR
from support.compressing import compressed
from support.engine import running, traces

pytestmark = pytest.mark.timeout(120)


async def test_a_fork_that_would_be_made_is_told_and_not_made(
    engine: Engine, tmp_path: Path
) -> None:
    source = await running(engine)
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    before = traces(tmp_path)
    preview = await engine.preview_fork(taken.id, ForkRequest("fork"))
    assert preview.refused == ()
    assert (preview.name, preview.state) == ("fork", InstanceState.RUNNING)
    assert preview.memory_bytes == source.memory_bytes
    assert (preview.bytes_expanded, preview.bytes_lost) == (0, 0)
    assert traces(tmp_path) == before
    assert [instance.name for instance in engine.list_instances()] == ["source"]
    made = await engine.fork_snapshot(taken.id, ForkRequest("fork"))  # it was true
    assert made.state is preview.state


async def test_all_reasons_against_a_fork_are_told_at_once(engine: Engine, tmp_path: Path) -> None:
    source = await running(engine)
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    (tmp_path / "snapshots" / taken.id / "devices").write_bytes(b"damaged")
    wish = ForkRequest("source", target_hypervisor=Hypervisor.QEMU)
    refused = " / ".join((await engine.preview_fork(taken.id, wish)).refused)
    assert "already exists" in refused
    assert "only possible for Stopped" in refused
    assert "devices" in refused
    with pytest.raises(NotFound):
        await engine.preview_fork("nothing", ForkRequest("fork"))


async def test_a_full_disk_is_foreseen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "shares_blocks", False)
    source = await running(engine)
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    object.__setattr__(engine.context.settings, "min_free_bytes", 1 << 60)
    (reason,) = (await engine.preview_fork(taken.id, ForkRequest("fork"))).refused
    assert "kept free" in reason


async def test_what_is_expanded_is_told_as_it_will_be_and_refuses_nothing_that_works(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "shares_blocks", True)
    taken = await compressed(engine)
    wish = ForkRequest("fork")
    preview = await engine.preview_fork(taken.id, wish)
    payload = engine.context.data.snapshot(taken.id)
    assert 0 < preview.bytes_expanded < taken.template.memory_bytes
    made = await engine.fork_snapshot(taken.id, wish)
    image = engine.context.data.instance(made.id).memory
    assert 0 < allocated_bytes(image) <= preview.bytes_expanded  # frames are counted as a whole
    object.__setattr__(engine.context.settings, "min_free_bytes", 1 << 60)
    again = await engine.preview_fork(taken.id, ForkRequest("again"))
    assert (again.bytes_expanded, again.refused) == (0, ())  # it is there by now
    asleep = ForkRequest("asleep", target_state=InstanceState.STANDBY)
    assert (await engine.preview_fork(taken.id, asleep)).bytes_expanded == 0
    await engine.fork_snapshot(taken.id, ForkRequest("again"))
    assert not payload.memory.exists()


async def test_a_deletion_frees_what_its_warm_forks_hold_too(
    engine: Engine, tmp_path: Path
) -> None:
    source = await running(engine)
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    alone = await engine.preview_deletion(taken.id)
    await engine.set_warm(taken.id, 2)
    async with asyncio.timeout(60):
        assert (await engine.context.warm.settled(taken.id)).ready == 2
    preview = await engine.preview_deletion(taken.id)
    assert preview.shared_with == ()  # they end with it
    (itself,) = [one for one in await engine.family() if one.id == taken.id]
    assert itself.exclusive_bytes == preview.bytes_freed > alone.bytes_freed
    engine.set_schedule(source.id, ScheduleRequest(Retention(max_count=1), interval=HOUR))
    engine.edit_snapshot(taken.id, {"tags": marks(source.id)})
    plan = await engine.explain_retention(source.id)
    assert [line.bytes_freed for line in plan.lines] == [preview.bytes_freed]
    before = set(files_in(tmp_path))
    held = freed_by_deleting(before)
    await engine.delete_snapshot(taken.id)
    assert held - freed_by_deleting(files_in(tmp_path)) == pytest.approx(
        preview.bytes_freed, abs=MIB
    )  # but for records and logs


async def test_an_environment_that_would_be_refused_is_told(engine: Engine) -> None:
    taken = await engine.snapshot((await running(engine)).id, kind=SnapshotKind.STANDBY)
    wish = ForkRequest("fork", env={"a=b": "c"})
    (reason,) = (await engine.preview_fork(taken.id, wish)).refused
    assert "environment" in reason


async def test_what_a_fork_inherits_counts_in_the_preview_as_in_the_verb(engine: Engine) -> None:
    source = await running(engine)
    first = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    half = {"INHERITED": "x" * 30_000}
    child = await engine.fork_snapshot(first.id, ForkRequest("child", env=half))
    taken = await engine.snapshot(child.id, kind=SnapshotKind.STANDBY)
    wish = ForkRequest("fork", env={"OWN": "x" * 30_000})
    (reason,) = (await engine.preview_fork(taken.id, wish)).refused
    with pytest.raises(InvalidRequest) as refused:
        await engine.fork_snapshot(taken.id, wish)
    assert refused.value.message == reason


async def test_a_restore_tells_what_it_would_give_up_and_why_not_now(
    engine: Engine, tmp_path: Path
) -> None:
    source, other = await running(engine), await running(engine, "other")
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    (reason,) = (await engine.preview_restore(source.id, taken.id)).refused
    assert "Running" in reason
    await engine.standby(source.id)
    before = traces(tmp_path)
    preview = await engine.preview_restore(source.id, taken.id)
    assert preview.refused == ()
    assert preview.bytes_lost > 0
    assert traces(tmp_path) == before
    assert engine.find_instance(source.id).state is InstanceState.STANDBY
    refused = (await engine.preview_restore(other.id, taken.id)).refused
    assert any("another instance" in reason for reason in refused)
