"""Instances that are deleted, or otherwise disturbed, while they are being made."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ForkRequest
from stillframe.images.library import ImageLibrary
from stillframe.model.errors import Conflict, InvalidRequest, InvalidState, NotFound
from stillframe.model.states import InstanceState
from stillframe.model.values import ImageStatus, SnapshotKind
from stillframe.vmm.fake.driver import FakeDriver, FakeMachine
from support.engine import ask, running, traces
from support.registry import layer

pytestmark = pytest.mark.usefixtures("vms_end")

IMAGE = "stillframe/base"


class Halt:
    """Has every call of an asynchronous method wait at its end, or at its beginning."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, first: bool = False
    ) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        original = getattr(owner, name)

        async def halted(*arguments: Any, **options: Any) -> Any:
            result = None if first else await original(*arguments, **options)
            self.reached.set()
            await self.go_on.wait()
            return await original(*arguments, **options) if first else result

        monkeypatch.setattr(owner, name, halted)


@contextlib.asynccontextmanager
async def at_work(work: Any, halt: Halt) -> AsyncIterator[asyncio.Task[Any]]:
    """The work as a task that has come to the halt; it is ended afterwards."""
    task = asyncio.ensure_future(work)
    try:
        async with asyncio.timeout(60):
            await asyncio.wait(
                [task, waiting := asyncio.ensure_future(halt.reached.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
        waiting.cancel()
        yield task
    finally:
        halt.go_on.set()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_create_that_waits_for_its_image_can_be_deleted(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halt = Halt(monkeypatch, ImageLibrary, "_fetch", first=True)
    async with at_work(engine.create(CreateRequest("new", IMAGE)), halt) as creation:
        assert engine.find_instance("new").state is InstanceState.CREATED
        with pytest.raises(InvalidRequest):  # the name is taken already
            await engine.create(CreateRequest("new", IMAGE))
        await engine.delete(engine.find_instance("new").id)  # though the pull goes on
        with pytest.raises(Conflict, match="deleted while"):
            await creation
        assert not halt.go_on.is_set()
    assert traces(tmp_path) == []
    assert engine.list_instances() == []
    assert engine.context.records.intents == {}
    assert (await running(engine, "new")).state is InstanceState.RUNNING


async def test_an_image_is_free_while_a_create_waits_for_it_and_in_use_from_then_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    halt = Halt(monkeypatch, FakeDriver, "start")
    async with at_work(engine.create(CreateRequest("new", IMAGE)), halt):
        with pytest.raises(Conflict, match="in use"):
            await engine.delete_image(IMAGE)


async def _work(engine: Engine, verb: str) -> Any:
    """The verb, not begun yet, that makes the instance ``new``."""
    if verb == "create":
        return engine.create(CreateRequest("new", IMAGE))
    source = await running(engine)
    if verb == "fork of an instance":
        return engine.fork(source.id, name="new", from_running=True)
    snapshot = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    if verb == "warm fork":
        await engine.set_warm(snapshot.id, 1)
        await engine.context.warm.settled(snapshot.id)
    return engine.fork_snapshot(snapshot.id, ForkRequest("new"))


async def test_a_create_whose_image_is_deleted_is_refused_and_can_be_tried_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halt = Halt(monkeypatch, ImageLibrary, "_commit", first=True)
    async with at_work(engine.create(CreateRequest("new", IMAGE)), halt) as creation:
        await engine.delete_image(IMAGE)
        monkeypatch.undo()
        # The pull that was called off is not undone yet: that is no reason to refuse another one.
        again = asyncio.ensure_future(engine.create(CreateRequest("again", IMAGE)))
        with pytest.raises(Conflict, match="deleted, or"):
            await creation
        assert (await again).state is InstanceState.INITIALIZING
    assert [instance.name for instance in engine.list_instances()] == ["again"]
    assert engine.find_image(IMAGE).status is ImageStatus.READY
    assert [path.name for path in (tmp_path / "images").glob(".new-*")] == []


async def test_an_import_whose_image_is_deleted_says_so(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "image.tar"
    source.write_bytes(layer(("etc/hostname", b"other\n")))
    await engine.import_image("other", source)
    halt = Halt(monkeypatch, ImageLibrary, "_commit", first=True)
    async with at_work(engine.import_image("other", source), halt) as importing:
        await engine.delete_image("other")
        with pytest.raises(Conflict, match="deleted, or"):
            await importing


@pytest.mark.parametrize(
    ("verb", "step"),
    [
        ("create", "start"),
        ("fork", "start"),
        ("fork", "resume"),
        ("fork of an instance", "start"),
        ("warm fork", "resume"),
    ],
)
async def test_what_is_deleted_while_it_is_made_is_called_off(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, step: str
) -> None:
    work = await _work(engine, verb)
    owner: type = FakeDriver if step == "start" else FakeMachine
    halt = Halt(monkeypatch, owner, step)
    async with at_work(work, halt) as making:
        new = engine.find_instance("new")
        deletion = asyncio.ensure_future(engine.delete(new.id))
        await asyncio.sleep(0)
        assert not deletion.done()  # nothing is removed under a VMM that is being started
        halt.go_on.set()
        await deletion
        with pytest.raises(Conflict, match="deleted while"):
            await making
    monkeypatch.undo()
    await engine.context.warm.close()
    known = {instance.id for instance in engine.list_instances()}
    assert new.id not in known
    assert {path.name for path in (tmp_path / "instances").iterdir()} == known
    assert len([trace for trace in traces(tmp_path) if trace.startswith("pid")]) == len(known)
    assert engine.context.records.intents == {}
    for instance in known:
        assert await ask(engine, instance, "true") == ""


async def test_other_verbs_are_refused_while_an_instance_is_made(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    halt = Halt(monkeypatch, FakeDriver, "start")
    async with at_work(engine.create(CreateRequest("new", IMAGE)), halt) as making:
        new = engine.find_instance("new")
        with pytest.raises(InvalidState, match="still being made"):
            await engine.stop(new.id)
        halt.go_on.set()
        assert (await making).id == new.id


async def test_a_fork_that_boots_for_its_standby_is_whole_or_gone(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    await engine.stop(source.id)
    asleep = await engine.fork(source.id, name="asleep", target_state=InstanceState.STANDBY)
    assert asleep.state is InstanceState.STANDBY
    before = traces(tmp_path)
    halt = Halt(monkeypatch, FakeMachine, "save_devices", first=True)
    work = engine.fork(source.id, name="new", target_state=InstanceState.STANDBY)
    async with at_work(work, halt) as making:
        deletion = asyncio.ensure_future(engine.delete(engine.find_instance("new").id))
        making.cancel()  # whoever asked for it is gone, too
        halt.go_on.set()
        await asyncio.wait([making, deletion])
    assert sorted(traces(tmp_path)) == sorted(before)
    with pytest.raises(NotFound):
        engine.find_instance("new")


async def test_a_commit_fails_when_what_it_fulfils_was_deleted(engine: Engine) -> None:
    source = await running(engine)
    with pytest.raises(Conflict):
        engine.context.records.put_instance(source, fulfils="no intent")


async def test_a_cancelled_creation_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halt = Halt(monkeypatch, FakeDriver, "start")
    async with at_work(engine.create(CreateRequest("new", IMAGE)), halt) as making:
        making.cancel()
        await asyncio.sleep(0)
        halt.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await making
    assert traces(tmp_path) == []
    assert engine.context.records.intents == {}


@pytest.mark.parametrize("verb", ["delete", "snapshot"])
async def test_what_is_cancelled_while_files_are_changed_leaves_nothing_half_done(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    source = await running(engine)
    await engine.stop(source.id)
    module, step = {
        "delete": ("stillframe.engine.verbs.stop", "remove_tree"),
        "snapshot": ("stillframe.engine.verbs.snapshot", "clone"),
    }[verb]
    original = getattr(importlib.import_module(module), step)
    loop, cancelled = asyncio.get_running_loop(), threading.Event()

    def cancel_first(*arguments: Any) -> None:
        loop.call_soon_threadsafe(task.cancel)
        loop.call_soon_threadsafe(loop.call_soon, cancelled.set)
        assert cancelled.wait(60)
        original(*arguments)

    monkeypatch.setattr(f"{module}.{step}", cancel_first)
    options = {"kind": SnapshotKind.STOPPED} if verb == "snapshot" else {}
    task = asyncio.ensure_future(getattr(engine, verb)(source.id, **options))
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    assert engine.context.records.intents == {}
    assert len(traces(tmp_path)) == len(engine.list_instances()) == (verb == "snapshot")
