"""Snapshots of VMs whose VMM writes their memory itself: which image a difference is laid over."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ExecRequest, ForkRequest
from stillframe.host.files import create_sparse
from stillframe.host.image import drop_zeros, merge_pages
from stillframe.host.runs import Runs
from stillframe.model.errors import GuestFailure, StorageFull, VmmFailure
from stillframe.model.states import InstanceState
from stillframe.model.units import MIB
from stillframe.model.values import Instance, Snapshot, SnapshotKind
from stillframe.model.verification import Depth
from stillframe.store.paths import Payload
from stillframe.vmm.moments import Moment
from support.engine import TRACKER, ask, make_engine, open_engine, running
from support.noting import NotingDriver, NotingMachine

pytestmark = pytest.mark.usefixtures("vms_end")

LIVE = SnapshotKind.STANDBY


class Scene:
    """An engine on a VMM that writes memory itself, and what is asked of both."""

    def __init__(self, engine: Engine, data: Path) -> None:
        self.engine, self.data = engine, data

    def machine_of(self, instance: Instance) -> NotingMachine:
        machine = self.engine.context.live[instance.id].machine
        assert isinstance(machine, NotingMachine)
        return machine

    async def snapshot(self, instance: Instance) -> tuple[Snapshot, str]:
        """A snapshot that is exactly the memory of its moment, and how that was written."""
        taken = await self.engine.snapshot(instance.id, kind=LIVE)
        machine = self.machine_of(instance)
        assert self.digest(taken) == machine.said
        found = await self.engine.verify_snapshot(taken.id, Depth.FULL)  # by its digest table
        assert found.damage == ()
        return taken, machine.saves[-1]

    def image(self, taken: Snapshot) -> Path:
        return Payload(self.data / "snapshots" / taken.id).memory

    def digest(self, taken: Snapshot) -> str:
        return hashlib.sha256(self.image(taken).read_bytes()).hexdigest()

    async def write(self, instance: Instance, word: str) -> None:
        await ask(self.engine, instance.id, "set", "word", word)

    async def word(self, instance: Instance) -> str:
        return await ask(self.engine, instance.id, "get", "word")


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with open_engine(tmp_path, make_engine(tmp_path, NotingDriver(TRACKER))) as engine:
        yield Scene(engine, tmp_path)


async def test_each_snapshot_of_a_family_is_a_difference_from_the_one_below(scene: Scene) -> None:
    source = await running(scene.engine)
    await scene.write(source, "first")
    first, how = await scene.snapshot(source)
    assert how == "difference"  # from nothing: it has noted everything since its boot
    assert scene.image(first).stat().st_blocks * 512 < 16 * MIB
    await scene.write(source, "second")
    second, how = await scene.snapshot(source)
    assert how == "difference"
    fork = await scene.engine.fork_snapshot(first.id, ForkRequest("fork"))
    assert await scene.word(fork) == "first"
    await scene.write(fork, "fork")
    third, how = await scene.snapshot(fork)
    assert how == "difference"
    await scene.engine.delete(source.id)
    await scene.engine.delete_snapshot(first.id)
    for taken, word in ((second, "second"), (third, "fork")):
        child = await scene.engine.fork_snapshot(taken.id, ForkRequest(f"of-{word}"))
        assert await scene.word(child) == word
    # The fork's own image is held by its link, also when its last snapshot is gone too.
    assert (await scene.snapshot(fork))[1] == "difference"


async def test_all_is_written_when_the_last_snapshot_is_gone(scene: Scene) -> None:
    source = await running(scene.engine)
    first, _ = await scene.snapshot(source)
    await scene.engine.delete_snapshot(first.id)
    await scene.write(source, "second")
    second, how = await scene.snapshot(source)
    assert how == "all"
    assert scene.image(second).stat().st_blocks * 512 < 16 * MIB  # zeros are holes all the same
    assert (await scene.snapshot(source))[1] == "difference"
    child = await scene.engine.fork_snapshot(second.id, ForkRequest("child"))
    assert await scene.word(child) == "second"


async def test_all_is_written_after_a_save_that_forgot_and_failed(scene: Scene) -> None:
    source = await running(scene.engine)
    await scene.snapshot(source)
    machine = scene.machine_of(source)
    await scene.write(source, "lost")
    machine.fails_after_forgetting = True
    with pytest.raises(StorageFull):
        await scene.engine.snapshot(source.id, kind=LIVE)
    machine.fails_after_forgetting = False
    taken, how = await scene.snapshot(source)
    assert how == "all"
    child = await scene.engine.fork_snapshot(taken.id, ForkRequest("child"))
    assert await scene.word(child) == "lost"


async def test_all_is_written_after_a_capture_that_was_not_kept(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(scene.engine)
    await scene.snapshot(source)
    await scene.write(source, "lost")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stillframe.engine.capture.merge_pages", fails)
        with pytest.raises(StorageFull):
            await scene.engine.snapshot(source.id, kind=LIVE)
    assert (await scene.snapshot(source))[1] == "all"
    # One that ends before anything was saved spoils nothing.
    with monkeypatch.context() as patch:
        patch.setattr(scene.machine_of(source), "pause", _refuses)
        with pytest.raises(VmmFailure):
            await scene.engine.snapshot(source.id, kind=LIVE)
    assert (await scene.snapshot(source))[1] == "difference"


async def _refuses() -> None:
    raise VmmFailure("it does not pause")


async def test_a_live_fork_has_the_image_that_the_next_difference_belongs_to(scene: Scene) -> None:
    source = await running(scene.engine)
    await scene.write(source, "first")
    fork = await scene.engine.fork(source.id, name="fork", from_running=True)
    await scene.write(source, "second")
    assert (await scene.snapshot(source))[1] == "difference"
    other = await scene.engine.fork(source.id, name="other", from_running=True)
    # Its image is another one after it was captured itself, though it has the same name.
    await scene.write(other, "elsewhere")
    await scene.engine.standby(other.id)
    await scene.engine.restore(other.id)
    assert (await scene.snapshot(source))[1] == "all"
    assert (await scene.word(fork), await scene.word(other)) == ("first", "elsewhere")


async def test_a_table_that_was_replaced_meanwhile_is_not_built_upon(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image below is a fork's own, and the fork goes to standby and back during the capture."""
    source = await running(scene.engine)
    await scene.write(source, "first")
    fork = await scene.engine.fork(source.id, name="fork", from_running=True)
    pause = scene.machine_of(source).pause

    async def pausing() -> None:
        for key in ("one", "two", "three"):  # where the source has nothing
            await ask(scene.engine, fork.id, "set", key, key * 10_000)
        await scene.engine.standby(fork.id)
        await scene.engine.restore(fork.id)
        await pause()

    with monkeypatch.context() as patch:
        patch.setattr(scene.machine_of(source), "pause", pausing)
        assert (await scene.snapshot(source))[1] == "difference"


async def test_all_is_written_once_by_a_new_server(tmp_path: Path) -> None:
    async with open_engine(tmp_path, make_engine(tmp_path, NotingDriver(TRACKER))) as engine:
        source = await running(engine)
        await Scene(engine, tmp_path).snapshot(source)
        await engine.close()
        again = make_engine(tmp_path, NotingDriver(TRACKER))
        async with open_engine(tmp_path, again) as successor:
            scene = Scene(successor, tmp_path)
            await scene.write(source, "after")
            taken, how = await scene.snapshot(source)
            assert how == "all"
            assert (await scene.snapshot(source))[1] == "difference"
            child = await successor.fork_snapshot(taken.id, ForkRequest("child"))
            assert await scene.word(child) == "after"


async def test_standby_and_restore_begin_anew_on_the_image_that_is_mapped(scene: Scene) -> None:
    source = await running(scene.engine)
    await scene.write(source, "kept")
    await scene.engine.standby(source.id)
    restored = await scene.engine.restore(source.id)
    assert restored.state is InstanceState.RUNNING
    assert await scene.word(source) == "kept"
    await scene.write(source, "more")
    assert (await scene.snapshot(source))[1] == "difference"


async def test_what_goes_on_in_the_guest_is_told_that_its_connection_was_closed(
    scene: Scene,
) -> None:
    source = await running(scene.engine)
    session = await scene.engine.exec(source.id, ExecRequest(("sleep", "1000")))
    waiting = asyncio.ensure_future(session.wait())
    await scene.snapshot(source)
    with pytest.raises(GuestFailure, match="closed: this hypervisor does so when memory"):
        await asyncio.wait_for(waiting, 60)
    await scene.write(source, "again")  # over a new one
    assert await scene.word(source) == "again"


# -- the parts ---------------------------------------------------------------------------------


def test_a_moment_knows_its_image_and_no_other(tmp_path: Path) -> None:
    image, elsewhere = tmp_path / "image", tmp_path / "elsewhere"
    image.write_bytes(b"memory")
    moment = Moment()
    assert moment.image is None
    moment.is_kept_in(image)
    assert moment.image == image
    elsewhere.hardlink_to(image)
    moment.has_moved_to(elsewhere)
    image.unlink()
    assert moment.image == elsewhere
    elsewhere.unlink()
    assert moment.image is None
    elsewhere.write_bytes(b"of another VM, perhaps with the same inode")
    assert moment.image is None
    moment.is_kept_in(elsewhere)
    assert moment.image is None


def test_a_moment_does_not_know_a_file_that_was_written_since(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"memory")
    moment = Moment(image)
    os.utime(image, ns=(0, 1))
    assert moment.image is None
    assert Moment(tmp_path / "nowhere").image is None


def test_pages_are_merged_and_zeros_become_holes(tmp_path: Path) -> None:
    page, size = os.sysconf("SC_PAGESIZE"), 8 * MIB
    create_sparse(tmp_path / "image", size)
    create_sparse(tmp_path / "difference", size)
    expected = bytearray(b"\x11" * size)
    (tmp_path / "image").write_bytes(expected)
    changed = [(0, page), (5 * page, 9 * page), (3 * MIB, 8 * MIB)]
    with (tmp_path / "image").open("r+b") as image, (tmp_path / "difference").open("r+b") as beside:
        for start, end in changed:
            content = b"\x22" * (end - start - page) + bytes(page)  # the last page is zeros
            beside.seek(start)
            beside.write(content)
            expected[start:end] = content
        beside.flush()
        report = merge_pages(beside.fileno(), Runs.of(changed), image.fileno())
        assert (tmp_path / "image").read_bytes() == expected
        assert report.zeroed == 3 * page
        image.seek(MIB)
        image.write(bytes(MIB))
        image.flush()
        before = (tmp_path / "image").stat().st_blocks
        assert drop_zeros(image.fileno()) == MIB
        assert drop_zeros(image.fileno()) == 0
    expected[MIB : 2 * MIB] = bytes(MIB)
    assert (tmp_path / "image").read_bytes() == expected
    assert (tmp_path / "image").stat().st_blocks < before
