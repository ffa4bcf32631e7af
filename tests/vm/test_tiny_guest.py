"""Firecracker and Cloud Hypervisor, for real, with a guest of 1.8 KB (tests/guest/tiny.S).

It runs where ``/dev/kvm`` creates VMs though no kernel boots in them. It has no agent: what it does
is read from its serial console. The binaries come from PATH or STILLFRAME_FIRECRACKER_BINARY and
STILLFRAME_CLOUD_HYPERVISOR_BINARY.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stillframe.host.capture import BufferBudget, MemoryCapture
from stillframe.host.files import clone, create_sparse
from stillframe.host.image import open_private
from stillframe.host.memory import GuestMemory
from stillframe.host.orphans import kill_orphans, processes_naming
from stillframe.host.probes import landlock_version
from stillframe.host.watch import file_changes
from stillframe.model.errors import VmmFailure
from stillframe.model.values import DeviceLimits, Hypervisor
from stillframe.vmm.cloud_hypervisor.driver import CloudHypervisorDriver
from stillframe.vmm.cloud_hypervisor.machine import CloudHypervisorMachine
from stillframe.vmm.driver import (
    Disk,
    Driver,
    Machine,
    MachineResources,
    MachineSpec,
    MachineStatus,
)
from stillframe.vmm.firecracker.driver import FirecrackerDriver
from stillframe.vmm.over_http import HttpMachine
from stillframe.vmm.unix_http import Call
from support.uplinks import Watch, children, hindrance

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]
SOURCE = Path(__file__).resolve().parents[1] / "guest" / "tiny.S"
SPEC = MachineSpec(memory_bytes=128 << 20, vcpus=1, accelerator="kvm", network=False)
DEADLINE = 60.0
DRIVERS: dict[str, tuple[str, Callable[[str], Driver]]] = {
    "firecracker": (
        "STILLFRAME_FIRECRACKER_BINARY",
        lambda binary: FirecrackerDriver(binary, accelerator="kvm"),
    ),
    "cloud-hypervisor": (
        "STILLFRAME_CLOUD_HYPERVISOR_BINARY",
        lambda binary: CloudHypervisorDriver(binary, accelerator="kvm"),
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest, assembled."""
    return assembled(SOURCE, tmp_path_factory.mktemp("tiny") / "tiny")


def assembled(source: Path, kernel: Path) -> Path:
    """An ELF kernel of an assembler file."""
    flags = ["-nostdlib", "-static", "-no-pie", "-Wl,-N,-Ttext-segment=0x100000,--build-id=none"]
    subprocess.run(["gcc", *flags, "-o", kernel, source], check=True, timeout=60)
    return kernel


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    """Each of the two; no process is left, however the test ended."""
    variable, make = DRIVERS[request.param]
    binary = os.environ.get(variable, request.param)
    if shutil.which(binary) is None:
        pytest.skip(f"{request.param} is not installed")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm may not be opened")
    yield make(binary)
    assert kill_orphans(tmp_path, ()) == []


def resources_of(home: Path, kernel: Path) -> MachineResources:
    """A cold VM's files, in a new directory."""
    home.mkdir()
    create_sparse(home / "image", SPEC.memory_bytes)
    create_sparse(home / "overlay", 1 << 20)
    return MachineResources(
        directory=home,
        memory_image=home / "image",
        disks=(Disk(home / "overlay", readonly=False),),
        kernel=kernel,
        initrd=Path("/dev/null"),
        kernel_arguments="",
        generation_id=uuid.uuid4(),
        console_log=home / "console.log",
        vmm_log=home / "vmm.log",
    )


def fork_of(captured: MachineResources, home: Path) -> MachineResources:
    """A fork's files: the captured image itself, its own disk and sockets."""
    home.mkdir()
    clone(captured.disks[0].path, home / "overlay")
    return replace(
        captured,
        directory=home,
        disks=(Disk(home / "overlay", readonly=False),),
        generation_id=uuid.uuid4(),
        console_log=home / "console.log",
        vmm_log=home / "vmm.log",
    )


async def capture(machine: Machine, resources: MachineResources, home: Path) -> MachineResources:
    """Image and devices of a paused VM, as the engine takes them."""
    home.mkdir()
    clone(resources.memory_image, home / "image")
    clone(resources.disks[0].path, home / "overlay")
    own = machine.writes_memory
    await machine.save_devices(home / "devices", home / "image" if own else None)
    if not own:
        with (
            GuestMemory(machine.process.pid, resources.memory_image) as memory,
            open_private(home / "image") as fd,
        ):
            taken = MemoryCapture(memory, fd, incremental=False, budget=BufferBudget(1 << 28))
            taken.ahead()
            taken.still()
            taken.after()
    return replace(
        resources,
        memory_image=home / "image",
        device_state=home / "devices",
        disks=(Disk(home / "overlay", readonly=False),),
    )


@contextlib.asynccontextmanager
async def running(
    driver: Driver, resources: MachineResources, spec: MachineSpec = SPEC
) -> AsyncIterator[Machine]:
    """A started VM, killed at the end."""
    machine = await driver.start(spec, resources)
    try:
        yield machine
    finally:
        await machine.kill()


async def counted(resources: MachineResources, more_than: int = -1) -> tuple[str, int]:
    """The guest's nonce and its number, as soon as that is over ``more_than``."""
    resources.console_log.touch()
    async with asyncio.timeout(DEADLINE), file_changes(resources.console_log) as changed:
        while True:
            changed.clear()
            text = resources.console_log.read_text(errors="replace")
            assert "lost" not in text, f"a page of the guest's memory is missing: {text[-200:]}"
            lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
            told = [words for words in lines if len(words) == 2 and len(words[0]) == 8]
            if told and int(told[-1][1], 16) > more_than:
                return told[-1][0], int(told[-1][1], 16)
            await changed.wait()


async def test_memory_goes_on_in_forks_and_their_forks(
    driver: Driver, tiny: Path, tmp_path: Path
) -> None:
    source = resources_of(tmp_path / "source", tiny)
    async with running(driver, source) as machine:
        nonce, seen = await counted(source, more_than=2)
        assert await machine.status() is MachineStatus.RUNNING
        await machine.pause()
        assert await machine.status() is MachineStatus.PAUSED
        captured = await capture(machine, source, tmp_path / "captured")
        _, at_capture = await counted(source)
        await machine.resume()
        assert (await counted(source, more_than=at_capture))[0] == nonce
    before = captured.memory_image.read_bytes()
    one, two = fork_of(captured, tmp_path / "one"), fork_of(captured, tmp_path / "two")
    async with running(driver, one) as first, running(driver, two) as second:
        for machine, fork in ((first, one), (second, two)):
            assert await machine.status() is MachineStatus.PAUSED
            await machine.resume()
            # A whole round of pages: one that was captured wrongly would be found.
            found, number = await counted(fork, more_than=at_capture + 300)
            assert found == nonce
        assert number > seen
        await first.pause()
        again = await capture(first, one, tmp_path / "again")
    assert captured.memory_image.read_bytes() == before
    assert again.memory_image.stat().st_blocks <= captured.memory_image.stat().st_blocks + 4096
    third = fork_of(again, tmp_path / "third")
    async with running(driver, third) as machine:
        await machine.resume()
        assert (await counted(third, more_than=number))[0] == nonce


async def test_a_vmm_outlives_us_and_is_adopted(driver: Driver, tiny: Path, tmp_path: Path) -> None:
    source = resources_of(tmp_path / "source", tiny)
    async with running(driver, source) as machine:
        _, seen = await counted(source)
        await machine.close()
        assert processes_naming(source.directory) == [machine.process.pid]
        adopted = await driver.adopt(machine.process, source)
        try:
            assert adopted.writes_memory == machine.writes_memory
            assert await adopted.status() is MachineStatus.RUNNING
            await counted(source, more_than=seen)
        finally:
            await adopted.kill()
        with pytest.raises(VmmFailure):
            await driver.adopt(machine.process, source)


async def test_bad_state_is_refused_and_nothing_left(
    driver: Driver, tiny: Path, tmp_path: Path
) -> None:
    source = resources_of(tmp_path / "source", tiny)
    async with running(driver, source) as machine:
        await counted(source)
        await machine.pause()
        captured = await capture(machine, source, tmp_path / "captured")
    assert captured.device_state is not None
    whole = captured.device_state.read_bytes()
    captured.device_state.write_bytes(whole[: len(whole) // 2])
    fork = fork_of(captured, tmp_path / "fork")
    with pytest.raises(Exception, match=r"\w"):
        await driver.start(SPEC, fork)
    assert [path for path in fork.directory.iterdir() if path.is_socket()] == []


async def test_a_vmm_that_dies_is_noticed_at_each_step(
    driver: Driver, tiny: Path, tmp_path: Path
) -> None:
    source = resources_of(tmp_path / "source", tiny)
    async with running(driver, source) as machine:
        await counted(source)
        await machine.pause()
        os.kill(machine.process.pid, 9)
        await asyncio.wait_for(machine.wait_exit(), DEADLINE)
        for step in (machine.pause(), machine.resume(), machine.status()):
            with pytest.raises(VmmFailure):
                await step
        with pytest.raises(VmmFailure):
            await machine.save_devices(tmp_path / "devices", source.memory_image)


async def test_cloud_hypervisor_writes_no_memory_and_empties_no_log(
    driver: Driver, tiny: Path, tmp_path: Path
) -> None:
    if driver.hypervisor is not Hypervisor.CLOUD_HYPERVISOR:
        pytest.skip("another VMM")
    source = resources_of(tmp_path / "source", tiny)
    async with running(driver, source) as machine:
        nonce, _ = await counted(source, more_than=2)
        await machine.pause()
        before = written_by(machine)
        captured = await capture(machine, source, tmp_path / "captured")
        assert written_by(machine) - before < 1 << 20
        # It goes on after a snapshot that ended early, and can be captured again.
        await machine.resume()
        await counted(source, more_than=(await counted(source))[1])
        await machine.pause()
        await machine.save_devices(tmp_path / "again")
        # No name leads out of its directory: what it has opened is all it will.
        assert [path for path in source.directory.iterdir() if path.is_symlink()] == []
    assert captured.device_state is not None
    assert os.fsencode(tmp_path) not in captured.device_state.read_bytes()
    said = source.console_log.read_bytes()  # a line for each number
    here = replace(source, device_state=captured.device_state, memory_image=captured.memory_image)
    async with running(driver, here) as machine:
        await machine.resume()
        assert (await counted(here, more_than=said.count(b"\n")))[0] == nonce
    assert source.console_log.read_bytes().startswith(said)
    with pytest.raises(VmmFailure, match="of another VM"):
        await driver.start(replace(SPEC, vcpus=2), here)


async def test_cloud_hypervisor_opens_nothing_but_its_own(
    driver: Driver, tiny: Path, tmp_path: Path
) -> None:
    if driver.hypervisor is not Hypervisor.CLOUD_HYPERVISOR:
        pytest.skip("another VMM")
    if landlock_version() < 3:
        pytest.skip("this kernel has no Landlock")
    source = resources_of(tmp_path / "source", tiny)
    create_sparse(source.directory / "own", 1 << 20)
    create_sparse(tmp_path / "foreign", 1 << 20)
    async with running(driver, source) as machine:
        assert isinstance(machine, CloudHypervisorMachine)
        for path, refused in (("own", False), (str(tmp_path / "foreign"), True)):
            body = {"path": path, "image_type": "Raw"}
            adding = machine.call(Call("PUT", "/api/v1/vm.add-disk", body))
            if refused:
                with pytest.raises(VmmFailure, match="Permission denied"):
                    await adding
            else:
                await adding


def written_by(machine: Machine) -> int:
    """Bytes that the VMM has written so far, to whatever (/proc/PID/io of proc(5))."""
    text = Path(f"/proc/{machine.process.pid}/io").read_text()
    return int(text.split("wchar: ")[1].split()[0])


async def test_forks_have_a_network_of_their_own_that_goes_with_them(
    driver: Driver, tiny: Path, tmp_path: Path
) -> None:
    if hindrance() is not None:
        pytest.skip(str(hindrance()))
    spec = replace(SPEC, network=True)
    source = resources_of(tmp_path / "source", tiny)
    async with running(driver, source, spec) as machine:
        nonce, _ = await counted(source)
        assert processes_naming(source.directory) == [machine.process.pid]
        await machine.pause()
        captured = await capture(machine, source, tmp_path / "captured")
        _, at_capture = await counted(source)
        fork = fork_of(captured, tmp_path / "fork")
        # While the first still holds its own, which has the same name.
        async with running(driver, fork, spec) as other:
            await other.resume()
            assert (await counted(fork, more_than=at_capture))[0] == nonce
            pids = [os.getpid(), machine.process.pid, other.process.pid]
            assert len({Path(f"/proc/{pid}/ns/net").readlink() for pid in pids}) == 3
            for pid in pids[1:]:
                assert "CapEff:\t0000000000000000\n" in Path(f"/proc/{pid}/status").read_text()
            [uplink] = children(other.process.pid)
            watch = Watch([uplink])
            os.kill(other.process.pid, 9)
            await asyncio.wait_for(other.wait_exit(), DEADLINE)
            watch.wait_all()
            await other.kill()
            again = fork_of(captured, tmp_path / "again")
            async with running(driver, again, spec) as third:
                await third.resume()
                assert (await counted(again, more_than=at_capture))[0] == nonce
                await third.pause()
                twice = await capture(third, again, tmp_path / "twice")
                _, at_capture = await counted(again)
        [uplink] = children(machine.process.pid)
        watch = Watch([uplink])
    watch.wait_all()
    last = fork_of(twice, tmp_path / "last")
    async with running(driver, last, spec) as machine:
        await machine.resume()
        assert (await counted(last, more_than=at_capture))[0] == nonce
    assert kill_orphans(tmp_path, ()) == []


async def rates_told(machine: Machine) -> list[int]:
    """The limits that the VMM tells of its disk and of its network device, if there is one."""
    assert isinstance(machine, HttpMachine)
    cloud = isinstance(machine, CloudHypervisorMachine)
    told = await machine.call(Call("GET", "/api/v1/vm.info" if cloud else "/vm/config"))
    config = told["config"] if cloud else told
    devices = [*config["disks" if cloud else "drives"]]
    devices += config.get("net" if cloud else "network-interfaces") or ()
    names = ("rate_limiter_config", "rate_limiter", "rx_rate_limiter", "tx_rate_limiter")
    limiters = [device[name] for device in devices for name in names if device.get(name)]
    assert {limiter["bandwidth"]["refill_time"] for limiter in limiters} == {1000}
    return [limiter["bandwidth"]["size"] for limiter in limiters]


@pytest.mark.parametrize("network", [False, True])
async def test_limits_hold_from_the_boot_on_and_after_a_load_whatever_state_says(
    driver: Driver, tiny: Path, tmp_path: Path, network: bool
) -> None:
    if network and (reason := hindrance()):
        pytest.skip(reason)
    spec = replace(SPEC, network=network)
    limits = DeviceLimits(disk=5_000_000, download=1_000_000, upload=1_000_000)
    source = replace(resources_of(tmp_path / "source", tiny), limits=limits)
    # Firecracker tells a figure for either direction, Cloud Hypervisor the one for both.
    directions = 2 if driver.hypervisor is Hypervisor.FIRECRACKER else 1
    async with running(driver, source, spec) as machine:
        assert await rates_told(machine) == [5_000_000, *[1_000_000] * network * directions]
        await machine.pause()
        captured = await capture(machine, source, tmp_path / "captured")
    limits = DeviceLimits(disk=6_000_000, download=2_000_000, upload=2_000_000)
    fork = replace(fork_of(captured, tmp_path / "fork"), limits=limits)
    async with running(driver, fork, spec) as machine:
        await machine.resume()
        assert await rates_told(machine) == [6_000_000, *[2_000_000] * network * directions]


async def test_firecracker_lives_in_a_tree_of_its_own(
    driver: Driver, tiny: Path, tmp_path: Path
) -> None:
    if driver.hypervisor is not Hypervisor.FIRECRACKER:
        pytest.skip("another VMM")
    deep = tmp_path / ("long" * 20) / ("name" * 20)  # beyond what fits a socket's address
    deep.mkdir(parents=True)
    source = resources_of(deep / "source", tiny)
    async with running(driver, source) as machine:
        await counted(source)
        root = Path(f"/proc/{machine.process.pid}/root")
        assert not (root / "etc").exists()
        assert not (root / "proc").exists()
        assert (root / "disk0").samefile(source.disks[0].path)
        assert processes_naming(source.directory) == [machine.process.pid]
        await machine.pause()
        captured = await capture(machine, source, deep / "captured")
    assert captured.device_state is not None
    state = captured.device_state.read_bytes()
    assert os.fsencode(tmp_path) not in state
    assert b"/disk0" in state
    fork = fork_of(captured, deep / "fork")
    with pytest.raises(VmmFailure, match="of a VM with 1 vCPUs"):
        await driver.start(replace(SPEC, vcpus=2), fork)
    assert kill_orphans(tmp_path, ()) == []
    assert not (fork.directory / "jail").exists()


async def test_much_memory_is_mapped_in_parts(driver: Driver, tiny: Path, tmp_path: Path) -> None:
    large = replace(SPEC, memory_bytes=4 << 30)
    source = resources_of(tmp_path / "source", tiny)
    os.truncate(source.memory_image, large.memory_bytes)
    async with running(driver, source, large) as machine:
        nonce, _ = await counted(source, more_than=300)
        await machine.pause()
        captured = await capture(machine, source, tmp_path / "captured")
        _, at_capture = await counted(source)
    assert captured.memory_image.stat().st_size == large.memory_bytes
    assert captured.memory_image.stat().st_blocks * 512 < 8 << 20  # what was touched, and no more
    fork = fork_of(captured, tmp_path / "fork")
    async with running(driver, fork, large) as machine:
        await machine.resume()
        assert (await counted(fork, more_than=at_capture))[0] == nonce
        await machine.pause()
        again = await capture(machine, fork, tmp_path / "again")
        _, at_capture = await counted(fork)
    third = fork_of(again, tmp_path / "third")
    async with running(driver, third, large) as machine:
        await machine.resume()
        assert (await counted(third, more_than=at_capture + 300))[0] == nonce


RESETS = """
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad _start
    .text
    .code32
    .globl _start
_start:
    movb $0xfe, %al
    outb %al, $0x64
1:  jmp 1b
    .section .note.GNU-stack, "", @progbits
"""


POWERS_OFF = RESETS.replace("movb $0xfe, %al", "movw $0x600, %dx; movb $0x34, %al").replace(
    "outb %al, $0x64", "outb %al, %dx"
)


async def test_cloud_hypervisor_tells_that_its_guest_powered_off(
    driver: Driver, tmp_path: Path
) -> None:
    if driver.hypervisor is not Hypervisor.CLOUD_HYPERVISOR:
        pytest.skip("another VMM")
    (tmp_path / "off.S").write_text(POWERS_OFF)  # by ACPI's sleep control register
    kernel = assembled(tmp_path / "off.S", tmp_path / "off")
    source = resources_of(tmp_path / "of a, b", kernel)
    async with running(driver, source) as machine:
        await asyncio.wait_for(machine.wait_exit(), DEADLINE)
        assert machine.shutdown_reason == "guest-shutdown"
    assert "rror" not in source.vmm_log.read_text()


async def test_a_guest_that_resets_ends_its_vmm(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "resets.S").write_text(RESETS)
    kernel = assembled(tmp_path / "resets.S", tmp_path / "resets")
    source = resources_of(tmp_path / "source", kernel)
    async with running(driver, source) as machine:
        await asyncio.wait_for(machine.wait_exit(), DEADLINE)
        assert machine.shutdown_reason == "guest-reset"
    if driver.hypervisor is Hypervisor.FIRECRACKER:
        assert "exit_code=0" in source.vmm_log.read_text()
    assert not (source.directory / "jail").exists()
