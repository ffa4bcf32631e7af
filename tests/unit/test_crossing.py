"""A Stopped snapshot goes from one hypervisor to another; records tell which one it is under."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.model.errors import InvalidRequest, NotSupported
from stillframe.model.states import InstanceState
from stillframe.model.values import Hypervisor, Instance, SnapshotKind
from stillframe.vmm.driver import Driver, DriverProbe
from stillframe.vmm.fake.driver import FakeDriver
from support.engine import TRACKER, ask, make_engine, open_engine, running

OTHER = Hypervisor.FIRECRACKER
THERE = (OTHER, "9.9.9", "kvm", "a processor")


class OtherHypervisor(FakeDriver):
    """Another hypervisor, which is there but boots nothing in these tests."""

    hypervisor = OTHER

    async def probe(self) -> DriverProbe:
        """It is another one in every respect."""
        return DriverProbe(OTHER, True, *THERE[1:])


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine with two hypervisors."""
    made = make_engine(tmp_path, cast(Driver, OtherHypervisor(tracker=TRACKER)))
    async with open_engine(tmp_path, made) as opened:
        yield opened


def facts(instance: Instance) -> tuple[Hypervisor, str, str, str]:
    """What a record tells of the hypervisor."""
    return (
        instance.hypervisor,
        instance.hypervisor_version,
        instance.accelerator,
        instance.processor,
    )


async def test_a_fork_there_and_back_is_told_for_what_it_is(engine: Engine) -> None:
    source = await running(engine)
    here = facts(await engine.stop(source.id))
    first = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)

    request = ForkRequest("there", InstanceState.STOPPED, target_hypervisor=OTHER)
    there = await engine.fork_snapshot(first.id, request)
    assert facts(there) == THERE
    second = await engine.snapshot(there.id, kind=SnapshotKind.STOPPED)
    assert second.source_hypervisor is OTHER
    assert facts(second.template) == THERE

    request = ForkRequest("back", InstanceState.RUNNING, target_hypervisor=Hypervisor.FAKE)
    back = await engine.fork_snapshot(second.id, request)
    assert facts(back) == here
    # Without a word, a snapshot stays with the hypervisor it was made under.
    assert facts(await engine.fork_snapshot(second.id, ForkRequest("same"))) == THERE


async def test_an_instance_goes_to_another_hypervisor_in_place(engine: Engine) -> None:
    source = await running(engine)
    here = facts(await engine.stop(source.id))
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)
    moved = await engine.restore_snapshot(source.id, taken.id, target_hypervisor=OTHER)
    assert facts(moved) == THERE
    assert facts(await engine.restore_snapshot(source.id, taken.id)) == here


async def test_memory_stays_where_it_is_whoever_is_named(engine: Engine) -> None:
    source = await running(engine)
    live = await engine.snapshot(source.id, kind=SnapshotKind.STANDBY)
    await engine.standby(source.id)
    for hypervisor in (OTHER, Hypervisor.FAKE):
        with pytest.raises(InvalidRequest, match="Stopped"):
            await engine.fork_snapshot(live.id, ForkRequest("fork", target_hypervisor=hypervisor))
        with pytest.raises(InvalidRequest, match="Stopped"):
            await engine.restore_snapshot(source.id, live.id, target_hypervisor=hypervisor)
    assert await ask(engine, (await engine.restore(source.id)).id, "counter")


async def test_a_hypervisor_that_is_not_there_is_refused_with_the_reason(engine: Engine) -> None:
    source = await running(engine)
    await engine.stop(source.id)
    taken = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)
    with pytest.raises(NotSupported, match="no driver for vz") as refused:
        await engine.fork_snapshot(taken.id, ForkRequest("fork", target_hypervisor=Hypervisor.VZ))
    assert refused.value.hint
    with pytest.raises(NotSupported):
        await engine.restore_snapshot(source.id, taken.id, target_hypervisor=Hypervisor.VZ)
    assert engine.find_instance(source.id).state is InstanceState.STOPPED
