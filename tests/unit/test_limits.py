"""Limits of disks and network devices: what is read, kept, handed to the VMM, and refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ForkRequest
from stillframe.model.errors import InvalidRequest, NotSupported, StillframeError
from stillframe.model.states import InstanceState
from stillframe.model.units import MAX_RATE, format_rate, parse_bandwidth, parse_disk_rate
from stillframe.model.values import DeviceLimits, Hypervisor, Instance, SnapshotKind
from stillframe.store.records import from_json, to_json
from stillframe.vmm.cloud_hypervisor.driver import CloudHypervisorDriver
from stillframe.vmm.driver import (
    Driver,
    DriverProbe,
    Limit,
    MachineResources,
    MachineSpec,
    unkept,
)
from stillframe.vmm.fake.driver import FakeDriver, FakeMachine
from stillframe.vmm.firecracker.driver import FirecrackerDriver
from stillframe.vmm.probing import features
from stillframe.vmm.qemu.driver import QemuDriver
from stillframe.vmm.vz.driver import VzDriver
from support.engine import TRACKER, make_engine, open_engine, traces
from support.moving import archive_of, take

LIMITS = DeviceLimits(disk=10_000_000, download=125_000_000, upload=64_000)
LIVE, DISK = SnapshotKind.STANDBY, SnapshotKind.STOPPED


# -- what people write ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1Gbps", 125_000_000), ("100Mbps", 12_500_000), ("8 kbps", 1000), ("80bps", 10),
        ("1.5Mbps", 187_500), ("125MB/s", 125 << 20), (" 1GB/s ", 1 << 30), ("1024", 1024),
    ],
)  # fmt: skip
def test_a_bandwidth_is_of_bits_or_of_bytes(text: str, rate: int) -> None:
    assert parse_bandwidth(text, code="invalid_bandwidth_upload") == rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100MB/s", 100 << 20), ("100MBps", 100 << 20), ("1Gbps", 1 << 30), ("1G", 1 << 30)],
)
def test_a_disk_rate_is_of_bytes_however_it_is_written(text: str, rate: int) -> None:
    assert parse_disk_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["much", "0", "0bps", "1bps", "-1Mbps", "1MB/h", "8Pbps", "5000TB"]
)
def test_what_is_no_rate_is_refused_with_its_code(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_bandwidth(text, code="invalid_bandwidth_download")
    assert refused.value.code == "invalid_bandwidth_download"
    with pytest.raises(InvalidRequest) as refused:
        parse_disk_rate(text if text != "1bps" else "0bps")
    assert refused.value.code == "invalid_disk_io_bps"


@pytest.mark.parametrize("text", ["125MBps", "1GBPS"])
def test_a_bandwidth_that_could_be_bits_or_bytes_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_bandwidth(text, code="invalid_bandwidth_upload")
    assert refused.value.hint == "write 1Gbps for bits or 125MB/s for bytes"


def test_a_rate_is_told_as_the_contract_does() -> None:
    assert [format_rate(rate) for rate in (0, 500, 125_000_000, 1 << 30)] == [
        None, "500 B/s", "119.2 MB/s", "1.0 GB/s",
    ]  # fmt: skip


# -- who can do what ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("driver", "limits", "fields"),
    [
        (QemuDriver, DeviceLimits(disk=1), []),
        (QemuDriver, LIMITS, ["network.bandwidth_download", "network.bandwidth_upload"]),
        (FirecrackerDriver, LIMITS, []),
        (CloudHypervisorDriver, DeviceLimits(disk=1, download=2, upload=2), []),
        (CloudHypervisorDriver, DeviceLimits(upload=2), ["network.bandwidth_upload"]),
        (CloudHypervisorDriver, LIMITS, ["network.bandwidth_download", "network.bandwidth_upload"]),
        (VzDriver, DeviceLimits(disk=1), ["disk_io_bps"]),
        (VzDriver, DeviceLimits(), []),
        (FakeDriver, LIMITS, []),
    ],
)
def test_each_driver_says_what_it_can_limit(
    driver: type[Driver], limits: DeviceLimits, fields: list[str]
) -> None:
    assert unkept(limits, driver.limits) == fields
    assert ("disk-io-limit" in features(driver.limits)) is (driver is not VzDriver)


def test_a_record_from_before_there_were_limits_has_none() -> None:
    now = "2026-01-02T03:04:05Z"
    old = {
        "id": "a" * 24, "name": "web", "image": "i", "image_digest": "", "state": "Stopped",
        "created_at": now, "hypervisor": "qemu", "memory_bytes": 1, "overlay_bytes": 1, "vcpus": 1,
    }  # fmt: skip
    instance = from_json(Instance, json.dumps(old))
    assert instance.limits == DeviceLimits()
    limited = replace(instance, limits=LIMITS)
    assert from_json(Instance, to_json(limited)) == limited


# -- through the engine ---------------------------------------------------------------------------
class Watched(FakeDriver):
    """The fake hypervisor, remembering what limits it was given."""

    def __init__(self) -> None:
        super().__init__(tracker=TRACKER)
        self.given: list[DeviceLimits] = []

    async def start(self, spec: MachineSpec, resources: MachineResources) -> FakeMachine:
        """Note the limits."""
        self.given.append(resources.limits)
        return await super().start(spec, resources)


class Plain(FakeDriver):
    """A hypervisor that can limit nothing, or bandwidths alike only."""

    def __init__(self, hypervisor: Hypervisor, limits: frozenset[Limit] = frozenset()) -> None:
        super().__init__(tracker=TRACKER)
        self.hypervisor, self.limits = hypervisor, limits

    async def probe(self) -> DriverProbe:
        """It is there."""
        return DriverProbe(self.hypervisor, True, "1", "none")


@pytest.fixture
def watched() -> Watched:
    """The hypervisor that is the default."""
    return Watched()


@pytest.fixture
async def engine(tmp_path: Path, watched: Watched) -> AsyncIterator[Engine]:
    """An engine with three hypervisors."""
    others = [
        watched,
        Plain(Hypervisor.QEMU),
        Plain(Hypervisor.CLOUD_HYPERVISOR, CloudHypervisorDriver.limits),
    ]
    made = make_engine(tmp_path / "here", *cast(list[Driver], others))
    async with open_engine(tmp_path / "here", made) as opened:
        yield opened


async def limited(engine: Engine, limits: DeviceLimits = LIMITS) -> Instance:
    """A Running instance with limits."""
    made = await engine.create(CreateRequest("source", "stillframe/base", limits=limits))
    await engine.wait(made.id, state=InstanceState.RUNNING, timeout=timedelta(seconds=60))
    return engine.find_instance(made.id)


async def test_every_life_of_a_vm_and_of_its_forks_has_the_limits(
    engine: Engine, watched: Watched
) -> None:
    source = await limited(engine)
    assert source.limits == LIMITS
    live = await engine.snapshot(source.id, kind=LIVE)
    await engine.standby(source.id)
    await engine.restore(source.id)
    fork = await engine.fork_snapshot(live.id, ForkRequest("fork"))
    twin = await engine.fork(fork.id, name="twin", from_running=True)
    await engine.set_warm(live.id, 1)
    await engine.context.warm.settled(live.id)
    spare = await engine.fork_snapshot(live.id, ForkRequest("spare"))
    await engine.stop(source.id)
    await engine.restore_snapshot(source.id, live.id)
    await engine.stop(source.id)
    await engine.start(source.id)
    assert {one.limits for one in (fork, twin, spare, *engine.list_instances())} == {LIMITS}
    assert len(watched.given) >= 7
    assert set(watched.given) == {LIMITS}


async def test_limits_go_with_a_snapshot_to_another_server(engine: Engine, tmp_path: Path) -> None:
    live = await engine.snapshot((await limited(engine)).id, kind=LIVE)
    data = await archive_of(engine, live)
    async with open_engine(tmp_path / "there") as there:
        await there.context.images.ensure("stillframe/base")
        arrived = await take(there, data)
        assert (await there.fork_snapshot(arrived.id, ForkRequest("fork"))).limits == LIMITS


@pytest.mark.parametrize("rate", [-1, MAX_RATE + 1])
async def test_an_archive_that_tells_of_limits_that_cannot_be_is_refused(
    engine: Engine, tmp_path: Path, rate: int
) -> None:
    live = await engine.snapshot((await limited(engine)).id, kind=LIVE)
    template = replace(live.template, limits=DeviceLimits(upload=rate))
    engine.context.records.update_snapshot(replace(live, template=template))
    data = await archive_of(engine, engine.find_snapshot(live.id))
    async with open_engine(tmp_path / "there") as there:
        await there.context.images.ensure("stillframe/base")
        with pytest.raises(StillframeError, match="an instance that cannot be"):
            await take(there, data)


async def test_what_the_hypervisor_cannot_limit_is_refused_before_anything_is_made(
    engine: Engine, tmp_path: Path
) -> None:
    wish = CreateRequest("web", "no/such:image", hypervisor=Hypervisor.QEMU, limits=LIMITS)
    with pytest.raises(NotSupported) as refused:
        await engine.create(wish)
    fields = "disk_io_bps and network.bandwidth_download and network.bandwidth_upload"
    assert refused.value.message == f"qemu cannot limit {fields}"
    assert refused.value.hint == f"use fake, or leave {fields} out"
    assert refused.value.facts["field"] == "disk_io_bps"
    uneven = replace(wish, hypervisor=Hypervisor.CLOUD_HYPERVISOR)
    with pytest.raises(NotSupported) as refused:
        await engine.create(uneven)
    assert refused.value.message.endswith("bandwidth_upload by a rate of its own")
    assert refused.value.hint == "use fake, or give both directions the same rate"
    assert traces(tmp_path / "here") == []


async def test_a_disk_does_not_go_where_its_limits_cannot_be_kept(engine: Engine) -> None:
    source = await limited(engine)
    await engine.stop(source.id)
    disk = await engine.snapshot(source.id, kind=DISK)
    for hypervisor in (Hypervisor.QEMU, Hypervisor.CLOUD_HYPERVISOR):
        elsewhere: dict[str, Any] = {"target_hypervisor": hypervisor}
        with pytest.raises(NotSupported, match="cannot limit"):
            await engine.fork_snapshot(disk.id, ForkRequest("fork", **elsewhere))
        with pytest.raises(NotSupported, match="cannot limit"):
            await engine.restore_snapshot(source.id, disk.id, **elsewhere)
    context = engine.context
    context.drivers = {k: v for k, v in context.drivers.items() if k is not Hypervisor.FAKE}
    verdict = await engine.compatibility(disk.id)
    assert verdict.reasons == ("no hypervisor is available that can keep its limits",)


async def test_resources_tell_the_limits_of_who_runs(engine: Engine) -> None:
    source = await limited(engine)
    (share,) = (await engine.resources()).shares
    told = (share.disk_io_bps, share.network_download_bps, share.network_upload_bps)
    assert told == (LIMITS.disk, LIMITS.download, LIMITS.upload)
    await engine.stop(source.id)
    (share,) = (await engine.resources()).shares
    assert set(asdict(share).values()) == {source.id, "source", 0, source.overlay_bytes}
