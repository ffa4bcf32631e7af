"""What a server has open does not grow with what has come and gone."""

from __future__ import annotations

import asyncio
import gc
import resource
from datetime import timedelta
from pathlib import Path

from stillframe.api import server
from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.host import process
from stillframe.model.states import InstanceState
from stillframe.model.values import SnapshotKind
from support.descriptors import descriptors
from support.engine import ask, make_engine, open_engine, running


async def test_a_process_that_has_ended_keeps_no_descriptor(tmp_path: Path) -> None:
    before = descriptors()
    killed = process.spawn(["sleep", "1000"], output=tmp_path / "log")
    ended = process.spawn(["true"], output=tmp_path / "log")
    adopted = process.adopt(killed.identity)
    async with asyncio.timeout(30):
        await killed.kill()
        await asyncio.gather(ended.wait(), adopted.wait())
    assert descriptors() == before
    for gone in (killed, ended, adopted):  # nothing is asked of a descriptor that is not there
        assert not gone.alive
        await gone.kill()
        await gone.wait()
        gone.close()
    assert descriptors() == before


async def test_vms_that_come_and_go_leave_nothing_open(engine: Engine) -> None:
    source = await running(engine)
    await ask(engine, source.id, "true")
    snapshot = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    before = None
    for turn in range(3):
        fork = await engine.fork_snapshot(snapshot.id, ForkRequest(f"fork-{turn}"))
        await ask(engine, fork.id, "true")
        await engine.delete(fork.id, graceful=bool(turn % 2))
        await engine.standby(source.id)
        await engine.restore(source.id)
        await engine.stop(source.id)
        await engine.start(source.id)
        state = InstanceState.RUNNING
        await engine.wait(source.id, state=state, timeout=timedelta(seconds=60))
        await ask(engine, source.id, "true")
        before = before or descriptors()  # by then every thread and pool is there
    assert descriptors() == before


async def test_a_closed_engine_leaves_nothing_open(tmp_path: Path) -> None:
    async with open_engine(tmp_path / "first") as engine:
        await ask(engine, (await running(engine)).id, "true")
    gc.collect()
    before = descriptors()
    second = make_engine(tmp_path / "second")
    async with open_engine(tmp_path / "second", second):
        await ask(second, (await running(second)).id, "true")
    assert descriptors() == before


def test_a_server_may_open_as_many_files_as_its_host_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        server._allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
