"""The Firecracker driver, without Firecracker: played-back conversations, and its file tree."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillframe.host.memory import PAGE
from stillframe.host.orphans import kill_orphans
from stillframe.host.process import spawn
from stillframe.host.programs import find_program
from stillframe.host.sockets import connect_socket
from stillframe.model.errors import HostFailure, MissingComponent, StorageFull, VmmFailure
from stillframe.model.values import DeviceLimits
from stillframe.vmm.driver import MachineResources, MachineStatus
from stillframe.vmm.firecracker import api, driver, machine
from stillframe.vmm.firecracker.isolation import Scratch, SharedDirectory, confined
from stillframe.vmm.firecracker.machine import FirecrackerMachine, end_of_guest
from stillframe.vmm.firecracker.probe import kvm_refusal
from stillframe.vmm.moments import Moment
from support.conversations import Exchange, Player, recorded
from support.record_firecracker import LIMITED, NETWORKED, SPEC, files

RECORDED = "firecracker-1.16.1"
VERSIONS: list[api.Version] = [(1, 12, 1), (1, 16, 1)]


def writing(home: Path) -> Any:
    """Does what Firecracker does for a snapshot: writes the files that it was told."""

    def before(request: dict[str, Any]) -> None:
        if request["path"] == "/snapshot/create":
            for kind, offset in (("snapshot_path", 0), ("mem_file_path", PAGE)):
                name = Path(request["body"][kind])
                if name.parent.name != "nowhere":
                    directory = {"run": "jail", "scratch": "scratch"}[name.parent.name]
                    path = home / directory / name.name
                    with path.open("r+b" if path.exists() else "wb") as file:
                        file.seek(offset)
                        file.write(kind.encode())

    return before


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the process's own root would show: here its process is one of ours."""
    path = tmp_path / "scratch"
    path.mkdir()

    def opened(pid: int) -> int:
        os.kill(pid, 0)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    monkeypatch.setattr(Scratch, "open", opened)
    return path


@asynccontextmanager
async def conversing(
    home: Path,
    conversation: list[Exchange],
    *,
    moment: Moment | None = None,
    told_of_reset: bool = False,
    version: api.Version = (1, 16, 1),
    before: Callable[[dict[str, Any]], None] | None = None,
) -> AsyncIterator[tuple[FirecrackerMachine, Player]]:
    """A machine whose VMM is a recording; its process is one that sleeps."""
    shared = SharedDirectory(home)
    shared.make()
    player = Player(conversation, before or writing(home))
    async with player.listening(shared.api):
        process = spawn(["sleep", "1000"], output=home / "log")
        one = FirecrackerMachine(
            process, shared, version, moment=moment, told_of_reset=told_of_reset,
            console_log=home / "console", vmm_log=home / "log",
        )  # fmt: skip
        try:
            yield one, player
        finally:
            await one.kill()


def resources(home: Path, *, loaded: bool = False) -> MachineResources:
    home.mkdir(exist_ok=True)
    cold = files(home, LIMITED)
    return replace(cold, device_state=home / "devices") if loaded else cold


def spoken_with(version: api.Version, name: str) -> list[Exchange]:
    """A conversation that was recorded from this version."""
    return recorded(f"firecracker-{'.'.join(map(str, version))}", name)


def image_of(home: Path) -> Path:
    """The file that a snapshot's memory goes to: the image below, or a clone of it."""
    image = home / "image"
    image.write_bytes(b"below".ljust(2 * PAGE, b"."))
    return image


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_boot_asks_what_firecracker_was_asked(tmp_path: Path, version: api.Version) -> None:
    async with conversing(tmp_path, spoken_with(version, "boot")) as (one, player):
        await driver._configure(one, version, SPEC, resources(tmp_path))
    assert player.left == []


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_difference_is_written_beside(
    tmp_path: Path, scratch: Path, version: api.Version
) -> None:
    image = image_of(tmp_path)
    moment = Moment(image)
    spoken = spoken_with(version, "capture")
    async with conversing(tmp_path, spoken, moment=moment, version=version) as (one, player):
        assert one.writes_memory
        assert await one.status() is MachineStatus.RUNNING
        await one.pause()
        with pytest.raises(VmmFailure, match="a file for the guest's memory"):
            await one.save_devices(tmp_path / "devices")
        difference = await one.save_devices(tmp_path / "devices", image, moment)
        assert one.moment not in (None, moment)
        await one.resume()
        assert difference is not None
        start, end = next(iter(difference.runs))
        assert os.pread(difference.fd, 13, PAGE) == b"mem_file_path"
        assert start <= PAGE < end
        difference.close()
        difference.close()
    assert player.left == []
    assert (tmp_path / "devices").read_text() == "snapshot_path"
    assert image.read_bytes().startswith(b"below")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("why", ["adopted", "of another moment", "no moment"])
async def test_all_memory_is_written_when_the_moment_is_not_its_own(
    tmp_path: Path, why: str
) -> None:
    image = image_of(tmp_path)
    own, other = Moment(image), Moment(image)
    spoken = recorded(RECORDED, "capture all")
    async with conversing(
        tmp_path, spoken, moment=None if why == "adopted" else own
    ) as (one, player):  # fmt: skip
        await one.pause()
        since = None if why == "no moment" else other
        assert await one.save_devices(tmp_path / "devices", image, since) is None
        assert one.moment not in (None, own, other)
    assert player.left == []
    assert image.read_bytes()[PAGE:].startswith(b"mem_file_path")
    assert not (tmp_path / "jail").exists()


async def test_what_memory_has_no_room_for_goes_to_the_image(tmp_path: Path, scratch: Path) -> None:
    image = image_of(tmp_path)
    moment = Moment(image)
    full, again = recorded(RECORDED, "capture")[2], recorded(RECORDED, "capture all")[1]
    words = "Create snapshot error: Cannot write memory file: No space left (os error 28)"
    full["answer"] = {"status": 400, "body": {"fault_message": words}}
    again["request"]["body"]["snapshot_type"] = "Diff"
    async with conversing(tmp_path, [full, again], moment=moment) as (one, player):
        assert await one.save_devices(tmp_path / "devices", image, moment) is None
        assert one.moment not in (None, moment)
    assert player.left == []
    assert image.read_bytes().startswith(b"below")  # laid over it, by Firecracker
    assert image.read_bytes()[PAGE:].startswith(b"mem_file_path")
    assert list(scratch.iterdir()) == []


async def test_extents_are_not_trusted_where_huge_pages_are_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SHMEM_PAGES", tmp_path / "shmem_enabled")
    (tmp_path / "shmem_enabled").write_text("always within_size advise never deny [force]\n")
    image = image_of(tmp_path)
    moment = Moment(image)
    exchange = recorded(RECORDED, "capture all")[1]
    exchange["request"]["body"]["snapshot_type"] = "Diff"
    async with conversing(tmp_path, [exchange], moment=moment) as (one, player):
        assert await one.save_devices(tmp_path / "devices", image, moment) is None
    assert player.left == []


async def test_after_a_failure_nobody_knows_what_was_noted(tmp_path: Path) -> None:
    image = image_of(tmp_path)
    moment = Moment(image)
    (tmp_path / "devices").touch()  # so what was written cannot be kept
    async with conversing(tmp_path, recorded(RECORDED, "capture")[2:3], moment=moment) as (one, _):
        with pytest.raises(HostFailure):
            await one.save_devices(tmp_path / "devices", image, moment)
        assert one.moment is None


async def test_a_full_disk_under_device_state_is_no_reason_to_ask_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is empty by then: a second difference would lack what the first one had."""
    image = image_of(tmp_path)
    moment = Moment(image)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(machine, "write_fully", full)
    spoken = recorded(RECORDED, "capture")[2:3]
    async with conversing(tmp_path, spoken * 2, moment=moment) as (one, player):
        with pytest.raises(StorageFull):
            await one.save_devices(tmp_path / "devices", image, moment)
        assert one.moment is None
        assert len(player.left) == 1


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_loaded_vm_notes_writes_from_its_image_on(
    tmp_path: Path, version: api.Version
) -> None:
    spoken = spoken_with(version, "load") + spoken_with(version, "capture loaded")
    image = image_of(tmp_path)
    moment = Moment(image)
    async with conversing(
        tmp_path, spoken, moment=moment, told_of_reset=True, version=version
    ) as (one, player):  # fmt: skip
        warm = resources(tmp_path / "warm", loaded=True)
        await driver._configure(one, version, SPEC, warm)
        await one.resume()
        await one.pause()
        difference = await one.save_devices(tmp_path / "devices", image, moment)
        assert difference is not None
        difference.close()
        assert await one.status() is MachineStatus.PAUSED
    assert player.left == []
    assert (tmp_path / "devices").read_text() == "snapshot_path"
    assert not (tmp_path / "jail").exists()


async def test_a_guest_is_told_of_the_reset_that_its_vsock_waits_for(tmp_path: Path) -> None:
    moment = Moment(image_of(tmp_path))
    async with conversing(tmp_path, recorded(RECORDED, "pause"), moment=moment) as (one, player):
        await one.pause()
        await one.resume()
        assert player.left == []
        assert one.moment is moment  # and its log is untouched
    spoken = spoken_with((1, 12, 1), "pause")
    assert {each["request"]["path"] for each in spoken} == {"/vm"}  # nor is it asked for
    async with conversing(tmp_path, spoken, version=(1, 12, 1)) as (one, player):
        await one.pause()
        await one.resume()
    assert player.left == []


@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
async def test_it_is_started_once_more_where_the_state_has_no_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: str
) -> None:
    asked: list[bool] = []

    async def started(*_: object, uplink: str | None, clock: bool) -> str:
        asked.append(clock)
        if clock:
            raise VmmFailure(f"refused: {api.NO_CLOCK_IN_STATE}")
        return "a machine"

    made = driver.FirecrackerDriver("true", accelerator="kvm")
    await made.probe()
    made._version = (1, 16, 1)
    monkeypatch.setattr(made, "_start", started)
    monkeypatch.setattr(driver, "architecture", lambda: processor)
    machine = await made.start(SPEC, resources(tmp_path / "vm", loaded=True))
    assert str(machine) == "a machine"
    assert asked == ([True, False] if processor == "x86_64" else [False])


async def test_other_failures_of_a_load_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def started(*_: object, uplink: str | None, clock: bool) -> str:
        asked.append(clock)
        raise VmmFailure("refused: the state is damaged")

    asked: list[bool] = []
    made = driver.FirecrackerDriver("true", accelerator="kvm")
    await made.probe()
    made._version = (1, 16, 1)
    monkeypatch.setattr(made, "_start", started)
    with pytest.raises(VmmFailure, match="damaged"):
        await made.start(SPEC, resources(tmp_path / "vm", loaded=True))
    assert len(asked) == 1


async def test_device_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    async with conversing(tmp_path, recorded(RECORDED, "load")) as (one, _):
        with pytest.raises(VmmFailure, match="of a VM with 1 vCPUs and 16777216 bytes"):
            await driver._configure(
                one, (1, 16, 1), replace(SPEC, vcpus=2), resources(tmp_path, loaded=True)
            )


async def test_refusals_are_in_firecrackers_words(tmp_path: Path) -> None:
    spoken = recorded(RECORDED, "refusals") + recorded(RECORDED, "load damaged")
    moment = Moment(image_of(tmp_path))
    async with conversing(tmp_path, spoken, moment=moment) as (one, _):
        with pytest.raises(VmmFailure, match="not supported after starting the microVM"):
            await one.call(api.machine_config(SPEC))
        with pytest.raises(VmmFailure, match="save/restore unavailable while running"):
            await one.save_devices(tmp_path / "devices", tmp_path / "image", moment)
        warm = resources(tmp_path / "warm", loaded=True)
        with pytest.raises(VmmFailure, match="Failed to load snapshot state from file"):
            await driver._configure(one, (1, 16, 1), SPEC, warm)


@pytest.mark.parametrize("what", ["state", "memory", "log"])
@pytest.mark.parametrize("trick", ["link", "pipe"])
async def test_what_is_put_in_the_place_of_a_file_is_not_taken(
    tmp_path: Path, scratch: Path, trick: str, what: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("exit_code=0 and a secret")
    moment = Moment(image_of(tmp_path))
    home = tmp_path / "jail" if what == "log" else scratch

    def before(request: dict[str, Any]) -> None:
        writing(tmp_path)(request)
        (home / what).unlink()
        if trick == "pipe":
            os.mkfifo(home / what)
        else:
            (home / what).symlink_to(secret)

    spoken = recorded(RECORDED, "capture")[2:3]
    async with conversing(tmp_path, spoken, moment=moment, before=before) as (one, _):
        saving = one.save_devices(tmp_path / "devices", tmp_path / "image", moment)
        if what != "log":
            with pytest.raises(VmmFailure, match="is no file"):
                await saving
            assert not (tmp_path / "devices").exists()
            assert one.moment is None
        elif (difference := await saving) is not None:
            difference.close()
        await one.kill()
        assert "secret" not in (tmp_path / "log").read_text()
    assert secret.exists()


async def test_a_link_in_the_place_of_a_socket_is_not_followed(tmp_path: Path) -> None:
    shared = SharedDirectory(tmp_path)
    async with conversing(tmp_path, recorded(RECORDED, "capture")) as (one, player):
        other = tmp_path / "other.sock"
        shared.api.rename(other)
        shared.api.symlink_to(other)
        with pytest.raises(VmmFailure, match="is gone"):
            await one.pause()
        with pytest.raises(VmmFailure):
            connect_socket(shared.api)
        assert len(player.left) == 4


async def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    exchange = recorded(RECORDED, "capture all")[1]
    words = "Create snapshot error: Cannot write memory: No space left on device (os error 28)"
    exchange["answer"] = {"status": 400, "body": {"fault_message": words}}
    async with conversing(tmp_path, [exchange]) as (one, _):
        with pytest.raises(StorageFull):
            await one.save_devices(tmp_path / "devices", image_of(tmp_path))
        assert not (tmp_path / "devices").exists()
        assert not (tmp_path / "jail/memory").exists()


async def test_a_vmm_that_is_gone_is_a_failure(tmp_path: Path) -> None:
    async with conversing(tmp_path, []) as (one, _):
        await one.kill()
        for step in (one.pause(), one.status(), one.save_devices(tmp_path / "d", tmp_path / "m")):
            with pytest.raises(VmmFailure):
                await step
        await one.kill()


async def test_what_a_dead_vmm_left_goes_when_it_is_looked_for(tmp_path: Path) -> None:
    shared = SharedDirectory(tmp_path)
    shared.make()
    shared.memory.write_bytes(b"half a snapshot")
    process = spawn(["true"], output=tmp_path / "log")
    await process.wait()
    made = driver.FirecrackerDriver("true", accelerator="kvm")
    with pytest.raises(VmmFailure, match="is gone"):
        await made.adopt(process.identity, resources(tmp_path))
    assert not shared.path.exists()


async def test_a_running_one_tells_its_version_and_how_it_came(tmp_path: Path) -> None:
    async with conversing(tmp_path, recorded(RECORDED, "capture")[:1]) as (one, _):
        made = driver.FirecrackerDriver("true", accelerator="kvm")
        adopted = await made.adopt(one.process, resources(tmp_path))
        assert (adopted.version, adopted.moment) == ((1, 16, 1), None)
        await adopted.close()


async def test_the_agent_is_dialled_when_the_guest_says_that_it_listens(tmp_path: Path) -> None:
    console = tmp_path / "console"
    console.touch()
    refused = asyncio.Event()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readline()
        if "READY" in console.read_text():
            writer.write(b"OK 1073741824\n")
            assert asked == b"CONNECT 2222\n"
            await writer.drain()
            await reader.read()
        else:  # as Firecracker hangs up while nobody listens in the guest
            refused.set()
        writer.close()

    async with conversing(tmp_path, []) as (one, _):
        server = await asyncio.start_unix_server(guest, tmp_path / "jail/vsock.sock")
        async with server, asyncio.timeout(60):
            dialling = asyncio.create_task(one.dial_agent())
            await refused.wait()
            console.write_text("STILLFRAME-AGENT-READY nonce=n1\n")
            _, writer = await dialling
            writer.close()


async def test_a_network_that_this_host_cannot_give_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = driver.FirecrackerDriver("true", accelerator="kvm")
    await made.probe()
    made._version = (1, 16, 1)
    cold = resources(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingComponent, match="cannot have a network") as refused:
        await made.start(NETWORKED, cold)
    assert "network off" in str(refused.value.hint)
    assert not (tmp_path / "jail").exists()


async def test_a_network_that_cannot_be_made_is_told_by_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = driver.FirecrackerDriver("true", accelerator="kvm")
    await made.probe()
    made._version = (1, 16, 1)
    monkeypatch.setattr(driver, "find_uplink", lambda: str(tmp_path / "no-slirp4netns"))
    with pytest.raises(MissingComponent, match="cannot have a network: ") as refused:
        await made.start(NETWORKED, resources(tmp_path))
    assert "user namespaces" in str(refused.value.hint)
    assert kill_orphans(tmp_path, ()) == []
    assert not (tmp_path / "jail").exists()


def test_the_network_device_is_the_same_in_every_vm(tmp_path: Path) -> None:
    cold = replace(resources(tmp_path), limits=DeviceLimits(download=1000, upload=2000))
    calls = {call.path for call in driver._boot_calls(SPEC, cold)}
    assert "/network-interfaces/eth0" not in calls
    bodies = {call.path: call.body for call in driver._boot_calls(NETWORKED, cold)}
    assert bodies["/network-interfaces/eth0"] == {
        "iface_id": "eth0", "host_dev_name": "stillframe0", "guest_mac": "52:54:00:12:34:56",
        "rx_rate_limiter": {"bandwidth": {"size": 1000, "refill_time": 1000}},
        "tx_rate_limiter": {"bandwidth": {"size": 2000, "refill_time": 1000}},
    }  # fmt: skip


@pytest.mark.parametrize("loaded", [False, True])
async def test_a_network_is_asked_for_as_firecracker_was_asked(
    tmp_path: Path, loaded: bool
) -> None:
    conversation = recorded(RECORDED, "load with network" if loaded else "boot with network")
    assert any("stillframe0" in str(exchange["request"]) for exchange in conversation)
    async with conversing(tmp_path, conversation) as (one, player):
        given = resources(tmp_path, loaded=loaded)
        await driver._configure(one, (1, 16, 1), NETWORKED, given)
    assert player.left == []


def test_only_a_vm_with_a_network_sees_the_device_for_one(tmp_path: Path) -> None:
    without = confined("true", [], tmp_path, [])
    assert "/dev/net/tun" not in without
    assert "network" not in without
    with_one = confined("true", [], tmp_path, [], uplink="/usr/bin/slirp4netns")
    place = with_one.index("network")
    assert with_one[place : place + 3] == ["network", "/usr/bin/slirp4netns", "stillframe0"]
    assert ("/dev/net/tun" in with_one) == Path("/dev/net/tun").exists()


@pytest.mark.parametrize(
    ("log", "console", "reason"),
    [
        (b"Vmm is stopping.\nexit_code=0\n", b"STILLFRAME-EXIT nonce=1 code=0\n", "guest-shutdown"),
        (b"Vmm is stopping.\nexit_code=0\n", b"Rebooting\n", "guest-reset"),
        (b"Received KVM_EXIT_INTERNAL_ERROR signal\nexit_code=0\n", b"", None),
        (b"Unexpected exit reason on vcpu run: Shutdown\nexit_code=0\n", b"", None),
        (b"Running Firecracker v1.16.1\n", b"", None),
    ],
)
def test_why_a_guest_ended(log: bytes, console: bytes, reason: str | None) -> None:
    assert end_of_guest(log, console) == reason


async def test_the_probe_says_what_the_vmm_said(tmp_path: Path) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert "/dev/kvm" in str(await kvm_refusal("true"))
        return
    fake = tmp_path / "firecracker"
    log = "Received KVM_EXIT_INTERNAL_ERROR signal"
    fake.write_text(f"#!/bin/sh\necho '2026-11-24 [anonymous-instance:fc_vcpu 0] {log}'\n")
    fake.chmod(0o755)
    assert await kvm_refusal(str(fake)) == f"it does not run a 64-bit guest ({log})"
    fake.write_text("#!/bin/sh\necho OK\n")
    assert await kvm_refusal(str(fake)) is None


def test_programs_are_found_on_path_first_then_where_they_were_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("path", "installed"):
        (tmp_path / place).mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    program = tmp_path / "installed/firecracker"
    program.touch(mode=0o755)
    assert find_program("firecracker", None) is None
    assert find_program("firecracker", tmp_path / "installed") == str(program)
    (tmp_path / "path/firecracker").touch(mode=0o755)
    found = find_program("firecracker", tmp_path / "installed")
    assert found == str(tmp_path / "path/firecracker")
