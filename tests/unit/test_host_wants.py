"""What the host lacks to read a snapshot is no damage: it is told as it is, nothing is marked."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.host import files
from stillframe.model.errors import DamagedData, HostFailure
from stillframe.model.states import InstanceState
from stillframe.model.values import Snapshot
from stillframe.model.verification import Depth
from stillframe.store import compression, manifest, readers, verification
from support.compressing import LIVE, captured, compressed
from support.descriptors import no_descriptors
from support.engine import ask, running
from support.moving import DISK, archive_of

WANTS = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM]


@contextlib.contextmanager
def unopenable(name: str, code: int) -> Iterator[None]:
    """Files of this name cannot be opened to be read, for the reason ``code``."""
    real = files.open_regular

    def wanting(path: Path, **options: Any) -> int:
        if Path(path).name == name:
            raise OSError(code, os.strerror(code))
        return real(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (compression, manifest, readers, verification):
            patch.setattr(module, "open_regular", wanting)
        yield


@contextlib.contextmanager
def unreadable(code: int) -> Iterator[None]:
    """No content can be read of files that are open."""

    def wanting(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        for module in (readers, verification):
            patch.setattr(module, "read_exactly", wanting)
        yield


async def refuses(work: Awaitable[object], code: int) -> None:
    """The work fails for the host's want, and says which."""
    with pytest.raises(HostFailure) as caught:
        await work
    assert caught.value.code == "storage_error"
    assert os.strerror(code) in caught.value.message


def unmarked(engine: Engine, snapshot: Snapshot) -> bool:
    """Whether a snapshot is known as whole, here and in the database."""
    return engine.find_snapshot(snapshot.id).damaged is None


@pytest.mark.parametrize("name", ["manifest.json", "devices", "memory", "memory.blake3"])
@pytest.mark.parametrize("code", WANTS)
async def test_a_verification_that_lacks_something_marks_nothing(
    engine: Engine, name: str, code: int
) -> None:
    made = await captured(engine)
    with unopenable(name, code):
        await refuses(engine.verify_snapshot(made.id, Depth.FULL), code)
    assert unmarked(engine, made)
    assert (await engine.verify_snapshot(made.id, Depth.FULL)).damage == ()
    await engine.fork_snapshot(made.id, ForkRequest("fork"))


async def test_reading_that_lacks_memory_marks_nothing(engine: Engine) -> None:
    made = await captured(engine)
    with unreadable(errno.ENOMEM):
        await refuses(engine.verify_snapshot(made.id, Depth.FULL), errno.ENOMEM)
    assert unmarked(engine, made)
    with unreadable(errno.EIO):  # that is the disk's own word on the file
        assert (await engine.verify_snapshot(made.id, Depth.FULL)).damage
    assert not unmarked(engine, made)


async def test_a_compressed_one_is_no_exception(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await compressed(engine)
    with unopenable("memory.zst", errno.EMFILE):
        await refuses(engine.verify_snapshot(made.id, Depth.FULL), errno.EMFILE)
        await refuses(engine.fork_snapshot(made.id, ForkRequest("fork")), errno.EMFILE)
    real, begun = files.read_exactly, False

    def wanting(fd: int, length: int, offset: int) -> bytes:
        if offset == 0:  # the first frame; the seek table is at the end
            nonlocal begun
            begun = True
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(fd, length, offset)

    monkeypatch.setattr(compression, "read_exactly", wanting)
    await refuses(engine.verify_snapshot(made.id, Depth.FULL), errno.ENOMEM)
    assert begun
    assert unmarked(engine, made)
    monkeypatch.undo()
    await engine.fork_snapshot(made.id, ForkRequest("fork"))


async def test_a_process_without_descriptors_finds_no_damage(engine: Engine) -> None:
    source = await engine.stop((await running(engine)).id)
    made = await engine.snapshot(source.id, kind=DISK)
    await engine.verify_snapshot(made.id, Depth.FULL)
    for free in range(3):  # the manifest, the disk and its table are open at once, or were
        with no_descriptors(but=free):
            if free < 2:
                await refuses(engine.verify_snapshot(made.id, Depth.FULL), errno.EMFILE)
            else:
                assert (await engine.verify_snapshot(made.id, Depth.FULL)).damage == ()
        assert unmarked(engine, made)


Load = Callable[[Engine, Snapshot], Awaitable[object]]


async def _restore(engine: Engine, made: Snapshot) -> object:
    if engine.find_instance(made.source_instance_id).state is not InstanceState.STOPPED:
        await engine.stop(made.source_instance_id)
    return await engine.restore_snapshot(made.source_instance_id, made.id)


LOADS: dict[str, Load] = {
    "fork": lambda engine, made: engine.fork_snapshot(made.id, ForkRequest("fork")),
    "restore": _restore,
    "export": archive_of,
}


@pytest.mark.parametrize("name", ["manifest.json", "devices", "overlay.raw"])
@pytest.mark.parametrize("verb", LOADS)
async def test_a_load_that_lacks_something_is_told_so_and_can_be_tried_again(
    engine: Engine, verb: str, name: str
) -> None:
    made = await captured(engine)
    for code in (errno.EMFILE, errno.EACCES):
        with unopenable(name, code):
            await refuses(LOADS[verb](engine, made), code)
        assert unmarked(engine, made)
    assert not engine.context.records.intents
    await LOADS[verb](engine, made)


async def test_a_fork_is_kept_warm_once_the_want_is_over(engine: Engine) -> None:
    made = await captured(engine)
    with unopenable("manifest.json", errno.EMFILE):
        await engine.set_warm(made.id, 1)
        async with asyncio.timeout(30):
            status = await engine.context.warm.settled(made.id)
    assert os.strerror(errno.EMFILE) in str(status.limited_by)
    assert unmarked(engine, made)


async def test_a_snapshot_that_cannot_see_the_one_below_marks_it_not(engine: Engine) -> None:
    made = await captured(engine)
    with unopenable("manifest.json", errno.EMFILE):
        await refuses(engine.snapshot(made.source_instance_id, kind=LIVE), errno.EMFILE)
    assert unmarked(engine, made)
    await engine.snapshot(made.source_instance_id, kind=LIVE)


async def test_a_standby_image_that_cannot_be_opened_is_kept(engine: Engine) -> None:
    source = await running(engine)
    await engine.standby(source.id)
    with unopenable("manifest.json", errno.EMFILE):
        await refuses(engine.restore(source.id), errno.EMFILE)
        await refuses(engine.fork(source.id, name="fork"), errno.EMFILE)
        await refuses(engine.snapshot(source.id, kind=LIVE), errno.EMFILE)
        preview = await engine.preview_instance_fork(source.id, name="fork")
        assert os.strerror(errno.EMFILE) in " ".join(preview.refused)
    assert engine.find_instance(source.id).state is InstanceState.STANDBY
    await engine.restore(source.id)
    await ask(engine, source.id, "true")


def test_what_is_the_files_own_is_damage(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for path in (gone, link, tmp_path):
        with pytest.raises(DamagedData):
            manifest.read_small(path, 100)
    with unopenable("gone", errno.EIO), pytest.raises(DamagedData):
        manifest.read_small(gone, 100)
    assert manifest.unreadable("x", OSError(errno.EIO, "bad sector")).facts["file"] == "x"
