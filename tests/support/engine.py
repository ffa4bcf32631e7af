"""An engine on the fake hypervisor, for scenarios that need no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ExecRequest
from stillframe.engine.settings import EngineSettings
from stillframe.host.orphans import kill_orphans, processes_naming
from stillframe.model.states import InstanceState
from stillframe.model.units import MIB
from stillframe.model.values import Hypervisor, Instance
from stillframe.vmm.driver import Driver
from stillframe.vmm.fake.driver import FakeDriver

TRACKER = Path(__file__).resolve().parents[2] / "tracker/build/libstillframe-tracker.so"


def make_engine(data_dir: Path, *others: Driver) -> Engine:
    """An engine that is not open yet, with the fake hypervisor and others."""
    settings = EngineSettings(
        data_dir, kernel_dir=Path("/nonexistent"), agent_binary=Path("/nonexistent"),
        default_hypervisor=Hypervisor.FAKE, default_memory_bytes=64 * MIB,
        default_overlay_bytes=32 * MIB, default_vcpus=1,
    )  # fmt: skip
    return Engine(settings, [FakeDriver(tracker=TRACKER), *others])


@contextlib.asynccontextmanager
async def open_engine(data_dir: Path, engine: Engine | None = None) -> AsyncIterator[Engine]:
    """An open engine, closed afterwards; every VM it started is ended."""
    engine = engine or make_engine(data_dir)
    try:
        await engine.open()
        yield engine
    finally:
        await engine.close()
        kill_orphans(data_dir / "instances", ())


async def running(engine: Engine, name: str = "source") -> Instance:
    """A Running instance."""
    instance = await engine.create(CreateRequest(name, "stillframe/base"))
    result = await engine.wait(
        instance.id, state=InstanceState.RUNNING, timeout=timedelta(seconds=60)
    )
    assert result.state is InstanceState.RUNNING
    return engine.find_instance(instance.id)


async def ask(engine: Engine, instance_id: str, *command: str) -> str:
    """Run a command in the guest; its output, which must be a success."""
    session = await engine.exec(instance_id, ExecRequest(command))
    output = b"".join([data async for _, data in session.output()])
    assert await session.wait() == 0, output
    return output.decode().strip()


def traces(data_dir: Path) -> list[str]:
    """What there is of instances and snapshots: directories, also half-made ones, and VMMs."""
    found = [str(path.relative_to(data_dir)) for path in data_dir.glob("instances/*")]
    found += [str(path.relative_to(data_dir)) for path in data_dir.glob("snapshots/*")]
    return found + [f"pid {pid}" for pid in processes_naming(data_dir / "instances")]


async def expect_going_on(engine: Engine, instance_id: str) -> None:
    """Return when the guest has counted on; raises TimeoutError if it stands still."""
    before = int(await ask(engine, instance_id, "counter"))
    async with asyncio.timeout(30):
        while int(await ask(engine, instance_id, "counter")) == before:
            pass  # each question takes a moment
