"""What the crash harness found in the making and deleting of images, each as a scenario."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from stillframe.api.routes.images import sweep_uploads
from stillframe.engine.engine import Engine
from stillframe.images import library
from stillframe.model.errors import NotFound, StorageFull
from stillframe.model.values import Image
from stillframe.store.records import Intent, Records
from support.engine import open_engine, running
from support.registry import layer


async def make_image(engine: Engine, tmp_path: Path) -> Image:
    source = tmp_path / "image.tar"
    source.write_bytes(layer(("etc/hostname", b"other\n")))
    return await engine.import_image("other", source)


def disks(data_dir: Path) -> set[str]:
    return {f"sha256:{path.name}" for path in (data_dir / "images").iterdir()}


async def test_an_image_whose_record_cannot_be_written_leaves_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"
    async with open_engine(data_dir) as engine:

        def full(*_: object, **__: object) -> None:
            raise StorageFull("the records could not be written")

        with monkeypatch.context() as patch:
            patch.setattr(Records, "put", full)
            with pytest.raises(StorageFull):
                await make_image(engine, tmp_path)
        assert disks(data_dir) == set()
        assert engine.context.records.intents == {}
        made = await make_image(engine, tmp_path)
        assert disks(data_dir) == {made.digest}


@pytest.mark.parametrize("verb", ["make image", "delete image"])
async def test_a_disk_that_a_killed_server_left_without_a_name_goes_at_the_next_start(
    tmp_path: Path, verb: str
) -> None:
    data_dir = tmp_path / "data"
    async with open_engine(data_dir) as engine:
        made = await make_image(engine, tmp_path)
        engine.context.records.delete(made.name, Intent("i", verb, {"image": made.digest}))
        assert disks(data_dir) == {made.digest}
    async with open_engine(data_dir) as engine:
        assert disks(data_dir) == set()
        assert engine.context.records.intents == {}


async def test_a_disk_that_an_instance_has_stays_though_its_name_was_lost(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await engine.stop(source.id)
        records, digest = engine.context.records, source.image_digest
        name = engine.context.images.by_digest(digest).name
        records.delete(name, Intent("i", "make image", {"image": digest}))
    async with open_engine(tmp_path) as engine:
        assert engine.context.images.root_disk(digest).is_file()


async def test_an_image_that_came_along_is_taken_back_though_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"
    async with open_engine(data_dir) as engine:
        made = await make_image(engine, tmp_path)

        def full(*_: object) -> Any:
            raise StorageFull("the records could not be written")

        with monkeypatch.context() as patch:
            patch.setattr(Records, "transaction", full)
            engine.context.images.disown(made.digest)
        assert disks(data_dir) == set()
        with pytest.raises(NotFound):
            engine.find_image("other")
        await running(engine)  # the next commit takes what is owed along
    async with open_engine(data_dir) as engine:
        with pytest.raises(NotFound):
            engine.find_image("other")


async def test_an_image_that_comes_along_and_cannot_be_recorded_leaves_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"
    async with open_engine(data_dir) as engine:
        images = engine.context.images
        made = await make_image(engine, tmp_path)
        staging = images.new_staging()
        shutil.copytree(images.root_disk(made.digest).parent, staging)
        await engine.delete_image("other")

        def full(*_: object, **__: object) -> None:
            raise StorageFull("the records could not be written")

        monkeypatch.setattr(Records, "put", full)
        with pytest.raises(StorageFull):
            images.adopt(staging, made.digest)
        assert disks(data_dir) == set()


def test_what_a_killed_server_had_received_of_an_image_goes(tmp_path: Path) -> None:
    (tmp_path / "upload-abc").mkdir()
    (tmp_path / "upload-abc" / "image.tar").write_bytes(b"half")
    (tmp_path / "snapshots").mkdir()
    sweep_uploads(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshots"]


async def test_of_two_makings_of_one_disk_the_one_that_fails_leaves_it_to_the_other(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, failed = library._publish, threading.Event()
    put = Records.put

    def slowly(staging: Path, home: Path) -> None:
        first = "/first:" in (staging / "config.json").read_text()
        publish(staging, home)
        if first:
            failed.wait(0.5)  # were both at it, the other would fail meanwhile

    def refuse(self: Records, image: Image, **how: Any) -> None:
        if "/second:" in image.name:
            failed.set()
            raise StorageFull("the records could not be written")
        put(self, image, **how)

    monkeypatch.setattr(library, "_publish", slowly)
    monkeypatch.setattr(Records, "put", refuse)
    source = tmp_path / "image.tar"
    source.write_bytes(layer(("etc/hostname", b"other\n")))
    first, second = await asyncio.gather(
        engine.import_image("first", source),
        engine.import_image("second", source),
        return_exceptions=True,
    )
    assert isinstance(second, StorageFull)
    assert isinstance(first, Image)
    assert engine.context.images.root_disk(first.digest).is_file()
    await engine.delete_image("first")
    assert not list((tmp_path / "images").iterdir())


async def test_a_disk_that_is_being_made_again_outlives_its_first_name(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, loop = library._publish, asyncio.get_running_loop()

    async def delete() -> None:
        await engine.delete_image("other")

    def then_delete(staging: Path, home: Path) -> None:
        publish(staging, home)
        asyncio.run_coroutine_threadsafe(delete(), loop).result(30)

    first = await make_image(engine, tmp_path)
    monkeypatch.setattr(library, "_publish", then_delete)
    second = await engine.import_image("second", tmp_path / "image.tar")
    assert second.digest == first.digest
    assert engine.context.images.root_disk(second.digest).is_file()
    assert [image.name for image in engine.list_images()] == [second.name]
