"""A snapshot exported by one engine and imported by another: whole, or refused and nothing left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.moving import arrival
from stillframe.engine.moving import export as exporting
from stillframe.engine.moving.export import about_of
from stillframe.images import library
from stillframe.model.errors import (
    Conflict,
    DamagedData,
    Forbidden,
    InsufficientResources,
    InvalidRequest,
    NotFound,
    NotSupported,
    StillframeError,
    StorageFull,
)
from stillframe.model.states import InstanceState
from stillframe.model.values import CompressionConfig, Hypervisor, Snapshot
from stillframe.model.verification import Depth
from stillframe.store.archive_export import export
from stillframe.store.archive_import import Importer
from stillframe.store.manifest import encode_document, read_manifest
from stillframe.store.records import to_json
from stillframe.vmm.fake.driver import FakeDriver
from support.archives import positions
from support.engine import ask, make_engine, open_engine, running
from support.moving import DISK, LIVE, archive_of, pieces, remembering, take
from support.payloads import flip

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Engine]:
    async with open_engine(tmp_path / "here") as engine:
        yield engine


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Engine]:
    """Another engine, which has the same image."""
    async with open_engine(tmp_path / "there") as engine:
        await engine.context.images.ensure("stillframe/base")
        yield engine


def nothing_of_it(engine: Engine) -> bool:
    """Whether an engine holds no snapshot, nor any part of one."""
    context = engine.context
    left = [*context.data.snapshots.iterdir(), *context.data.images.glob(".new-*")]
    return not (left or context.records.intents or engine.list_snapshots())


async def refused(engine: Engine, data: bytes, **options: Any) -> StillframeError:
    """The error of an import that must fail, and leave nothing."""
    with pytest.raises(StillframeError) as caught:
        await take(engine, data, **options)
    assert nothing_of_it(engine)
    return caught.value


# -- there and back -------------------------------------------------------------------------------
async def test_memory_captured_here_goes_on_there(here: Engine, there: Engine) -> None:
    source = await remembering(here)
    for number in range(20):
        await ask(here, source.id, "set", f"key-{number}", f"{number}" * 300)
    made = await here.snapshot(source.id, kind=LIVE, name="ready", tags={"a": "1"})
    await ask(here, source.id, "set", "who", "source, later")
    arrived = await take(there, await archive_of(here, made))
    assert arrived.id != made.id
    kept = ("kind", "name", "tags", "source_instance_id", "source_instance_name", "created_at")
    for field in (*kept, "source_hypervisor", "size_bytes", "pause_ms"):
        assert getattr(arrived, field) == getattr(made, field)
    assert there.find_snapshot(arrived.id) == arrived
    fork = await there.fork_snapshot(arrived.id, ForkRequest("fork"))
    assert fork.state is InstanceState.RUNNING
    assert await ask(there, fork.id, "get", "who") == "source"
    for number in range(20):
        assert await ask(there, fork.id, "get", f"key-{number}") == f"{number}" * 300
    assert await ask(here, source.id, "get", "who") == "source, later"
    assert (await there.verify_snapshot(arrived.id, Depth.FULL)).damage == ()


async def test_a_stopped_one_arrives_with_its_image_and_boots(here: Engine, tmp_path: Path) -> None:
    source = await here.stop((await running(here)).id)
    made = await here.snapshot(source.id, kind=DISK)
    data = await archive_of(here, made, image=True)
    async with open_engine(tmp_path / "bare") as bare:
        arrived = await take(bare, data)
        assert (await bare.compatibility(arrived.id)).fork
        fork = await bare.fork_snapshot(
            arrived.id, ForkRequest("fork", target_state=InstanceState.RUNNING)
        )
        assert fork.image_digest == source.image_digest
        (image,) = bare.list_images()
        assert image.digest == source.image_digest
        again = await take(bare, data)  # the image is there by now
        assert len(bare.list_images()) == 1
        assert not list(bare.context.data.images.glob(".new-*"))
        assert not list(bare.context.data.snapshot(again.id).directory.glob("root*"))
    async with open_engine(tmp_path / "bare") as bare:
        assert bare.find_image(image.name).digest == source.image_digest


async def test_the_image_must_be_there_or_come_along(here: Engine, tmp_path: Path) -> None:
    source = await here.stop((await running(here)).id)
    made = await here.snapshot(source.id, kind=DISK)
    async with open_engine(tmp_path / "bare") as bare:
        error = await refused(bare, await archive_of(here, made))
        assert isinstance(error, Conflict)
        assert error.code == "image_missing"
        assert "stillframe/base" in error.message
        with_image = await archive_of(here, made, image=True)
        assert isinstance(await refused(bare, with_image, add_image=False), Forbidden)
        assert bare.list_images() == []


@pytest.mark.parametrize("piece", [900, 2**20])
async def test_a_broken_export_goes_on_where_it_broke(
    here: Engine, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(exporting, "_PIECE", piece)
    made = await here.snapshot((await remembering(here)).id, kind=LIVE)
    whole = await here.export_snapshot(made.id)
    data = b"".join([piece async for piece in whole])
    await whole.close()
    for offset in (1, 5000, len(data) - 1, len(data)):
        assert await archive_of(here, made, offset=offset, tag=whole.tag) == data[offset:]
    with pytest.raises(InvalidRequest):
        await archive_of(here, made, offset=len(data) + 1, tag=whole.tag)
    here.edit_snapshot(made.id, {"name": "other"})
    with pytest.raises(Conflict):
        await archive_of(here, made, offset=1, tag=whole.tag)
    here.edit_snapshot(made.id, {"name": None, "pinned": True})
    assert await archive_of(here, made, tag=whole.tag) == data  # a pin is not in it


async def test_an_export_survives_the_deletion_of_its_snapshot(here: Engine) -> None:
    made = await here.snapshot((await remembering(here)).id, kind=LIVE)
    data = await archive_of(here, made)
    archive = await here.export_snapshot(made.id)
    async with asyncio.timeout(30):
        await here.delete_snapshot(made.id)  # does not wait for it
    assert b"".join([piece async for piece in archive]) == data
    await archive.close()
    with pytest.raises(NotFound):
        await here.export_snapshot(made.id)


async def test_damage_is_found_before_it_is_sent(here: Engine, there: Engine) -> None:
    made = await here.snapshot((await remembering(here)).id, kind=LIVE)
    payload = here.context.data.snapshot(made.id)
    flip(payload.devices, 3)
    with pytest.raises(DamagedData):
        await here.export_snapshot(made.id)
    flip(payload.devices, 3)
    flip(payload.overlay, 8 * (payload.overlay.stat().st_size - 1))
    sent = bytearray()
    with pytest.raises(DamagedData):
        await _read_into(sent, here, made)
    error = await refused(there, bytes(sent))  # no whole archive
    assert (error.status, error.code) == (400, "damaged_archive")


async def _read_into(sent: bytearray, engine: Engine, snapshot: Snapshot) -> None:
    archive = await engine.export_snapshot(snapshot.id)
    async for piece in archive:
        sent += piece


# -- refused --------------------------------------------------------------------------------------
async def test_damaged_and_truncated_archives_leave_nothing(here: Engine, there: Engine) -> None:
    made = await here.snapshot((await remembering(here)).id, kind=LIVE)
    data = await archive_of(here, made)
    places = [position.offset for position in positions(data)]
    for end in (0, 7, places[1] + 5, places[len(places) // 2], places[-2], len(data) - 1):
        error = await refused(there, data[:end])
        assert (error.status, error.code) == (400, "damaged_archive")
    for place in (places[0] + 100, places[1] + 3, places[-3] + 90, len(data) - 10):
        error = await refused(there, data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert error.status == 400
        assert "offset" in error.facts
    assert (await refused(there, data + b"x")).status == 400
    assert (await refused(there, b"no archive, but longer than a head")).status == 400


async def test_what_is_too_large_is_refused_before_its_contents(
    here: Engine, there: Engine
) -> None:
    made = await here.snapshot((await remembering(here)).id, kind=LIVE)
    data, context = await archive_of(here, made), there.context
    usual = context.settings
    limits: tuple[tuple[dict[str, Any], type[StillframeError]], ...] = (
        ({"max_archive_bytes": 90 * 2**20}, InvalidRequest),
        ({"max_memory_bytes": 32 * 2**20}, InvalidRequest),
        ({"max_overlay_bytes": 2**20}, InvalidRequest),
        ({"max_snapshot_bytes": 4096}, InsufficientResources),
        ({"min_free_bytes": 2**60}, StorageFull),
    )
    for limit, kind in limits:
        context.settings = replace(usual, **limit)
        assert isinstance(await refused(there, data), kind), limit
    context.settings = replace(usual, max_snapshots=1)
    first = await take(there, data)
    with pytest.raises(InsufficientResources):
        await take(there, data)
    assert [s.id for s in there.list_snapshots()] == [first.id]


async def test_a_name_that_is_taken_can_be_replaced(here: Engine) -> None:
    source = await remembering(here)
    made = await here.snapshot(source.id, kind=LIVE, name="ready")
    data = await archive_of(here, made)
    with pytest.raises(Conflict, match="ready"):
        await take(here, data)
    second = await take(here, data, name="second")
    assert (second.name, second.source_instance_id) == ("second", source.id)
    assert len(list(here.context.data.snapshots.iterdir())) == 2
    with pytest.raises(InvalidRequest):
        await take(here, data, name="Not Good")


async def test_memory_that_cannot_run_here_is_foreign(
    here: Engine, there: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F38, also for a hypervisor that was upgraded on one host."""
    made = await here.snapshot((await remembering(here)).id, kind=LIVE)
    data = await archive_of(here, made)
    driver = there.context.drivers[Hypervisor.FAKE]
    assert isinstance(driver, FakeDriver)
    probe = replace(await driver.probe(), version="2", accelerator="kvm")

    async def other_probe() -> Any:
        return probe

    monkeypatch.setattr(driver, "probe", other_probe)
    error = await refused(there, data)
    assert (error.status, error.code) == (409, "foreign_snapshot")
    arrived = await take(there, data, allow_foreign=True)
    verdict = await there.compatibility(arrived.id)
    assert not verdict.fork
    assert len(verdict.reasons) == 2
    assert "version 1, this host has 2" in verdict.reasons[0]
    with pytest.raises(StillframeError):
        await there.fork_snapshot(arrived.id, ForkRequest("fork"))
    there.context.drivers = {}
    assert not (await there.compatibility(arrived.id)).fork


INTEL, AMD = "GenuineIntel family 6 model 85 flags 01", "AuthenticAMD family 25 model 1 flags 02"


def on_a_host(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, *, accelerator: str, processor: str
) -> None:
    """Have an engine find this accelerator and processor."""
    driver = engine.context.drivers[Hypervisor.FAKE]
    probe_as_it_is = driver.probe

    async def probe() -> Any:
        return replace(await probe_as_it_is(), accelerator=accelerator, processor=processor)

    monkeypatch.setattr(driver, "probe", probe)


@pytest.mark.parametrize(
    ("accelerator", "processors", "judged"),
    [
        ("kvm", (INTEL, INTEL), None),
        ("kvm", (INTEL, AMD), f"on the processor {INTEL}, this host has {AMD}"),
        ("kvm", ("", AMD), "not known on which processor"),
        ("kvm", (INTEL, ""), None),  # this host's kernel does not tell
        ("tcg", ("qemu64", "qemu64"), None),
        ("tcg", ("", "qemu64"), None),  # it never was another
    ],
)
async def test_memory_is_judged_by_the_processor_that_its_guest_sees(
    here: Engine,
    monkeypatch: pytest.MonkeyPatch,
    accelerator: str,
    processors: tuple[str, str],
    judged: str | None,
) -> None:
    then, now = processors
    made = await here.snapshot((await running(here)).id, kind=LIVE)
    template = replace(made.template, accelerator=accelerator, processor=then)
    here.context.records.update_snapshot(replace(made, template=template))
    on_a_host(monkeypatch, here, accelerator=accelerator, processor=now)
    verdict = await here.compatibility(made.id)
    assert len(verdict.reasons) == (judged is not None)
    assert (judged or "") in "".join(verdict.reasons)
    assert verdict.fork is ((then, now) != (INTEL, AMD))
    if not verdict.fork:
        with pytest.raises(NotSupported, match="on the processor"):
            await here.fork_snapshot(made.id, ForkRequest("fork"))


async def test_the_processor_of_a_capture_is_in_its_manifest(
    here: Engine, there: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in (here, there):
        on_a_host(monkeypatch, engine, accelerator="none", processor=INTEL)
    made = await here.snapshot((await running(here)).id, kind=LIVE)
    manifest = read_manifest(here.context.data.snapshot(made.id).manifest)
    assert (manifest["processor"], made.template.processor) == (INTEL, INTEL)
    arrived = await take(there, await archive_of(here, made))
    assert arrived.template.processor == INTEL
    assert (await there.compatibility(arrived.id)).reasons == ()


async def test_a_stopped_one_of_another_hypervisor_asks_for_one_of_ours(
    here: Engine, there: Engine
) -> None:
    source = await here.stop((await running(here)).id)
    made = await here.snapshot(source.id, kind=DISK)
    template = replace(made.template, hypervisor=Hypervisor.QEMU)
    other = replace(made, source_hypervisor=Hypervisor.QEMU, template=template)
    payload = here.context.data.snapshot(made.id)
    document = json.loads(payload.manifest.read_bytes())
    assert document.pop("hypervisor") == "fake"  # a fact that may be absent
    payload.manifest.write_bytes(encode_document(document))
    arrived = await take(there, b"".join(export(payload, about=about_of(other))))
    verdict = await there.compatibility(arrived.id)
    assert verdict.fork
    assert "target_hypervisor fake" in verdict.reasons[0]
    request = ForkRequest("fork", target_hypervisor=Hypervisor.FAKE)
    assert (await there.fork_snapshot(arrived.id, request)).state is InstanceState.STOPPED


def _template(**changes: Any) -> Change:
    return lambda about: about["snapshot"]["template"].update(changes)


def _snapshot(**changes: Any) -> Change:
    return lambda about: about["snapshot"].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.clear(),
        lambda about: about.update(snapshot=[]),
        lambda about: about["snapshot"].pop("template"),
        _snapshot(name="../x"),
        _snapshot(kind="Standby"),
        _snapshot(source_instance_id="../../etc"),
        _snapshot(source_instance_name="\x1b[31m"),
        _snapshot(description="\x1b[31mred"),
        _snapshot(description="\ud800"),
        _snapshot(tags={"a\n": "b"}),
        _snapshot(created_at="2026-01-01T00:00:00"),
        _snapshot(created_at="0001-01-01T00:00:00+01:00"),
        _snapshot(pause_ms=-1),
        _snapshot(pause_ms=float("inf")),
        _snapshot(source_hypervisor="qemu"),
        _snapshot(parent_snapshot_id="/"),
        _template(image_digest="sha256:../../x"),
        _template(image_digest="sha256:" + "0" * 64),
        _template(image="\x00"),
        _template(boot="../kernel"),
        _template(memory_bytes=2**50),
        _template(memory_bytes=3),
        _template(vcpus=0),
        _template(overlay_bytes=1),
        _template(env={"A=B": "x"}),
        _template(cmd=["a\0b"]),
        _template(hypervisor_version="9"),
        _template(id="../x"),
        _template(created_at="2026-01-01T00:00:00"),
        _template(created_at="9999-12-31T23:59:59-01:00"),
        _template(snapshot_policy={"compression": {"enabled": True, "level": 99}}),
        _template(snapshot_policy={"compression": {"enabled": True, "algorithm": "x"}}),
        _template(snapshot_policy={"standby_compression_delay": "-PT5S"}),
        _template(snapshot_policy={"standby_compression_delay": "P999999999D"}),
        _template(limits={"disk": -1}),
        _template(limits={"download": 10**16}),
        _template(device_layout=0),
        _template(tags={"a\n": "b"}),
        _template(name="Not Good"),
        _template(network_enabled="perhaps"),
    ],
)
async def test_what_an_archive_tells_is_not_believed(there: Engine, change: Change) -> None:
    source = await there.stop((await running(there)).id)
    made = await there.snapshot(source.id, kind=DISK)
    payload = there.context.data.snapshot(made.id)
    about = about_of(made)
    change(about)
    data = b"".join(export(payload, about=about))
    with pytest.raises(StillframeError) as caught:
        await take(there, data)
    assert 400 <= caught.value.status < 500
    assert [path.name for path in there.context.data.snapshots.iterdir()] == [made.id]
    assert not there.context.records.intents


async def test_what_belongs_to_the_old_server_stays_behind(here: Engine, there: Engine) -> None:
    source = await here.stop((await running(here)).id)
    tags = {"hypeman.scheduled": "true", "hypeman.schedule_instance_id": source.id, "a": "b"}
    made = await here.snapshot(source.id, kind=DISK, tags=tags)
    told = replace(
        made, pinned=True, warm_count=7, damaged="no", compression=CompressionConfig(True)
    )
    data = b"".join(
        export(here.context.data.snapshot(made.id), about={"snapshot": _document(told)})
    )
    arrived = await take(there, data)
    assert dict(arrived.tags) == {"a": "b"}
    assert (arrived.pinned, arrived.warm_count, arrived.damaged) == (False, 0, None)
    assert arrived.compression is None


async def test_what_comes_was_made_before_it_came(here: Engine, there: Engine) -> None:
    source = await here.stop((await running(here)).id)
    made = await here.snapshot(source.id, kind=DISK)
    future = datetime(2500, 1, 1, tzinfo=UTC)
    told = replace(made, created_at=future, template=replace(made.template, created_at=future))
    data = b"".join(
        export(here.context.data.snapshot(made.id), about={"snapshot": _document(told)})
    )
    arrived = await take(there, data)
    assert made.created_at < arrived.created_at <= there.context.now()
    assert arrived.template.created_at <= there.context.now()


def _document(snapshot: Snapshot) -> Any:
    return json.loads(to_json(snapshot))


# -- interrupted ----------------------------------------------------------------------------------
async def test_a_client_that_goes_leaves_nothing(here: Engine, there: Engine) -> None:
    made = await here.snapshot((await remembering(here)).id, kind=LIVE)
    data = await archive_of(here, made)

    async def breaking() -> AsyncIterator[bytes]:
        yield data[: len(data) * 2 // 3]
        raise InvalidRequest("the client has gone")

    with pytest.raises(InvalidRequest, match="gone"):
        await there.import_snapshot(breaking())
    assert nothing_of_it(there)
    arrived = asyncio.Event()

    async def hanging() -> AsyncIterator[bytes]:
        yield data[: len(data) // 2]
        yield data[len(data) // 2 : -1]
        arrived.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(there.import_snapshot(hanging()))
    await arrived.wait()
    assert not nothing_of_it(there)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert nothing_of_it(there)


class CrashError(BaseException):
    """Stands for kill -9: no clean-up of ours may run."""


@pytest.mark.parametrize("step", ["feed", "finish", "stage", "publish", "adopt", "put_snapshot"])
async def test_a_crash_anywhere_in_an_import_leaves_nothing(
    here: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source = await here.stop((await running(here)).id)
    made = await here.snapshot(source.id, kind=DISK, name="ready")
    data = await archive_of(here, made, image=True)
    engine = make_engine(tmp_path / "there")
    await engine.open()
    context = engine.context
    targets: dict[str, object] = {
        "feed": Importer, "finish": Importer, "stage": context.images,
        "publish": arrival, "adopt": context.images, "put_snapshot": context.records,
    }  # fmt: skip
    known = getattr(targets[step], step)

    def crash(*arguments: Any, **keywords: Any) -> None:
        if step in ("finish", "publish"):
            known(*arguments, **keywords)  # the crash comes right after it
        raise CrashError

    monkeypatch.setattr(targets[step], step, crash)
    monkeypatch.setattr(arrival, "remove_tree", lambda _: None)
    monkeypatch.setattr(context.records, "fulfil", lambda _: None)
    monkeypatch.setattr(Importer, "abort", lambda _: None)
    monkeypatch.setattr(context.images, "delete", lambda _: None)
    with pytest.raises(CrashError):
        await take(engine, data)
    assert list(context.data.snapshots.iterdir())
    await engine.close()
    monkeypatch.undo()
    async with open_engine(tmp_path / "there") as again:
        assert nothing_of_it(again)
        arrived = await take(again, data)
        assert (await again.fork_snapshot(arrived.id, ForkRequest("fork"))).name == "fork"


async def test_a_failure_at_the_commit_takes_the_image_back(
    here: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await here.stop((await running(here)).id)
    made = await here.snapshot(source.id, kind=DISK)
    data = await archive_of(here, made, image=True)
    async with open_engine(tmp_path / "bare") as bare:
        with monkeypatch.context() as patch:

            def full(*_: object, **__: object) -> None:
                raise StorageFull("no space")

            patch.setattr(bare.context.records, "put_snapshot", full)
            assert isinstance(await refused(bare, data), StorageFull)
        assert bare.list_images() == []
        assert not list(bare.context.data.images.iterdir())
        await take(bare, data)


async def test_pieces_of_any_length_are_taken(here: Engine, there: Engine) -> None:
    source = await here.stop((await running(here)).id)
    made = await here.snapshot(source.id, kind=DISK)
    data = await archive_of(here, made)
    for size in (1000, 3_000_000):
        await there.import_snapshot(pieces(data, size))
    assert len(there.list_snapshots()) == 2


@pytest.mark.parametrize("recorded", [False, True])
async def test_an_image_that_a_crash_left_without_its_snapshot_goes(
    here: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """The server ends while it adopts the image, or between that and the snapshot's record."""
    source = await here.stop((await running(here)).id)
    made = await here.snapshot(source.id, kind=DISK)
    data = await archive_of(here, made, image=True)

    class Ended(BaseException):
        pass

    def end(*_: Any, **__: Any) -> None:
        raise Ended

    first = make_engine(tmp_path / "bare")
    await first.open()
    with monkeypatch.context() as patch:
        records = first.context.records
        patch.setattr(records, "put_snapshot" if recorded else "put", end)
        for undone in ("fulfil", "delete"):  # nothing is undone by a server that is gone
            patch.setattr(records, undone, lambda *_, **__: None)
        patch.setattr(library, "remove_tree", lambda _: None)
        with pytest.raises(Ended):
            await take(first, data)
    await first.close()
    images = first.context.data.images
    assert [path.name for path in images.iterdir()] == [made.template.image_digest[7:]]
    async with open_engine(tmp_path / "bare") as second:
        assert list(images.iterdir()) == []
        assert nothing_of_it(second)
        assert second.list_images() == []
        arrived = await take(second, data)
    async with open_engine(tmp_path / "bare") as third:
        assert (await third.compatibility(arrived.id)).fork
        assert len(third.list_images()) == 1
