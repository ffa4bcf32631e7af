"""The Cloud Hypervisor driver, without Cloud Hypervisor: played-back conversations."""

from __future__ import annotations

import json
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillframe.host.process import spawn
from stillframe.model.errors import DamagedData, VmmFailure
from stillframe.vmm.cloud_hypervisor import api
from stillframe.vmm.cloud_hypervisor.driver import CloudHypervisorDriver, CloudHypervisorMachine
from stillframe.vmm.driver import MachineResources, MachineStatus
from support.conversations import Exchange, Player, recorded
from support.record_firecracker import SPEC, files

RECORDED = "cloud-hypervisor-53.0"
RANGES = {"memory_ranges": {"data": [{"gpa": 0, "length": 4096}]}}


def writing(home: Path, state: str = json.dumps({"snapshots": RANGES})) -> Any:
    """Does what Cloud Hypervisor does for a snapshot: writes its files, memory among them."""

    def before(request: dict[str, Any]) -> None:
        if request["path"].endswith("vm.snapshot"):
            directory = home / request["body"]["destination_url"].removeprefix("file://")
            (directory / "config.json").write_text('{"memory": {}}')
            (directory / "state.json").write_text(state)
            (directory / "memory-ranges").write_bytes(bytes(4096))

    return before


@asynccontextmanager
async def conversing(
    home: Path,
    conversation: list[Exchange],
    before: Callable[[dict[str, Any]], None] | None = None,
) -> AsyncIterator[tuple[CloudHypervisorMachine, Player]]:
    """A machine whose VMM is a recording; its process is one that sleeps."""
    player = Player(conversation, before or writing(home))
    async with player.listening(home / "api.sock"):
        process = spawn(["sleep", "1000"], output=home / "log")
        one = CloudHypervisorMachine(process, home)
        try:
            yield one, player
        finally:
            await one.kill()


def resources(home: Path) -> MachineResources:
    return replace(files(home), kernel=Path("tiny"))


async def test_a_boot_asks_what_cloud_hypervisor_was_asked(tmp_path: Path) -> None:
    cold = resources(tmp_path)
    async with conversing(tmp_path, recorded(RECORDED, "boot")) as (one, player):
        await CloudHypervisorDriver()._boot(one, SPEC, cold, ["disk0.link", "disk1.link"])
    assert player.left == []


async def test_a_snapshot_keeps_devices_and_drops_memory(tmp_path: Path) -> None:
    async with conversing(tmp_path, recorded(RECORDED, "capture")) as (one, player):
        assert not one.writes_memory
        assert await one.status() is MachineStatus.RUNNING
        await one.pause()
        await one.save_devices(tmp_path / "devices")
        await one.resume()
    assert player.left == []
    document = json.loads((tmp_path / "devices").read_text())
    assert document["state"] == {"snapshots": {"memory_ranges": {"data": []}}}
    assert not (tmp_path / "saving.new").exists()


async def test_a_restore_is_given_state_without_memory(tmp_path: Path) -> None:
    found: list[Any] = []

    def before(request: dict[str, Any]) -> None:
        directory = tmp_path / request["body"]["source_url"].removeprefix("file://")
        found.extend(json.loads((directory / "state.json").read_text())["snapshots"].values())
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700

    (tmp_path / "devices").write_text(
        json.dumps({"format": 1, "config": {}, "state": {"snapshots": {"ranges": []}}})
    )
    async with conversing(tmp_path, recorded(RECORDED, "restore"), before) as (one, player):
        await CloudHypervisorDriver()._restore(one, tmp_path / "devices", tmp_path)
    assert (player.left, found) == ([], [[]])
    assert not (tmp_path / "loading.new").exists()


async def test_a_restored_vm_is_captured_in_the_same_way(tmp_path: Path) -> None:
    async with conversing(tmp_path, recorded(RECORDED, "capture restored")) as (one, player):
        assert await one.status() is MachineStatus.PAUSED
        await one.resume()
        await one.pause()
        await one.save_devices(tmp_path / "devices")
    assert player.left == []


async def test_refusals_are_in_its_words(tmp_path: Path) -> None:
    async with conversing(tmp_path, recorded(RECORDED, "refusals")) as (one, player):
        with pytest.raises(VmmFailure, match="VM is already"):
            await one.call(api.boot())
        with pytest.raises(VmmFailure, match="could not be snapshotted"):
            await one.save_devices(tmp_path / "devices")
    assert player.left == []
    assert not (tmp_path / "saving.new").exists()
    assert not (tmp_path / "devices").exists()


@pytest.mark.parametrize("state", ["{", "{}"], ids=["cut off", "no word of memory"])
async def test_state_that_is_not_understood_is_not_kept(tmp_path: Path, state: str) -> None:
    before = writing(tmp_path, state)
    conversation = recorded(RECORDED, "capture")[1:3]
    async with conversing(tmp_path, conversation, before) as (one, _):
        await one.pause()
        with pytest.raises(DamagedData):
            await one.save_devices(tmp_path / "devices")
    assert not (tmp_path / "devices").exists()
    assert not (tmp_path / "saving.new").exists()


async def test_a_vmm_that_is_gone_is_a_failure(tmp_path: Path) -> None:
    async with conversing(tmp_path, []) as (one, _):
        await one.kill()
        with pytest.raises(VmmFailure):
            await one.status()
        with pytest.raises(VmmFailure):
            await one.dial_agent()


async def test_the_probe_tells_what_is_missing() -> None:
    probe = await CloudHypervisorDriver("no-such-cloud-hypervisor").probe()
    assert not probe.available
    assert probe.reason == "no-such-cloud-hypervisor is not installed"
    assert probe.hint == "stillframe setup cloud-hypervisor"
