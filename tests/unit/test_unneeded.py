"""Images and boot pairs that nobody needs any more go; those that anybody needs stay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ForkRequest
from stillframe.images.boot import load_boot_pair
from stillframe.model.errors import InvalidRequest, MissingComponent, StorageFull
from stillframe.model.values import Image, Instance
from stillframe.store.records import Records
from support.boot_pair import PAIR, with_pair
from support.engine import ask, open_engine, running
from support.moving import DISK, LIVE, archive_of, pieces, take
from support.registry import layer

pytestmark = pytest.mark.timeout(120)
NAME = "local/app:latest"


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with open_engine(tmp_path / "data") as opened:
        yield opened


async def make_image(engine: Engine, tmp_path: Path, version: str) -> Image:
    source = tmp_path / "image.tar"
    source.write_bytes(layer(("etc/version", version.encode())))
    return await engine.import_image(NAME, source)


async def stopped(engine: Engine, name: str = "one") -> Instance:
    made = await engine.create(CreateRequest(name, NAME))
    return await engine.stop(made.id)


def disks(engine: Engine) -> set[str]:
    return {f"sha256:{path.name}" for path in engine.context.data.images.iterdir()}


def pairs(engine: Engine) -> list[str]:
    return [path.name for path in engine.context.data.system.iterdir()]


# -- root disks -----------------------------------------------------------------------------------
async def test_an_image_made_anew_leaves_nothing_of_the_old_one(
    engine: Engine, tmp_path: Path
) -> None:
    for version in ("1", "2", "3", "3"):
        made = await make_image(engine, tmp_path, version)
        assert disks(engine) == {made.digest}
    await engine.delete_image(NAME)
    assert disks(engine) == set()


async def test_the_old_image_stays_for_its_instance_and_goes_with_it(
    engine: Engine, tmp_path: Path
) -> None:
    old = await make_image(engine, tmp_path, "1")
    one, two = await stopped(engine, "one"), await stopped(engine, "two")
    new = await make_image(engine, tmp_path, "2")
    await engine.delete(one.id)
    assert disks(engine) == {old.digest, new.digest}
    await engine.start(two.id)
    await engine.delete(two.id)
    assert disks(engine) == {new.digest}


async def test_the_old_image_stays_for_its_snapshot_and_goes_with_it(
    engine: Engine, tmp_path: Path
) -> None:
    old = await make_image(engine, tmp_path, "1")
    source = await stopped(engine)
    taken = await engine.snapshot(source.id, kind=DISK)
    new = await make_image(engine, tmp_path, "2")
    await engine.delete(source.id)
    fork = await engine.fork_snapshot(taken.id, ForkRequest("fork"))
    await engine.delete(fork.id)
    assert disks(engine) == {old.digest, new.digest}
    await engine.delete_snapshot(taken.id)
    assert disks(engine) == {new.digest}


async def test_a_fork_under_way_keeps_the_image_of_a_snapshot_that_is_deleted(
    engine: Engine, tmp_path: Path
) -> None:
    old = await make_image(engine, tmp_path, "1")
    source = await stopped(engine)
    taken = await engine.snapshot(source.id, kind=DISK)
    await make_image(engine, tmp_path, "2")
    async with engine.context.using(taken.id):
        deletion = asyncio.create_task(engine.delete_snapshot(taken.id))
        await asyncio.sleep(0)
        assert taken.id not in engine.context.records.snapshots
        await engine.delete(source.id)
        assert old.digest in disks(engine)
    await deletion
    assert old.digest not in disks(engine)


async def test_what_a_killed_server_left_goes_at_the_next_start(tmp_path: Path) -> None:
    async with open_engine(tmp_path / "data") as engine:
        old = await make_image(engine, tmp_path, "1")
        with pytest.MonkeyPatch.context() as patch:  # killed after the commit
            patch.setattr(engine.context.images, "release", lambda digest: None)
            new = await make_image(engine, tmp_path, "2")
        assert disks(engine) == {old.digest, new.digest}
    async with open_engine(tmp_path / "data") as engine:
        assert disks(engine) == {new.digest}


@pytest.mark.parametrize("doubt", ["record", "directory"])
async def test_nothing_goes_while_nobody_knows_what_may_need_it(tmp_path: Path, doubt: str) -> None:
    data = tmp_path / "data"
    async with open_engine(data) as engine:
        old = await make_image(engine, tmp_path, "1")
        one = await stopped(engine)
        new = await make_image(engine, tmp_path, "2")
        with engine.context.records.transaction() as sql:
            if doubt == "record":
                sql.execute("UPDATE instances SET document = '?' WHERE id = ?", (one.id,))
            else:
                sql.execute("DELETE FROM instances WHERE id = ?", (one.id,))
    async with open_engine(data) as engine:
        assert disks(engine) == {old.digest, new.digest}


# -- boot pairs -----------------------------------------------------------------------------------
async def test_a_boot_pair_that_came_along_goes_with_the_last_who_needs_it(
    engine: Engine, tmp_path: Path
) -> None:
    async with open_engine(tmp_path / "there") as there:
        data = await archive_of(there, await with_pair(there, tmp_path / "pair"))
    await engine.context.images.ensure("stillframe/base")
    one, two = await take(engine, data, name="one"), await take(engine, data, name="two")
    await engine.delete_snapshot(one.id)
    assert pairs(engine) == [PAIR]
    fork = await engine.fork_snapshot(two.id, ForkRequest("fork"))
    await engine.delete_snapshot(two.id)
    assert await ask(engine, fork.id, "get", "who") == "source"
    assert pairs(engine) == [PAIR]
    await engine.delete(fork.id)
    assert pairs(engine) == []


async def test_a_boot_pair_of_an_import_that_fails_goes(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_engine(tmp_path / "there") as there:
        data = await archive_of(there, await with_pair(there, tmp_path / "pair"))
    await engine.context.images.ensure("stillframe/base")

    def full(*_: object, **__: object) -> None:
        assert load_boot_pair(engine.context.data.system, PAIR)
        raise StorageFull("the records could not be written")

    with monkeypatch.context() as patch:
        patch.setattr(Records, "put_snapshot", full)
        with pytest.raises(StorageFull):
            await take(engine, data)
    assert pairs(engine) == []
    with pytest.raises(InvalidRequest):
        await engine.import_snapshot(pieces(data[:-1]))
    assert pairs(engine) == []
    assert engine.context.records.intents == {}


async def test_a_boot_pair_stays_for_an_import_under_way(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillframe.engine.moving.arrival._PIECE", 1000)
    async with open_engine(tmp_path / "there") as there:
        data = await archive_of(there, await with_pair(there, tmp_path / "pair"))
    await engine.context.images.ensure("stillframe/base")
    first = await take(engine, data, name="first")

    async def with_a_deletion() -> AsyncIterator[bytes]:
        async for piece in pieces(data[:-1]):
            yield piece
        await engine.delete_snapshot(first.id)
        assert pairs(engine) == [PAIR]
        yield data[-1:]

    taken = await engine.import_snapshot(with_a_deletion(), name="second")
    assert load_boot_pair(engine.context.data.system, PAIR)
    await engine.delete_snapshot(taken.id)
    with pytest.raises(MissingComponent):
        load_boot_pair(engine.context.data.system, PAIR)


async def test_boot_pairs_that_nobody_needs_go_at_the_start(tmp_path: Path) -> None:
    async with open_engine(tmp_path / "data") as engine:
        made = await with_pair(engine, tmp_path / "pair")
        (engine.context.data.system / ("0" * 64)).mkdir()
        (engine.context.data.system / ".new-half").mkdir()
    async with open_engine(tmp_path / "data") as engine:
        assert pairs(engine) == [PAIR]
        assert engine.find_snapshot(made.id).kind is LIVE
        await running(engine, "other")
