"""The vz driver and its shim, on any host: a double stands where the framework is called."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.context import Context
from stillframe.engine.keeping.quota import expected_bytes
from stillframe.engine.machines import foreign_to
from stillframe.host.files import create_sparse
from stillframe.model.errors import (
    DamagedData,
    InsufficientResources,
    MissingComponent,
    StorageFull,
    VmmFailure,
)
from stillframe.model.values import Hypervisor
from stillframe.vmm.driver import (
    Disk,
    DriverProbe,
    MachineResources,
    MachineSpec,
    MachineStatus,
)
from stillframe.vmm.drivers import make_drivers
from stillframe.vmm.vz.driver import VzDriver, VzMachine, network_address
from stillframe.vmm.vz.probe import PlatformFacts
from stillframe.vmm.vz.protocol import Description
from stillframe.vmm.vz.service import Service
from stillframe.vmm.vz.state import detach
from support import api_double
from support.engine import open_engine
from support.engine import running as running_instance
from support.vz_double import (
    FILLER,
    HANGS_AT_STOP,
    LET_GO,
    REFUSES_ENTROPY,
    REFUSES_TO_SAVE,
    TOO_MANY,
    Connection,
    DoubleFramework,
    DoubleMachine,
    interpreter,
)

SPEC = MachineSpec(64 << 20, 2, "vz", network=True)
MAC = PlatformFacts("Darwin", "14.5", "arm64", bindings=True)


def resources(home: Path) -> MachineResources:
    home.mkdir()
    create_sparse(home / "memory", SPEC.memory_bytes)
    create_sparse(home / "disk", 1 << 20)
    return MachineResources(
        directory=home, memory_image=home / "memory",
        disks=(Disk(home / "disk", readonly=False),),
        kernel=home / "kernel", initrd=Path("/dev/null"), kernel_arguments="quiet",
        generation_id=uuid.uuid4(), console_log=home / "console.log", vmm_log=home / "vmm.log",
    )  # fmt: skip


@pytest.fixture
def driver(tmp_path: Path) -> VzDriver:
    return VzDriver(replace(MAC, interpreter=interpreter(tmp_path)))


@contextlib.asynccontextmanager
async def running(
    driver: VzDriver, what: MachineResources, spec: MachineSpec = SPEC
) -> AsyncIterator[VzMachine]:
    machine = await driver.start(spec, what)
    try:
        yield machine
    finally:
        await machine.kill()


async def memory_of(machine: VzMachine) -> str:
    reader, writer = await machine.dial_agent()
    try:
        word = (await reader.readline()).decode().strip()
        writer.write(b"hello\n")
        assert await reader.readline() == b"hello\n"
        return word
    finally:
        writer.close()


async def captured(driver: VzDriver, home: Path) -> tuple[MachineResources, str]:
    """Resources with the state of a VM that ran, and what it remembers."""
    what = resources(home)
    async with running(driver, what) as machine:
        word = await memory_of(machine)
        await machine.pause()
        await machine.save_devices(home / "devices", home / "memory")
    return replace(what, device_state=home / "devices"), word


def fork_of(source: MachineResources, home: Path) -> MachineResources:
    return replace(
        resources(home), device_state=source.device_state, memory_image=source.memory_image
    )


# -- life of a VM ----------------------------------------------------------------------------------
async def test_a_guest_boots_pauses_goes_on_and_answers(driver: VzDriver, tmp_path: Path) -> None:
    async with running(driver, resources(tmp_path / "one")) as machine:
        assert await machine.status() is MachineStatus.RUNNING
        word = await memory_of(machine)
        await machine.pause()
        await machine.pause()
        assert await machine.status() is MachineStatus.PAUSED
        await machine.resume()
        await machine.resume()
        assert await machine.status() is MachineStatus.RUNNING
        assert await memory_of(machine) == word
    assert not (tmp_path / "one/vz.sock").exists()


async def test_forks_remember_and_stand_still_until_resumed(
    driver: VzDriver, tmp_path: Path
) -> None:
    source, word = await captured(driver, tmp_path / "source")
    first, second = (fork_of(source, tmp_path / name) for name in ("a", "b"))
    async with running(driver, first) as one, running(driver, second) as other:
        assert [await m.status() for m in (one, other)] == [MachineStatus.PAUSED] * 2
        for machine in (one, other):
            await machine.resume()
            assert await memory_of(machine) == word
        await one.pause()
        await one.save_devices(tmp_path / "again")
    async with running(driver, replace(first, device_state=tmp_path / "again")) as grandchild:
        await grandchild.resume()
        assert await memory_of(grandchild) == word
    assert not list(tmp_path.glob("*/loading.vzstate"))


async def test_the_memory_image_stays_empty_and_the_state_file_holds_the_memory(
    driver: VzDriver, tmp_path: Path
) -> None:
    source, word = await captured(driver, tmp_path / "source")
    assert source.device_state is not None
    assert source.memory_image.stat().st_blocks == 0
    trailer = detach(source.device_state, tmp_path / "framework")
    assert (tmp_path / "framework").read_bytes().endswith(b"\n" + FILLER)
    assert word.encode() in source.device_state.read_bytes()
    assert (trailer.vcpus, trailer.memory_bytes) == (SPEC.vcpus, SPEC.memory_bytes)
    assert trailer.identity.mac == network_address(source.generation_id)


async def test_a_guest_that_shuts_down_ends_its_shim_with_a_reason(
    driver: VzDriver, tmp_path: Path
) -> None:
    async with running(driver, resources(tmp_path / "one")) as machine:
        await machine.power_button()
        await machine.wait_exit()
        assert machine.shutdown_reason == "guest-shutdown"
    async with running(driver, resources(tmp_path / "two")) as machine:
        assert await machine.ask("stop") == {}
        await machine.wait_exit()
        assert machine.shutdown_reason == "host-stop"


async def test_a_guest_has_let_go_of_its_disks_when_it_was_ended(
    driver: VzDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = resources(tmp_path / "one")
    async with running(driver, what) as machine:
        await machine.pause()
    assert (what.directory / LET_GO).exists()
    # A framework that hangs keeps nobody.
    monkeypatch.setattr("stillframe.vmm.vz.driver._STOP_DEADLINE", 0.2)
    what = resources(tmp_path / "two")
    (what.directory / HANGS_AT_STOP).touch()
    async with running(driver, what) as machine:
        pass
    assert machine.shutdown_reason is None
    assert not (what.directory / LET_GO).exists()
    with pytest.raises(VmmFailure):
        await machine.status()


async def test_a_port_that_never_answers_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillframe.vmm.vz.service._CONNECT_DEADLINE", 0.05)

    class Silent(DoubleMachine):
        async def connect(self, port: int) -> Connection:
            await asyncio.Event().wait()
            raise AssertionError

    class OnlySilent(DoubleFramework):
        async def create(
            self, description: Description, ended: Callable[[str], None]
        ) -> DoubleMachine:
            return Silent(description, ended)

    service = Service(OnlySilent(), lambda line: None)
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory() as home:
        vm = Description(1, 1 << 20, "kernel", None, "", (), f"{home}/console")
        assert await service._answer(json.dumps({"do": "boot", "vm": vm.as_json()}).encode()) == {}
        asked = asyncio.create_task(service._talk(*await asyncio.open_unix_connection(sock=theirs)))
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        writer.write(b"CONNECT 2222\n")
        async with asyncio.timeout(60):
            assert await reader.read() == b""
            await asked
        writer.close()


async def test_another_server_adopts_a_shim(driver: VzDriver, tmp_path: Path) -> None:
    what = resources(tmp_path / "one")
    async with running(driver, what) as machine:
        word = await memory_of(machine)
        adopted = await driver.adopt(machine.process, what)
        assert await memory_of(adopted) == word
        await adopted.pause()
        await adopted.save_devices(tmp_path / "devices")
        await adopted.resume()
        await adopted.close()
        assert await machine.status() is MachineStatus.RUNNING
    with pytest.raises(VmmFailure):
        await driver.adopt(machine.process, what)


# -- what is refused -------------------------------------------------------------------------------
async def test_state_loads_only_into_the_vm_it_was_saved_from(
    driver: VzDriver, tmp_path: Path
) -> None:
    source, _ = await captured(driver, tmp_path / "source")
    fork = fork_of(source, tmp_path / "fork")
    wrong = [replace(SPEC, vcpus=4), replace(SPEC, network=False)]
    for spec in wrong:
        with pytest.raises(DamagedData):
            await driver.start(spec, fork)
    more = replace(fork, disks=(*fork.disks, *fork.disks))
    with pytest.raises(VmmFailure, match="invalid argument") as refused:
        await driver.start(SPEC, more)
    assert "only on the Mac and for the user that saved it" in str(refused.value.hint)
    assert {path.name for path in fork.directory.iterdir()} == {"memory", "disk", "vmm.log"}


@pytest.mark.parametrize("damage", ["cut off", "empty", "other end", "no json"])
async def test_damaged_state_is_refused(driver: VzDriver, tmp_path: Path, damage: str) -> None:
    source, _ = await captured(driver, tmp_path / "source")
    assert source.device_state is not None
    whole = source.device_state.read_bytes()
    at = whole.rindex(b'{"identity')
    damaged = {
        "cut off": whole[:-1],
        "empty": b"",
        "other end": whole[:-8] + b"STILLVZ9",
        "no json": whole[:at] + b"[" + whole[at + 1 :],
    }
    source.device_state.write_bytes(damaged[damage])
    with pytest.raises(DamagedData, match="device state"):
        await driver.start(SPEC, fork_of(source, tmp_path / "fork"))


async def test_a_running_guest_is_not_saved(driver: VzDriver, tmp_path: Path) -> None:
    async with running(driver, resources(tmp_path / "one")) as machine:
        with pytest.raises(VmmFailure, match="it is running"):
            await machine.save_devices(tmp_path / "devices")
        assert not (tmp_path / "devices").exists()


async def test_a_full_disk_leaves_no_half_state(driver: VzDriver, tmp_path: Path) -> None:
    (tmp_path / REFUSES_TO_SAVE).touch()
    async with running(driver, resources(tmp_path / "one")) as machine:
        await machine.pause()
        with pytest.raises(StorageFull):
            await machine.save_devices(tmp_path / "devices")
        assert not (tmp_path / "devices").exists()
        await machine.resume()
        assert await machine.status() is MachineStatus.RUNNING


async def test_an_older_state_file_is_not_overwritten(driver: VzDriver, tmp_path: Path) -> None:
    (tmp_path / "devices").write_text("kept")
    async with running(driver, resources(tmp_path / "one")) as machine:
        await machine.pause()
        with pytest.raises(VmmFailure, match="exists"):
            await machine.save_devices(tmp_path / "devices")
    assert (tmp_path / "devices").read_text() == "kept"


async def test_a_mac_that_runs_no_more_vms_says_so(driver: VzDriver, tmp_path: Path) -> None:
    what = resources(tmp_path / "one")
    (what.directory / TOO_MANY).touch()
    with pytest.raises(InsufficientResources, match="too many VMs") as refused:
        await driver.start(SPEC, what)
    assert "stop another VM" in str(refused.value.hint)
    assert not (tmp_path / "one/vz.sock").exists()


async def test_without_a_disk_nothing_is_left(driver: VzDriver, tmp_path: Path) -> None:
    what = resources(tmp_path / "one")
    what.disks[0].path.unlink()
    with pytest.raises(VmmFailure, match="no such disk"):
        await driver.start(SPEC, what)
    assert not (tmp_path / "one/vz.sock").exists()


async def test_a_vm_that_could_not_be_saved_with_entropy_has_none(
    driver: VzDriver, tmp_path: Path
) -> None:
    home = tmp_path / "source"
    what = resources(home)
    (home / REFUSES_ENTROPY).touch()
    async with running(driver, what) as machine:
        await machine.pause()
        await machine.save_devices(home / "devices")
    assert "could not be saved" in what.vmm_log.read_text()
    assert not detach(home / "devices", home / "framework").identity.entropy
    fork = replace(fork_of(what, tmp_path / "fork"), device_state=home / "devices")
    async with running(driver, fork) as machine:
        assert await machine.status() is MachineStatus.PAUSED


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b'{"do": "nonsense"}\n', b'{"do": "boot"}\n', b'{"do": "save"}\n']
)
async def test_a_request_without_sense_harms_nothing(
    driver: VzDriver, tmp_path: Path, line: bytes
) -> None:
    async with running(driver, resources(tmp_path / "one")) as machine:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "one/vz.sock"))
        writer.write(line)
        assert b'"kind": "request"' in await reader.readline()
        writer.close()
        assert await machine.status() is MachineStatus.RUNNING


# -- the probe -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changed", "reason", "hint"),
    [
        ({"system": "Linux", "machine": "x86_64"}, "this is Linux x86_64", "use qemu"),
        ({"machine": "x86_64"}, "Intel Mac", "native Python"),
        ({"release": "13.6.1"}, "this is macOS 13.6.1", "update macOS"),
        ({"release": ""}, "unknown version", "update macOS"),
        ({"bindings": False}, "pyobjc-framework-Virtualization", "stillframe[vz]"),
    ],
)
async def test_a_host_that_cannot_is_told_why(
    changed: dict[str, Any], reason: str, hint: str
) -> None:
    probe = await VzDriver(replace(MAC, **changed)).probe()
    assert not probe.available
    assert reason in str(probe.reason)
    assert hint in str(probe.hint)


async def test_an_unsigned_interpreter_is_told_what_to_do(tmp_path: Path) -> None:
    words = "The process doesn't have the “com.apple.security.virtualization” entitlement."
    driver = VzDriver(replace(MAC, interpreter=interpreter(tmp_path, words)))
    probe = await driver.probe()
    assert not probe.available
    assert "lacks the entitlement com.apple.security.virtualization" in str(probe.reason)
    assert "sign" in str(probe.hint)
    with pytest.raises(MissingComponent, match="entitlement"):
        await driver.start(SPEC, resources(tmp_path / "one"))


async def test_what_the_framework_says_against_it_is_passed_on(tmp_path: Path) -> None:
    words = "this Mac does not support virtualization"
    probe = await VzDriver(replace(MAC, interpreter=interpreter(tmp_path, words))).probe()
    assert words in str(probe.reason)


async def test_a_mac_that_can_offers_its_release_as_version(driver: VzDriver) -> None:
    probe = await driver.probe()
    assert (probe.available, probe.version, probe.accelerator) == (True, "14.5", "vz")


async def test_this_host_has_the_driver_and_its_reason(tmp_path: Path) -> None:
    made = {driver.hypervisor: driver for driver in make_drivers("qemu", "auto", tmp_path)}
    probe = await made[Hypervisor.VZ].probe()
    assert probe.available or probe.reason


# -- what the engine makes of it -------------------------------------------------------------------
def test_state_outlives_an_update_of_macos_and_no_other_hypervisors_version_changes() -> None:
    here = DriverProbe(Hypervisor.VZ, True, "15.1", "vz")
    then = api_double.instance(
        hypervisor=Hypervisor.VZ, hypervisor_version="14.5", accelerator="vz", processor=""
    )
    assert foreign_to(then, here) == []
    assert len(foreign_to(replace(then, accelerator="tcg"), here)) == 1
    qemu = replace(then, hypervisor=Hypervisor.QEMU)
    assert "version 14.5" in foreign_to(qemu, replace(here, hypervisor=Hypervisor.QEMU))[0]


async def test_room_is_asked_for_all_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "shares_blocks", False)
    async with open_engine(tmp_path) as engine:
        one = await running_instance(engine)
        assert expected_bytes(engine.context, one) < one.memory_bytes
        sealed = replace(one, hypervisor=Hypervisor.VZ)
        assert expected_bytes(engine.context, sealed) >= one.memory_bytes


def test_the_address_of_a_network_card_is_its_own() -> None:
    for number in range(200):
        one = int(network_address(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))[:2], 16)
        assert one & 0b11 == 0b10  # locally administered, unicast
