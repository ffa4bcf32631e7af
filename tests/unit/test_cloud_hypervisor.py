"""The Cloud Hypervisor driver, without Cloud Hypervisor: played-back conversations, its state."""

from __future__ import annotations

import copy
import json
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillframe.host.process import spawn
from stillframe.model.errors import DamagedData, MissingComponent, VmmFailure
from stillframe.vmm.cloud_hypervisor import api, driver
from stillframe.vmm.cloud_hypervisor.driver import CloudHypervisorDriver
from stillframe.vmm.cloud_hypervisor.machine import CloudHypervisorMachine, end_of_guest
from stillframe.vmm.cloud_hypervisor.state import SavedState, pack
from stillframe.vmm.driver import MachineResources, MachineStatus
from support.conversations import Exchange, Player, recorded
from support.record_firecracker import NETWORKED, SPEC, files

RECORDED = ["cloud-hypervisor-51.2.0", "cloud-hypervisor-53.0"]  # the oldest, and the pinned one
RANGES = {"memory_ranges": {"data": [{"gpa": 0, "length": 4096}]}}
DISKS = ["disk0.link", "disk1.link"]
# What a Cloud Hypervisor writes of the VM of ``files``: more than it was told, with absolute names.
CONFIG: dict[str, Any] = {
    "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
    "memory": {"zones": [{"size": SPEC.memory_bytes, "file": "/elsewhere/memory"}]},
    "payload": {"kernel": "/elsewhere/kernel"},
    "disks": [
        {"path": "/etc/shadow", "readonly": True},
        {"path": "/elsewhere/overlay", "readonly": False},
    ],
    "net": None,
    "fs": [{"tag": "host", "socket": "/elsewhere/virtiofs"}],
}


def writing(home: Path, state: str = json.dumps({"snapshots": RANGES})) -> Any:
    """Does what Cloud Hypervisor does for a snapshot: writes its files, until one is there."""

    def before(request: dict[str, Any]) -> None:
        if request["path"].endswith("vm.snapshot"):
            directory = home / request["body"]["destination_url"].removeprefix("file://")
            (directory / "config.json").write_text(json.dumps(CONFIG))
            (directory / "state.json").write_text(state)
            assert (directory / "memory-ranges").exists()

    return before


@asynccontextmanager
async def conversing(
    home: Path,
    conversation: list[Exchange],
    before: Callable[[dict[str, Any]], None] | None = None,
    resources: MachineResources | None = None,
) -> AsyncIterator[tuple[CloudHypervisorMachine, Player]]:
    """A machine whose VMM is a recording; its process is one that sleeps."""
    player = Player(conversation, before)
    async with player.listening(home / "api.sock"):
        process = spawn(["sleep", "1000"], output=home / "log")
        one = CloudHypervisorMachine(process, resources or files(home))
        try:
            yield one, player
        finally:
            await one.kill()


def saved(home: Path, config: dict[str, Any] = CONFIG) -> Path:
    """Device state as it is kept, of a VM with that configuration."""
    document = {"format": 1, "config": config, "state": {"snapshots": {"of": "devices"}}}
    (home / "devices").write_text(json.dumps(document))
    return home / "devices"


@pytest.fixture(autouse=True)
def landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the host of the recording, whatever this kernel has."""
    monkeypatch.setattr(driver, "landlock_version", lambda: 7)


@pytest.fixture(params=RECORDED)
def version(request: pytest.FixtureRequest) -> str:
    """A Cloud Hypervisor whose conversations were recorded."""
    return str(request.param)


async def test_a_boot_asks_what_cloud_hypervisor_was_asked(tmp_path: Path, version: str) -> None:
    cold = files(tmp_path)
    conversation = recorded(version, "boot")
    async with conversing(tmp_path, conversation, resources=cold) as (one, player):
        await driver.configure(one, SPEC, cold, DISKS)
    assert player.left == []


async def test_a_snapshot_has_devices_and_no_memory(tmp_path: Path, version: str) -> None:
    conversation = recorded(version, "capture")
    assert [exchange["answer"]["status"] for exchange in conversation] == [200, 204, 500, 204]
    async with conversing(tmp_path, conversation, writing(tmp_path)) as (one, player):
        assert not one.writes_memory
        assert await one.status() is MachineStatus.RUNNING
        await one.pause()
        await one.save_devices(tmp_path / "devices")
        await one.resume()
    assert player.left == []
    document = json.loads((tmp_path / "devices").read_text())
    assert document["state"] == {"snapshots": {"memory_ranges": {"data": []}}}
    assert not (tmp_path / "saving.new").exists()


async def test_a_version_that_writes_no_memory_by_itself_would_do_too(
    tmp_path: Path, version: str
) -> None:
    conversation = recorded(version, "capture")[2:3]
    conversation[0]["answer"] = {"status": 204, "body": None}
    async with conversing(tmp_path, conversation, writing(tmp_path)) as (one, _):
        await one.save_devices(tmp_path / "devices")
    assert SavedState(tmp_path / "devices").mac is None


async def test_a_restore_is_given_a_configuration_of_our_making(
    tmp_path: Path, version: str
) -> None:
    found: dict[str, Any] = {}

    def before(request: dict[str, Any]) -> None:
        directory = tmp_path / request["body"]["source_url"].removeprefix("file://")
        found.update({path.name: json.loads(path.read_text()) for path in directory.iterdir()})
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700

    warm = replace(files(tmp_path), device_state=saved(tmp_path))
    conversation = recorded(version, "restore")
    async with conversing(tmp_path, conversation, before, warm) as (one, player):
        await driver.configure(one, SPEC, warm, DISKS)
    assert player.left == []
    assert found.keys() == {"config.json", "state.json"}
    assert found["state.json"] == {"snapshots": {"of": "devices"}}
    assert found["config.json"] == recorded(version, "boot")[0]["request"]["body"]
    assert not (tmp_path / "loading.new").exists()


async def test_a_restored_vm_is_captured_in_the_same_way(tmp_path: Path, version: str) -> None:
    conversation = recorded(version, "capture restored")
    async with conversing(tmp_path, conversation, writing(tmp_path)) as (one, player):
        assert await one.status() is MachineStatus.PAUSED
        await one.resume()
        await one.pause()
        await one.save_devices(tmp_path / "devices")
    assert player.left == []


async def test_refusals_are_in_its_words(tmp_path: Path, version: str) -> None:
    async with conversing(tmp_path, recorded(version, "refusals")) as (one, player):
        with pytest.raises(VmmFailure, match=r"VM is already|Running to Running"):
            await one.call(api.boot())
        with pytest.raises(VmmFailure, match="could not be snapshotted"):
            await one.save_devices(tmp_path / "devices")
    assert player.left == []
    assert not (tmp_path / "saving.new").exists()
    assert not (tmp_path / "devices").exists()


@pytest.mark.parametrize(
    ("state", "status", "failure"),
    [("{", 500, VmmFailure), ("{", 204, DamagedData), ("{}", 500, DamagedData)],
    ids=["cut off", "cut off unnoticed", "no word of memory"],
)
async def test_state_that_is_not_understood_is_not_kept(
    tmp_path: Path, version: str, state: str, status: int, failure: type[Exception]
) -> None:
    conversation = recorded(version, "capture")[2:3]
    conversation[0]["answer"]["status"] = status
    async with conversing(tmp_path, conversation, writing(tmp_path, state)) as (one, _):
        with pytest.raises(failure):
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


def other(path: str, value: Any) -> dict[str, Any]:
    """The configuration with another value at a path of keys and indices."""
    config = copy.deepcopy(CONFIG)
    place: Any = config
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        place = place[part]
    place[last] = value
    return config


@pytest.mark.parametrize(
    "config",
    [
        other("cpus.boot_vcpus", 2),
        other("memory.zones.0.size", SPEC.memory_bytes * 2),
        other("disks.0.readonly", False),
        other("disks", CONFIG["disks"][:1]),
        other("net", [{"mac": "02:00:00:00:00:01"}]),
    ],
)
def test_state_of_another_vm_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    ours = api.configuration(
        SPEC, arguments="", disks=[("disk0.link", True), ("disk1.link", False)], initrd=False
    )
    state = SavedState(saved(tmp_path, config))
    with pytest.raises(VmmFailure, match="of another VM"):
        state.unpack(tmp_path, ours)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        b"no JSON",
        b"[]",
        b'{"format": 2}',
        b'{"format": 1}',
        b'{"format": 1, "state": {}, "config": {"cpus": 1}}',
        b"[" * 100_000,
        b"\xff",
        json.dumps({"format": 1, "state": {}, "config": other("net", [{"mac": "../x"}])}).encode(),
        json.dumps({"format": 1, "state": {}, "config": other("net", [{"mac": 7}])}).encode(),
        json.dumps({"format": 1, "state": {}, "config": other("net", "x")}).encode(),
        json.dumps({"format": 1, "state": {}, "config": 7}).encode(),
        json.dumps({"format": 1, "state": {}, "config": other("cpus", [1])}).encode(),
    ],
)
def test_damaged_device_state_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "devices").write_bytes(damage)
    with pytest.raises(DamagedData):
        SavedState(tmp_path / "devices")


def test_a_guest_keeps_its_address_and_gets_its_host_device(tmp_path: Path) -> None:
    mac = "02:00:00:00:00:01"
    state = SavedState(saved(tmp_path, other("net", [{"mac": mac, "tap": "tap-of-another"}])))
    ours = api.configuration(
        SPEC, arguments="", disks=[("disk0.link", True), ("disk1.link", False)], initrd=False,
        tap="tap7", mac=str(state.mac),
    )  # fmt: skip
    state.unpack(tmp_path, ours)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["net"] == [{"id": "net", "tap": "tap7", "mac": mac}]
    assert "landlock_enable" not in written  # unless asked for


def test_packed_state_is_the_same_each_time_and_names_no_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    inner = {"boot_ram": 4096, "memory_ranges": {"data": [{"gpa": 0, "length": 4096}]}}
    state = {"snapshots": {"memory-manager": {"snapshot_data": {"state": json.dumps(inner)}}}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    pack(tmp_path, tmp_path / "one")
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(CONFIG.items())), indent=1))
    pack(tmp_path, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    kept = json.loads((tmp_path / "one").read_text())["state"]["snapshots"]["memory-manager"]
    assert json.loads(kept["snapshot_data"]["state"]) == {
        "boot_ram": 4096,
        "memory_ranges": {"data": []},
    }


@pytest.mark.parametrize(("version", "confined"), [(0, None), (2, None), (3, True), (7, True)])
async def test_it_is_confined_where_the_kernel_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, confined: bool | None
) -> None:
    monkeypatch.setattr(driver, "landlock_version", lambda: version)
    config = driver._configuration(SPEC, files(tmp_path), DISKS)
    assert config.get("landlock_enable") == confined


def test_links_in_the_place_of_state_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/proc/self/status")
    (tmp_path / "state.json").write_text(json.dumps(RANGES))
    with pytest.raises(OSError, match="symbolic link"):
        pack(tmp_path, tmp_path / "devices")
    assert not (tmp_path / "devices").exists()


ENDED = b'{ "timestamp": {}, "source": "vmm", "event": "shutdown", "properties": null }\n\n'


@pytest.mark.parametrize(
    ("log", "console", "events", "reason"),
    [
        (b"Fatal error: VmmThread(VmReboot(MemoryManager(...", b"", b"", "guest-reset"),
        (b"Fatal error: VmmThread(VmReboot(MemoryManager(...", b"", ENDED, "guest-reset"),
        (b"", b'STILLFRAME-EXIT nonce=1 code=0 message="done"\n', b"", "guest-shutdown"),
        (b"", b"", ENDED, "guest-shutdown"),
        (b"thread 'vmm' panicked", b"", ENDED.replace(b'"vmm"', b'"vm"'), None),
    ],
)
def test_it_is_told_why_a_guest_ended(
    log: bytes, console: bytes, events: bytes, reason: str | None
) -> None:
    assert end_of_guest(log, console, events) == reason


def test_an_orderly_end_shows_in_the_exit_code_too() -> None:
    assert end_of_guest(b"", b"", b"", 0) == "guest-shutdown"
    assert end_of_guest(b"", b"", b"", 1) is None
    assert end_of_guest(b"Fatal error: VmmThread(VmReboot(", b"", b"", 1) == "guest-reset"


async def found(_: CloudHypervisorDriver) -> tuple[int, ...]:
    return (53, 0)


async def test_a_network_is_asked_for_as_cloud_hypervisor_was_asked(tmp_path: Path) -> None:
    cold = files(tmp_path)
    conversation = recorded(RECORDED[-1], "boot with network")
    async with conversing(tmp_path, conversation, resources=cold) as (one, player):
        await driver.configure(one, NETWORKED, cold, DISKS)
    assert player.left == []


async def test_a_network_that_this_host_cannot_give_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CloudHypervisorDriver, "_examine", found)
    cold = files(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingComponent, match="cannot have a network") as refused:
        await CloudHypervisorDriver().start(NETWORKED, cold)
    assert "network off" in str(refused.value.hint)
    assert not (tmp_path / "api.sock").exists()


async def test_a_network_that_cannot_be_made_is_told_by_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CloudHypervisorDriver, "_examine", found)
    monkeypatch.setattr(driver, "find_uplink", lambda: str(tmp_path / "no-slirp4netns"))
    with pytest.raises(MissingComponent, match="cannot have a network: ") as refused:
        await CloudHypervisorDriver("true").start(NETWORKED, files(tmp_path))
    assert "user namespaces" in str(refused.value.hint)
    assert not (tmp_path / "api.sock").exists()


def test_the_network_device_is_the_same_in_every_vm(tmp_path: Path) -> None:
    cold = files(tmp_path)
    assert "net" not in driver._configuration(SPEC, cold, DISKS)
    config = driver._configuration(NETWORKED, cold, DISKS)
    assert config["net"] == [{"id": "net", "tap": "stillframe0", "mac": "52:54:00:12:34:56"}]
    # The device is not in the sysfs of the host, which a rule for it would have to name.
    assert config["landlock_rules"] == [{"path": ".", "access": "rw"}]


async def test_the_probe_tells_what_is_missing() -> None:
    probe = await CloudHypervisorDriver("no-such-cloud-hypervisor").probe()
    assert not probe.available
    assert probe.reason == "no-such-cloud-hypervisor is not installed"
    assert probe.hint == "stillframe setup cloud-hypervisor"


@pytest.mark.parametrize(
    ("version", "drains"), [("51.2.0", False), ("52.0", False), ("53.0", True)]
)
async def test_disks_are_synchronous_where_a_pause_does_not_wait_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, drains: bool
) -> None:
    class Configured(Exception):
        pass

    async def configured(*_: object, synchronous: bool) -> None:
        assert synchronous is not drains
        raise Configured

    binary = tmp_path / "cloud-hypervisor"
    binary.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo cloud-hypervisor v{version}\n')
    binary.chmod(0o755)
    monkeypatch.setattr(driver, "configure", configured)
    made = CloudHypervisorDriver(str(binary), accelerator="kvm")
    with pytest.raises(Configured):
        await made.start(SPEC, files(tmp_path))
