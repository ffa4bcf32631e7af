"""What instances are told to run, and in which environment: empty, inherited, too large."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ForkRequest
from stillframe.engine.machines import command_of
from stillframe.images.boot import CONFIG_DISK_BYTES
from stillframe.model.errors import InvalidRequest, InvalidState
from stillframe.model.states import InstanceState
from stillframe.model.values import Image, ImageConfig, ImageStatus, SnapshotKind
from support.engine import ask, running, traces

LIVE = SnapshotKind.STANDBY


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "wanted"),
    [
        (None, None, ("/app", "serve")),
        (None, ("check",), ("/app", "check")),
        (("/other",), None, ("/other",)),
        (("/other",), ("now",), ("/other", "now")),
        ((), (), ("/app", "serve")),  # as records of earlier versions may have them
        ((), ("check",), ("/app", "check")),
    ],
)
async def test_empty_commands_are_none(
    engine: Engine,
    entrypoint: tuple[str, ...] | None,
    cmd: tuple[str, ...] | None,
    wanted: tuple[str, ...],
) -> None:
    config = ImageConfig(entrypoint=("/app",), cmd=("serve",))
    image = Image("app", "", ImageStatus.READY, datetime.now(UTC), config=config)
    instance = await engine.create(CreateRequest("new", "stillframe/base"))
    assert command_of(replace(instance, entrypoint=entrypoint, cmd=cmd), image) == wanted


async def test_empty_overrides_change_nothing(engine: Engine) -> None:
    request = CreateRequest("new", "stillframe/base", entrypoint=(), cmd=())
    new = await engine.create(request)
    assert (new.entrypoint, new.cmd) == (None, None)
    await engine.wait(new.id, state=InstanceState.RUNNING, timeout=timedelta(seconds=60))
    assert (await engine.start(new.id, entrypoint=[], cmd=[])).state is InstanceState.RUNNING
    with pytest.raises(InvalidState):
        await engine.start(new.id, cmd=["sleep", "1000"])
    await engine.stop(new.id)
    started = await engine.start(new.id, cmd=["sleep", "1000"])
    assert started.cmd == ("sleep", "1000")
    await engine.stop(new.id)
    assert (await engine.start(new.id, entrypoint=[], cmd=[])).cmd == ("sleep", "1000")


async def test_a_command_that_cannot_be_is_refused_at_a_start_too(engine: Engine) -> None:
    source = await running(engine)
    await engine.stop(source.id)
    with pytest.raises(InvalidRequest, match="NUL"):
        await engine.start(source.id, cmd=["a\0b"])
    assert engine.find_instance(source.id).state is InstanceState.STOPPED


@pytest.mark.parametrize("warm", [False, True])
async def test_an_environment_too_large_for_the_guest_is_refused_before_a_fork(
    engine: Engine, tmp_path: Path, warm: bool
) -> None:
    source = await running(engine)
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    if warm:
        await engine.set_warm(snapshot.id, 1)
        await engine.context.warm.settled(snapshot.id)
    before = traces(tmp_path)
    with pytest.raises(InvalidRequest, match="environment"):
        await engine.fork_snapshot(snapshot.id, ForkRequest("fork", env={"A": "x" * 3_000_000}))
    assert traces(tmp_path) == before
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest("fork", env={"A": "x" * 40_000}))
    assert await ask(engine, fork.id, "true") == ""
    await engine.set_warm(snapshot.id, 0)


async def test_an_environment_grows_over_forks_only_as_far_as_it_fits(engine: Engine) -> None:
    source = await running(engine)
    for name in ("one", "two"):
        snapshot = await engine.snapshot(source.id, kind=LIVE)
        source = await engine.fork_snapshot(
            snapshot.id, ForkRequest(name, env={name: "x" * 20_000})
        )
    snapshot = await engine.snapshot(source.id, kind=LIVE)
    with pytest.raises(InvalidRequest, match="environment"):
        await engine.fork_snapshot(snapshot.id, ForkRequest("three", env={"three": "x" * 20_000}))
    assert await ask(engine, source.id, "true") == ""


async def test_a_fork_that_could_not_boot_with_its_environment_is_refused(engine: Engine) -> None:
    source = await running(engine)
    stopped = await engine.stop(source.id)
    engine.context.commit(replace(stopped, cmd=("x" * (CONFIG_DISK_BYTES - 20_000),)))
    snapshot = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)
    with pytest.raises(InvalidRequest, match="too large"):
        await engine.fork_snapshot(snapshot.id, ForkRequest("fork", env={"A": "x" * 30_000}))
    assert [instance.name for instance in engine.list_instances()] == ["source"]


async def test_a_create_with_too_large_an_environment_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="environment"):
        await engine.create(CreateRequest("new", "stillframe/base", env={"A": "x" * 100_000}))
    assert engine.list_instances() == []
