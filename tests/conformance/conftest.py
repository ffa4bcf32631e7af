"""Every driver behind one adapter, and the conformance table at the end of the run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from stillframe.guest.connection import AgentConnection
from stillframe.guest.exec import start_exec
from stillframe.host.capture import BufferBudget, MemoryCapture
from stillframe.host.files import clone, create_sparse
from stillframe.host.image import open_private
from stillframe.host.memory import GuestMemory
from stillframe.host.orphans import kill_orphans, processes_naming
from stillframe.images.base import find_busybox
from stillframe.images.boot import BootPair, build_boot_pair, write_config_disk
from stillframe.model.values import CONTRACT_HYPERVISORS, DeviceLimits, Hypervisor
from stillframe.vmm.driver import (
    Disk,
    Driver,
    Machine,
    MachineResources,
    MachineSpec,
    without_driver,
)
from stillframe.vmm.drivers import make_drivers
from stillframe.vmm.fake.driver import FakeDriver

ROOT = Path(__file__).resolve().parents[2]
KERNEL = Path(os.environ.get("STILLFRAME_KERNEL_DIR", ROOT / ".cache/kernel"))
AGENT = ROOT / "agent/build/stillframe-init"
TRACKER = ROOT / "tracker/build/libstillframe-tracker.so"
TOOLS = ("mksquashfs", "mkfs.ext4")
MEMORY = 256 << 20
UNLIMITED = DeviceLimits()
BOOT_DEADLINE = 120.0
# A counter kept by a shell's loop, the same question asked of both.
_COUNTING = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/n; sleep 0.02; done"
# The agent is there before the workload, and the file is empty for a moment at each count.
_COUNTED = 'until n=$(cat /dev/shm/n 2>/dev/null) && [ -n "$n" ]; do sleep 0.02; done; echo $n'
_COUNTER = {True: ("/bin/sh", "-c", _COUNTED), False: ("counter",)}
_KEEP = {True: ("/bin/sh", "-c", "echo {} > /dev/shm/kept"), False: ("set", "fork", "{}")}
_KEPT = {True: ("cat", "/dev/shm/kept"), False: ("get", "fork")}
_CAPTURED: dict[str, MachineResources] = {}  # by hypervisor, for this run of the tests
_OUTCOMES = pytest.StashKey[dict[tuple[str, str], str]]()


class Bench:
    """One driver, and the files of one VM family below ``directory``."""

    def __init__(
        self,
        driver: Driver,
        directory: Path,
        pair: BootPair,
        root: Path,
        shared: Path | None = None,
    ) -> None:
        """``shared`` outlives the bench: what ``captured_guest`` makes is kept there."""
        self.driver = driver
        self._shared = shared
        self.name = driver.hypervisor.value
        self.real = driver.hypervisor is not Hypervisor.FAKE  # has a guest kernel
        self.directory = directory
        self._pair, self._root = pair, root

    @property
    def tracks_writes(self) -> bool:
        """Whether this kernel can track writes to guest memory (Linux 6.7)."""
        release = platform.release().split(".")
        return (int(release[0]), int(release[1])) >= (6, 7)

    async def spec(self, vcpus: int = 1) -> MachineSpec:
        """The VM's shape, with the accelerator that works here."""
        probe = await self.driver.probe()
        assert probe.available, probe.reason
        return MachineSpec(MEMORY, vcpus, probe.accelerator, network=False)

    def resources(self, name: str) -> MachineResources:
        """Fresh files of a cold VM."""
        home = self.directory / name
        home.mkdir()
        create_sparse(home / "memory", MEMORY)
        create_sparse(home / "overlay", 64 << 20)
        if self.real:
            subprocess.run(["mkfs.ext4", "-q", home / "overlay"], check=True, timeout=60)
        command = ["/bin/sh", "-c", _COUNTING] if self.real else ["sleep", "100000"]
        pairs = [("arg", part) for part in command]
        write_config_disk(
            home / "config", [*pairs, ("hostname", name), ("nonce", "n1"), ("seed", "5a" * 64)]
        )
        return MachineResources(
            directory=home,
            memory_image=home / "memory",
            disks=(
                Disk(self._root, readonly=True),
                Disk(home / "overlay", readonly=False),
                Disk(home / "config", readonly=True),
            ),
            kernel=self._pair.kernel,
            initrd=self._pair.initrd,
            kernel_arguments=self._pair.arguments,
            generation_id=uuid.uuid4(),
            console_log=home / "console.log",
            vmm_log=home / "vmm.log",
        )

    def fork_of(self, captured: MachineResources, name: str) -> MachineResources:
        """Resources of a fork: the captured image itself, own disks, own sockets."""
        home = self.directory / name
        home.mkdir()
        clone(captured.disks[1].path, home / "overlay")
        root, _, config = captured.disks
        return replace(
            captured,
            directory=home,
            disks=(root, Disk(home / "overlay", readonly=False), config),
            generation_id=uuid.uuid4(),
            console_log=home / "console.log",
            vmm_log=home / "vmm.log",
        )

    async def capture(self, machine: Machine, resources: MachineResources) -> MachineResources:
        """Image, devices and overlay of a paused VM, as files of their own."""
        home = self.directory / f"captured-{uuid.uuid4().hex[:6]}"
        home.mkdir()
        pid, image = machine.process.pid, resources.memory_image
        clone(image, home / "memory")
        await machine.save_devices(
            home / "devices", home / "memory" if machine.writes_memory else None
        )
        clone(resources.disks[1].path, home / "overlay")
        if not machine.writes_memory:
            with GuestMemory(pid, image) as memory, open_private(home / "memory") as fd:
                assert memory.private_pages().total > 0
                taken = MemoryCapture(memory, fd, incremental=False, budget=BufferBudget(MEMORY))
                taken.ahead()
                taken.still()
                taken.after()
        root, _, config = resources.disks
        return replace(
            resources,
            memory_image=home / "memory",
            device_state=home / "devices",
            disks=(root, Disk(home / "overlay", readonly=False), config),
        )

    async def captured_guest(self) -> MachineResources:
        """A captured guest, for tests that are about its forks: booted once for all of them.

        It remembers the word ``before``, and has a file ``/both`` if it has a disk. Nobody may
        write its files; that nobody does is what a fork is.
        """
        assert self._shared is not None
        if self.name not in _CAPTURED:
            maker = Bench(self.driver, self._shared, self._pair, self._root)
            async with maker.booted(self.name) as (machine, resources):
                async with maker.agent(machine) as connection:
                    await maker.keep(connection, "before")
                    if maker.real:
                        await maker.run(connection, "/bin/sh", "-c", "echo both > /both; sync")
                await machine.pause()
                _CAPTURED[self.name] = await maker.capture(machine, resources)
        return _CAPTURED[self.name]

    @contextlib.asynccontextmanager
    async def booted(
        self, name: str, vcpus: int = 1, *, limits: DeviceLimits = UNLIMITED
    ) -> AsyncIterator[tuple[Machine, MachineResources]]:
        """A cold-booted VM, killed at the end."""
        resources = replace(self.resources(name), limits=limits)
        async with self.running(await self.spec(vcpus), resources) as machine:
            yield machine, resources

    @contextlib.asynccontextmanager
    async def running(
        self, spec: MachineSpec, resources: MachineResources
    ) -> AsyncIterator[Machine]:
        """A started VM, killed at the end."""
        machine = await self.driver.start(spec, resources)
        try:
            yield machine
        finally:
            await machine.kill()

    @contextlib.asynccontextmanager
    async def agent(self, machine: Machine) -> AsyncIterator[AgentConnection]:
        """A greeted agent, hung up on at the end."""
        stream = await machine.dial_agent()
        connection = await AgentConnection.open(stream, deadline=BOOT_DEADLINE)
        try:
            yield connection
        finally:
            await connection.close()

    async def run(self, connection: AgentConnection, *command: str) -> str:
        """The output of a command that must succeed."""
        session = await start_exec(connection, command, timeout=60)
        output = b"".join([data async for _, data in session.output()]).decode()
        assert await session.wait() == 0, output
        return output.strip()

    async def counter(self, connection: AgentConnection) -> int:
        """What the guest has counted to."""
        return int(await self.run(connection, *_COUNTER[self.real]))

    async def keep(self, connection: AgentConnection, value: str) -> None:
        """Have the guest remember a word in its memory."""
        await self.run(connection, *(part.format(value) for part in _KEEP[self.real]))

    async def kept(self, connection: AgentConnection) -> str:
        """The word it remembers."""
        return await self.run(connection, *_KEPT[self.real])

    async def fill(self, connection: AgentConnection) -> str:
        """Fill some of the guest's memory with random bytes; their checksum."""
        if not self.real:
            await self.run(connection, "set", "blob", uuid.uuid4().hex)
        else:
            make = "head -c 8388608 /dev/urandom > /dev/shm/blob"
            await self.run(connection, "/bin/sh", "-c", make)
        return await self.filled(connection)

    async def filled(self, connection: AgentConnection) -> str:
        """The checksum of what ``fill`` wrote, taken by the guest."""
        if not self.real:
            return await self.run(connection, "get", "blob")
        return await self.run(connection, "sha256sum", "/dev/shm/blob")

    def processes(self) -> list[int]:
        """Processes that work on this bench's files."""
        return processes_naming(self.directory)


@pytest.fixture(scope="session")
def guest_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[BootPair, Path]:
    """Kernel, initrd and a busybox root image for every real guest, made once."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    missing += [str(path) for path in (KERNEL, AGENT) if not path.exists()]
    if missing:
        pytest.skip(f"missing: {', '.join(missing)}")
    home = tmp_path_factory.mktemp("guest")
    binaries = home / "root/bin"
    binaries.mkdir(parents=True)
    shutil.copy(find_busybox(), binaries / "busybox")
    programs = "sh cat dd sleep nproc reboot poweroff sync head hostname sha256sum"
    for name in programs.split():
        (binaries / name).symlink_to("busybox")
    for name in ("dev", "proc", "sys", "etc", "tmp", "run"):
        (home / "root" / name).mkdir()
    (home / "root/dev/shm").mkdir()
    command = ["mksquashfs", str(home / "root"), str(home / "root.img"), "-quiet", "-no-progress"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return build_boot_pair(KERNEL, AGENT, home / "boot"), home / "root.img"


@pytest.fixture(scope="session")
def captured_guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where captured guests are kept while the tests run."""
    yield tmp_path_factory.mktemp("captured")
    _CAPTURED.clear()


def real_drivers() -> dict[str, Driver]:
    """Every hypervisor but the fake one, by name."""
    made = make_drivers(
        os.environ.get("STILLFRAME_QEMU_BINARY", "qemu-system-x86_64"),
        # Which accelerator works is the probe's question, not this suite's.
        os.environ.get("STILLFRAME_ACCELERATOR", "tcg"),
        ROOT / ".cache",
        firecracker_binary=os.environ.get("STILLFRAME_FIRECRACKER_BINARY", "firecracker"),
        cloud_hypervisor_binary=os.environ.get(
            "STILLFRAME_CLOUD_HYPERVISOR_BINARY", "cloud-hypervisor"
        ),
        tracker=TRACKER,
    )
    return {driver.hypervisor.value: driver for driver in made}


# All of the contract, so that one without a driver is a column that says so.
NAMES = ("fake", *(name.value for name in CONTRACT_HYPERVISORS))


@pytest.fixture(
    params=[NAMES[0], *(pytest.param(name, marks=pytest.mark.vm) for name in NAMES[1:])]
)
def bench(request: pytest.FixtureRequest, tmp_path: Path, captured_guests: Path) -> Iterator[Bench]:
    """Each driver in turn; no process is left, however the test ended."""
    if request.param == "fake":
        null, root = Path("/dev/null"), tmp_path / "root"
        pair, driver = BootPair("", null, null, ""), cast(Driver, FakeDriver(tracker=TRACKER))
        root.touch()
    else:
        found = real_drivers().get(request.param)
        if found is None:
            pytest.skip(str(without_driver(Hypervisor(request.param)).reason))
        driver = found
        probe = asyncio.run(driver.probe())
        if not probe.available:
            pytest.skip(probe.reason or "not available")
        pair, root = request.getfixturevalue("guest_files")
    yield Bench(driver, tmp_path, pair, root, captured_guests)
    left = kill_orphans(tmp_path, ()) + kill_orphans(captured_guests, ())
    assert left == [], f"processes left behind: {left}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note how each case ended, for the table."""
    report = yield
    callspec = getattr(item, "callspec", None)
    if callspec is None or "bench" not in callspec.params:
        return report
    outcomes = item.config.stash.setdefault(_OUTCOMES, {})
    case = item.name.partition("[")[0].removeprefix("test_").replace("_", " ")
    rest = [str(value) for key, value in callspec.params.items() if key != "bench"]
    key = (" ".join([case, *rest]), str(callspec.params["bench"]))
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped"
        outcomes[key] = reason.removeprefix("Skipped: ")
    elif report.failed:
        outcomes[key] = "FAILED"
    elif report.when == "call":
        outcomes[key] = "passed"
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Driver by case: passed, failed, or why it was skipped."""
    outcomes = config.stash.get(_OUTCOMES, {})
    if not outcomes:
        return
    cases = list(dict.fromkeys(case for case, _ in outcomes))
    width = max(map(len, cases)) + 2
    columns = {name: max(len(name), 7) + 2 for name in NAMES}
    reasons: dict[str, set[str]] = {}
    terminalreporter.section("driver conformance")
    heads = "".join(f"{name:<{column}}" for name, column in columns.items())
    terminalreporter.write_line(" " * width + heads)
    for case in cases:
        row = ""
        for name, column in columns.items():
            outcome = outcomes.get((case, name), "not run")
            if outcome not in ("passed", "FAILED", "not run"):
                reasons.setdefault(name, set()).add(outcome)
                outcome = "skipped"
            row += f"{outcome:<{column}}"
        terminalreporter.write_line(f"{case:<{width}}{row}")
    for name, texts in reasons.items():
        for text in sorted(texts):
            terminalreporter.write_line(f"{name} was skipped: {text}")
