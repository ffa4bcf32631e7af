"""Memory belongs to a kernel and initrd: they come along, or it is refused for their lack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.moving.export import about_of
from stillframe.images.boot import load_boot_pair
from stillframe.model.errors import InvalidRequest, MissingComponent
from stillframe.store.archive_export import export
from support.boot_pair import INITRD, KERNEL, PAIR, files_of_pair, with_pair
from support.engine import ask, open_engine
from support.moving import archive_of, take


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine that has the image, and no kernel."""
    async with open_engine(tmp_path / "there") as engine:
        await engine.context.images.ensure("stillframe/base")
        yield engine


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Engine]:
    async with open_engine(tmp_path / "here") as engine:
        yield engine


async def test_kernel_and_initrd_come_along_where_they_are_missing(
    here: Engine, there: Engine, tmp_path: Path
) -> None:
    made = await with_pair(here, tmp_path / "pair")
    data = await archive_of(here, made)
    arrived = await take(there, data)
    kept = load_boot_pair(there.context.data.system, PAIR)
    assert (kept.kernel.read_bytes(), kept.initrd.read_bytes()) == (KERNEL, INITRD)
    assert (await there.compatibility(arrived.id)).reasons == ()
    fork = await there.fork_snapshot(arrived.id, ForkRequest("fork"))
    assert await ask(there, fork.id, "get", "who") == "source"
    names = {path.name for path in there.context.data.snapshot(arrived.id).directory.iterdir()}
    assert not names & {"kernel", "initrd", "kernel.blake3", "initrd.blake3"}
    inode = kept.kernel.stat().st_ino
    assert await archive_of(there, await take(there, data, name="again"))
    assert kept.kernel.stat().st_ino == inode  # the one that was there stays


async def test_without_them_memory_is_foreign(here: Engine, there: Engine, tmp_path: Path) -> None:
    made = await with_pair(here, tmp_path / "pair")
    data = b"".join(export(here.context.data.snapshot(made.id), about=about_of(made)))
    with pytest.raises(Exception, match="kernel and initrd that are not here") as caught:
        await take(there, data)
    assert getattr(caught.value, "code", "") == "foreign_snapshot"
    arrived = await take(there, data, allow_foreign=True)
    verdict = await there.compatibility(arrived.id)
    assert not verdict.fork
    assert verdict.reasons == ("its memory belongs to a kernel and initrd that are not here",)
    assert await archive_of(there, arrived)  # without them, as it came
    await take(there, await archive_of(here, made), name="whole")
    assert (await there.compatibility(arrived.id)).fork


@pytest.mark.parametrize("lie", ["contents", "digest", "files"])
async def test_what_is_not_that_pair_is_refused(
    here: Engine, there: Engine, tmp_path: Path, lie: str
) -> None:
    made = await with_pair(here, tmp_path / "pair")
    other = files_of_pair(tmp_path / "other", INITRD if lie != "contents" else INITRD + b"?")
    if lie == "digest":
        other = replace(other, digest="0" * 64)
    if lie == "files":
        other = replace(other, files={"kernel": other.files["kernel"]})
    payload = here.context.data.snapshot(made.id)
    with pytest.raises(InvalidRequest, match="kernel and initrd"):
        await take(there, b"".join(export(payload, about=about_of(made), boot=other)))
    assert list(there.context.data.system.glob("*")) == []
    assert list(there.context.data.snapshots.iterdir()) == []
    with pytest.raises(MissingComponent):
        load_boot_pair(there.context.data.system, PAIR)
