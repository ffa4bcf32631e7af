"""The Firecracker driver, without Firecracker: played-back conversations, and its file tree."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillframe.host.orphans import kill_orphans, processes_naming
from stillframe.host.process import Process, spawn
from stillframe.host.programs import find_program
from stillframe.host.sockets import connect_socket
from stillframe.model.errors import MissingComponent, StorageFull, VmmFailure
from stillframe.model.values import DeviceLimits
from stillframe.vmm.driver import MachineResources, MachineStatus
from stillframe.vmm.firecracker import api, driver, machine
from stillframe.vmm.firecracker.isolation import Seen, SharedDirectory, confined
from stillframe.vmm.firecracker.machine import FirecrackerMachine, end_of_guest
from stillframe.vmm.firecracker.probe import kvm_refusal
from support.conversations import Exchange, Player, recorded
from support.record_firecracker import LIMITED, NETWORKED, SPEC, files

RECORDED = "firecracker-1.16.1"
BUSYBOX = shutil.which("busybox")
needs_busybox = pytest.mark.skipif(BUSYBOX is None, reason="needs busybox (make setup)")


def writing(home: Path) -> Any:
    """Does what Firecracker does for a snapshot: writes the files that it was told."""

    def before(request: dict[str, Any]) -> None:
        if request["path"] == "/snapshot/create":
            for kind in ("snapshot_path", "mem_file_path"):
                name = Path(request["body"][kind])
                if name.parent == Path("/run"):
                    (home / "jail" / name.name).write_bytes(kind.encode())

    return before


@asynccontextmanager
async def conversing(
    home: Path,
    conversation: list[Exchange],
    *,
    loaded: bool,
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
            process, shared, version, loaded=loaded,
            console_log=home / "console", vmm_log=home / "log",
        )  # fmt: skip
        try:
            yield one, player
        finally:
            await one.kill()


def resources(home: Path, *, loaded: bool = False) -> MachineResources:
    cold = files(home, LIMITED)
    return replace(cold, device_state=home / "devices") if loaded else cold


async def test_a_boot_asks_what_firecracker_was_asked(tmp_path: Path) -> None:
    async with conversing(tmp_path, recorded(RECORDED, "boot"), loaded=False) as (one, player):
        await driver._configure(one, (1, 16, 1), SPEC, resources(tmp_path))
    assert player.left == []


async def test_a_cold_vm_writes_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SWAPS", tmp_path / "swaps")
    (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n")
    (tmp_path / "image").write_bytes(b"the clone of the image below")
    async with conversing(tmp_path, recorded(RECORDED, "capture"), loaded=False) as (one, player):
        assert one.writes_memory
        assert await one.status() is MachineStatus.RUNNING
        await one.pause()
        with pytest.raises(VmmFailure, match="a file for the guest's memory"):
            await one.save_devices(tmp_path / "devices")
        await one.save_devices(tmp_path / "devices", tmp_path / "image")
        await one.resume()
    assert player.left == []
    assert (tmp_path / "devices").read_text() == "snapshot_path"
    assert (tmp_path / "image").read_text() == "mem_file_path"


@pytest.mark.parametrize("why", ["swap", "old version"])
async def test_all_memory_is_written_where_resident_pages_are_not_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(machine, "_SWAPS", tmp_path / "swaps")
    swap = "/dev/sda2 partition 1 0 -2\n" if why == "swap" else ""
    (tmp_path / "swaps").write_text(f"Filename Type Size Used Priority\n{swap}")
    exchange = recorded(RECORDED, "capture")[2]
    exchange["request"]["body"]["snapshot_type"] = "Full"
    version = (1, 16, 1) if why == "swap" else (1, 12, 1)
    async with conversing(tmp_path, [exchange], loaded=False, version=version) as (one, player):
        await one.save_devices(tmp_path / "devices", tmp_path / "image")
    assert player.left == []


async def test_a_loaded_vm_saves_its_devices_only(tmp_path: Path) -> None:
    spoken = recorded(RECORDED, "load") + recorded(RECORDED, "capture loaded")
    async with conversing(tmp_path, spoken, loaded=True) as (one, player):
        await driver._configure(one, (1, 16, 1), SPEC, resources(tmp_path, loaded=True))
        assert not one.writes_memory
        await one.resume()
        await one.pause()
        await one.save_devices(tmp_path / "devices")
        assert await one.status() is MachineStatus.PAUSED
    assert player.left == []
    assert (tmp_path / "devices").read_text() == "snapshot_path"
    assert not (tmp_path / "jail").exists()


async def test_device_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    async with conversing(tmp_path, recorded(RECORDED, "load"), loaded=True) as (one, _):
        with pytest.raises(VmmFailure, match="of a VM with 1 vCPUs and 16777216 bytes"):
            await driver._configure(
                one, (1, 16, 1), replace(SPEC, vcpus=2), resources(tmp_path, loaded=True)
            )


async def test_refusals_are_in_firecrackers_words(tmp_path: Path) -> None:
    spoken = recorded(RECORDED, "refusals") + recorded(RECORDED, "load damaged")
    async with conversing(tmp_path, spoken, loaded=False) as (one, _):
        with pytest.raises(VmmFailure, match="not supported after starting the microVM"):
            await one.call(api.machine_config(SPEC))
        with pytest.raises(VmmFailure, match="save/restore unavailable while running"):
            await one.save_devices(tmp_path / "devices", tmp_path / "image")
        with pytest.raises(VmmFailure, match="Failed to load snapshot state from file"):
            await driver._configure(one, (1, 16, 1), SPEC, resources(tmp_path, loaded=True))


@pytest.mark.parametrize("trick", ["link", "second name", "pipe"])
async def test_what_is_put_in_the_place_of_a_file_is_not_taken(tmp_path: Path, trick: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("exit_code=0 and a secret")
    make = {"link": Path.symlink_to, "second name": Path.hardlink_to, "pipe": None}[trick]

    def before(request: dict[str, Any]) -> None:
        for name in ("state", "memory", "log"):
            path = tmp_path / "jail" / name
            path.unlink(missing_ok=True)
            if make is None:
                os.mkfifo(path)
            else:
                make(path, secret)

    spoken = recorded(RECORDED, "capture")[2:3]
    async with conversing(tmp_path, spoken, loaded=False, before=before) as (one, _):
        with pytest.raises(VmmFailure, match="is no file"):
            await one.save_devices(tmp_path / "devices", tmp_path / "image")
        assert not (tmp_path / "devices").exists()
        if trick != "second name":  # which the VMM's file tree does not let it make
            await one.kill()
            assert "secret" not in (tmp_path / "log").read_text()
    assert secret.exists()


async def test_a_link_in_the_place_of_a_socket_is_not_followed(tmp_path: Path) -> None:
    shared = SharedDirectory(tmp_path)
    async with conversing(tmp_path, recorded(RECORDED, "capture"), loaded=True) as (one, player):
        other = tmp_path / "other.sock"
        shared.api.rename(other)
        shared.api.symlink_to(other)
        with pytest.raises(VmmFailure, match="is gone"):
            await one.pause()
        with pytest.raises(VmmFailure):
            connect_socket(shared.api)
        assert len(player.left) == 4


async def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    exchange = recorded(RECORDED, "capture")[2]
    words = "Create snapshot error: Cannot write memory: No space left on device (os error 28)"
    exchange["answer"] = {"status": 400, "body": {"fault_message": words}}
    async with conversing(tmp_path, [exchange], loaded=False) as (one, _):
        with pytest.raises(StorageFull):
            await one.save_devices(tmp_path / "devices", tmp_path / "image")
        assert not (tmp_path / "devices").exists()


async def test_a_vmm_that_is_gone_is_a_failure(tmp_path: Path) -> None:
    async with conversing(tmp_path, [], loaded=True) as (one, _):
        await one.kill()
        for step in (one.pause(), one.status(), one.save_devices(tmp_path / "devices")):
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
    async with conversing(tmp_path, recorded(RECORDED, "capture")[:1], loaded=False) as (one, _):
        made = driver.FirecrackerDriver("true", accelerator="kvm")
        adopted = await made.adopt(one.process, resources(tmp_path))
        assert (adopted.version, adopted.writes_memory) == ((1, 16, 1), True)
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

    async with conversing(tmp_path, [], loaded=False) as (one, _):
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
    async with conversing(tmp_path, conversation, loaded=loaded) as (one, player):
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


# -- the file tree -----------------------------------------------------------------------------


def confine(home: Path, script: str, seen: list[Seen]) -> list[str]:
    """A command that runs a shell script in a file tree of its own."""
    assert BUSYBOX is not None
    shared = SharedDirectory(home)
    shared.make()
    command = confined(BUSYBOX, [], shared.path, seen, console=home / "console")
    # busybox tells by its name what it is to be.
    return [*command[: command.index("--") + 2], f"{home}/sh", "-c", script]


def confined_process(home: Path, script: str, seen: list[Seen]) -> Process:
    return spawn(confine(home, script, seen), output=home / "log")


def run_confined(home: Path, script: str, seen: list[Seen]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(confine(home, script, seen), capture_output=True, check=False, timeout=60)


@needs_busybox
def test_it_sees_its_own_files_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("memory")
    (tmp_path / "disk").write_text("before")
    script = """
        read word < /memory; echo "memory: $word"
        for path in /*; do echo "root: $path"; done
        ls=/proc; [ -e $ls ] && echo seen; [ -e /etc ] && echo seen
        echo after > /disk0; echo changed > /memory; echo state > /run/state
    """
    seen = [Seen("/memory", tmp_path / "image"), Seen("/disk0", tmp_path / "disk", readonly=False)]
    done = run_confined(tmp_path, script, seen)
    told = (tmp_path / "console").read_text().splitlines()
    assert told[0] == "memory: memory"
    names = {line.removeprefix("root: ") for line in told if line.startswith("root: ")}
    assert names <= {*("/vmm", "/dev", "/run", "/scratch", "/memory", "/disk0"),
                     *("/usr", "/lib", "/lib64")}  # fmt: skip
    assert "seen" not in told
    assert b"Read-only file system" in done.stderr
    assert (tmp_path / "image").read_text() == "memory"
    assert (tmp_path / "disk").read_text() == "after\n"
    assert (tmp_path / "jail/state").read_text() == "state\n"


@needs_busybox
async def test_it_gives_up_every_power(tmp_path: Path) -> None:
    process = confined_process(tmp_path, "echo ready; while :; do :; done", [])
    try:
        async with asyncio.timeout(60):
            await _until(tmp_path / "console", "ready")
        status = Path(f"/proc/{process.identity.pid}/status").read_text().splitlines()
        facts = dict(line.split(":\t", 1) for line in status if ":\t" in line)
        assert [facts[name] for name in ("CapPrm", "CapEff", "CapBnd")] == ["0" * 16] * 3
        assert facts["NoNewPrivs"] == "1"
        # Found by its VM's directory, as every VMM must be.
        assert processes_naming(tmp_path) == [process.identity.pid]
        assert kill_orphans(tmp_path, ()) == [process.identity.pid]
    finally:
        await process.kill()
    assert not any(line.split()[4].startswith(str(tmp_path)) for line in mounts())


def mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


async def _until(path: Path, word: str) -> None:
    from stillframe.host.watch import file_changes

    path.touch()
    async with file_changes(path) as changed:
        while word not in path.read_text():
            await changed.wait()
            changed.clear()


@needs_busybox
def test_what_is_missing_is_said_in_a_line(tmp_path: Path) -> None:
    done = run_confined(tmp_path, "echo no", [Seen("/memory", tmp_path / "nowhere")])
    assert done.returncode == 1
    assert done.stderr.decode().startswith("no private file tree: mount ")
    assert len(done.stderr.splitlines()) == 1


@needs_busybox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_gets_one_too(tmp_path: Path) -> None:
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    python = next(
        (path for path in (sys.executable, "/usr/bin/python3") if _may_run(become, path)), None
    )
    if python is None:
        pytest.skip("an ordinary user may run no Python here")
    home = Path(subprocess.check_output([*become, "mktemp", "-d", "-p", "/tmp"], text=True).strip())
    try:
        home.chmod(0o755)
        (home / "image").write_text("memory")
        command = confine(home, "echo $(id -u); read w < /memory; echo $w", [
            Seen("/memory", home / "image"), Seen("/bin/id", Path(str(BUSYBOX)))
        ])  # fmt: skip
        launcher = home / "launch.py"
        shutil.copy(command[3], launcher)
        for path in (home / "jail", home / "jail/log", launcher):
            os.chown(path, 65534, 65534)
        (home / "console").touch()
        os.chown(home / "console", 65534, 65534)
        done = subprocess.run(
            [*become, python, "-I", "-S", launcher, *command[4:]],
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        if b"Operation not permitted" in done.stderr:
            pytest.skip("this host gives ordinary users no namespaces")
        assert done.returncode == 0, done.stderr
        assert (home / "console").read_text().splitlines()[-1] == "memory"
    finally:
        shutil.rmtree(home)


def _may_run(become: list[str], python: str) -> bool:
    return (
        subprocess.run([*become, python, "-c", ""], check=False, capture_output=True).returncode
        == 0
    )


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
