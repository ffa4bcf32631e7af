"""QEMU (6.2 or newer) on q35 and microvm: every guest is a private mapping of its memory image.

Saving devices without RAM is the QAPI command ``xen-save-devices-state`` (generic despite its
name); loading them is an ordinary incoming migration whose stream simply has no RAM section.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillframe.host.files import atomic_write
from stillframe.host.probes import kvm_hindrance, kvm_works
from stillframe.host.process import Process, adopt, run, spawn
from stillframe.host.sockets import bind_unix, connect_socket, connect_unix
from stillframe.model.errors import HostFailure, MissingComponent, VmmFailure
from stillframe.model.values import Hypervisor, ProcessIdentity
from stillframe.vmm.driver import (
    AgentStream,
    DriverProbe,
    Limit,
    MachineResources,
    MachineSpec,
    MachineStatus,
    check_shape,
)
from stillframe.vmm.logs import explained
from stillframe.vmm.probing import ProbeOnce, features
from stillframe.vmm.qemu.boards import BOARDS
from stillframe.vmm.qemu.command import QemuBuild, command_line
from stillframe.vmm.qemu.copies import DiskCopies
from stillframe.vmm.qemu.qmp import Event, QmpConnection
from stillframe.vmm.tracking import tracking_environment
from stillframe.vmm.versions import refuse_known_bad

log = logging.getLogger("stillframe.qemu")
_LOAD_DEADLINE = 60.0  # seconds
_FAILURE_KEPT = 3600.0  # seconds that it is remembered that KVM runs no guests
_STATUS = {
    "running": MachineStatus.RUNNING,
    "paused": MachineStatus.PAUSED,
    "prelaunch": MachineStatus.PAUSED,
    "postmigrate": MachineStatus.PAUSED,
    "save-vm": MachineStatus.PAUSED,
    "io-error": MachineStatus.PAUSED,
    "shutdown": MachineStatus.SHUTDOWN,
    "guest-panicked": MachineStatus.SHUTDOWN,
}
_VERSION = re.compile(rb"version (\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class _Sockets:
    """The sockets in a VM's directory."""

    directory: Path

    @property
    def monitor(self) -> Path:
        return self.directory / "qmp.sock"

    @property
    def agent(self) -> Path:
        return self.directory / "agent.sock"

    def remove(self) -> None:
        for path in (self.monitor, self.agent):
            with contextlib.suppress(OSError):  # nobody listens there: it is only a name
                path.unlink(missing_ok=True)


class QemuMachine:
    """One QEMU process. Implements ``Machine``."""

    def __init__(self, process: Process, sockets: _Sockets) -> None:
        """Use ``open`` before anything else."""
        self.process: ProcessIdentity = process.identity
        self.shutdown_reason: str | None = None
        self.lacks_space = asyncio.Event()
        self.writes_memory = False
        self._process = process
        self._sockets = sockets
        self._qmp = QmpConnection(f"pid {process.identity.pid}", self._on_event)
        self._copies = DiskCopies(self._qmp)
        self._loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self) -> None:
        """Connect to the monitor. Raises VmmFailure."""
        await self._qmp.open(connect_socket(self._sockets.monitor))

    def _on_event(self, event: Event) -> None:
        match event["event"]:
            case "SHUTDOWN":
                self.shutdown_reason = event["data"]["reason"]
            case "BLOCK_IO_ERROR" if event["data"].get("nospace"):
                if event["data"]["action"] == "stop":
                    self.lacks_space.set()
            case "RESUME":
                self.lacks_space.clear()
            case "BLOCK_JOB_COMPLETED":
                self._copies.completed(event["data"])
            case "MIGRATION" if not self._loaded.done():
                status = event["data"]["status"]
                if status == "completed":
                    self._loaded.set_result(None)
                elif status == "failed":
                    self._loaded.set_exception(VmmFailure("QEMU could not load the device state"))

    async def forget_copies(self) -> None:
        """Drop disk copies that an earlier server began: they hold files that are gone."""
        await self._copies.forget_all()

    async def loaded(self) -> None:
        """Wait for the end of the load that QEMU began by itself (``-incoming fd:``).

        Raises VmmFailure. A QEMU that cannot load ends.
        """
        answer = await self._qmp.execute("query-migrate")
        if answer.get("status") != "completed":
            await self._until_loaded()

    async def _until_loaded(self) -> None:
        died = asyncio.ensure_future(self._process.wait())
        try:
            done, _ = await asyncio.wait(
                [self._loaded, died],
                timeout=_LOAD_DEADLINE,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if self._loaded in done:
                self._loaded.result()
            elif died in done:
                raise VmmFailure("QEMU ended while it loaded the device state")
            else:
                raise VmmFailure(f"QEMU did not load within {_LOAD_DEADLINE:.0f} s")
        finally:
            died.cancel()
            self._loaded.cancel()

    async def status(self) -> MachineStatus:
        """Ask QEMU what its guest is doing (QMP query-status)."""
        answer = await self._qmp.execute("query-status")
        return _STATUS.get(answer["status"], MachineStatus.UNKNOWN)

    async def pause(self) -> None:
        """Stop the vCPUs; QEMU also drains and flushes the disks (QMP stop)."""
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        """Let the vCPUs run (QMP cont)."""
        await self._qmp.execute("cont")

    async def save_devices(self, destination: Path, memory: Path | None = None) -> None:
        """Write device state of a paused guest; ``live=false`` leaves its disks active."""
        await self._qmp.execute("xen-save-devices-state", filename=str(destination), live=False)

    async def begin_disk_copy(self, index: int, copy: Path) -> bool:
        """Add a dirty bitmap to the disk, and the copy as a block node (QMP blockdev-add)."""
        await self._copies.begin(index, copy)
        return True

    async def finish_disk_copy(self, index: int) -> None:
        """Copy what the bitmap names, to the end (QMP blockdev-backup, sync=bitmap)."""
        await self._copies.finish(index)

    async def end_disk_copy(self, index: int) -> None:
        """Remove bitmap and node."""
        await self._copies.end(index)

    async def dial_agent(self) -> AgentStream:
        """Connect to the guest agent's port."""
        return await connect_unix(self._sockets.agent)

    async def power_button(self) -> None:
        """Press the ACPI power button (QMP system_powerdown)."""
        await self._qmp.execute("system_powerdown")

    async def kill(self) -> None:
        """SIGKILL QEMU, prove its death and remove its sockets."""
        await self._process.kill()
        await self._qmp.close()
        self._sockets.remove()

    async def wait_exit(self) -> None:
        """Return when QEMU is gone."""
        await self._process.wait()

    async def close(self) -> None:
        """Drop the connection; QEMU runs on."""
        await self._qmp.close()
        self._process.close()


class QemuDriver:
    """One of QEMU's machines. Implements ``Driver``."""

    limits = frozenset({Limit.DISK})  # its user-mode network has no limit

    def __init__(
        self,
        binary: str = "qemu-system-x86_64",
        accelerator: str = "auto",
        cache_dir: Path | None = None,
        tracker: Path | None = None,
        hypervisor: Hypervisor = Hypervisor.QEMU,
    ) -> None:
        """``accelerator``: auto, kvm or tcg; ``cache_dir`` keeps what a probe found for a while.

        ``tracker`` is the library that has writes to guest memory tracked, if there is one;
        ``hypervisor`` names the machine: ``qemu`` is q35, ``qemu-microvm`` microvm.
        """
        self.hypervisor = hypervisor
        self._board = BOARDS[hypervisor]
        self._tracker = tracker
        self._binary = binary
        self._accelerator = accelerator
        self._cache_dir = cache_dir
        self._probed = ProbeOnce(hypervisor, self._look)
        self._build: QemuBuild | None = None
        self._against_kvm: str | None = None

    async def probe(self) -> DriverProbe:
        """Find the binary, its version and an accelerator that really runs guests."""
        return await self._probed()

    async def _look(self) -> DriverProbe:
        build = self._build = await self._examine()
        return DriverProbe(
            self.hypervisor, True, build.version_text, build.accelerator, build.processor,
            features(self.limits), reason=self._against_kvm,
        )  # fmt: skip

    async def _examine(self) -> QemuBuild:
        binary = shutil.which(self._binary)
        if binary is None:
            raise MissingComponent(
                f"{self._binary} is not installed", hint="apt-get install qemu-system-x86"
            )
        printed = (await run([binary, "--version"], timeout=30)).stdout
        match = _VERSION.search(printed)
        if match is None:
            raise VmmFailure(f"{binary} does not tell its version")
        major, minor, micro = (int(part) for part in match.groups())
        refuse_known_bad(self.hypervisor, (major, minor, micro))
        accelerator = await self._choose_accelerator(binary)
        return QemuBuild(binary, (major, minor, micro), accelerator, self._board)

    async def _choose_accelerator(self, binary: str) -> str:
        if self._accelerator != "auto":
            return self._accelerator
        self._against_kvm = kvm_hindrance()
        if self._against_kvm is None:
            self._against_kvm = await self._tried(binary)
        if self._against_kvm is None:
            return "kvm"
        log.info("guests of %s are emulated: %s", self.hypervisor.value, self._against_kvm)
        return "tcg"

    async def _tried(self, binary: str) -> str | None:
        """Why KVM runs no guests though its device opens; None if it does.

        Trying may take seconds, so the finding is remembered: that it works, for this boot of the
        host; that it does not, only for a while, for the host may just have been busy.
        """
        kept = self._remembered(binary)
        with contextlib.suppress(OSError):
            if kept is not None:
                reason = kept.read_text()
                if not reason or time.time() - kept.stat().st_mtime < _FAILURE_KEPT:
                    return reason or None
        works, reason = await asyncio.to_thread(kvm_works, binary)
        if kept is not None:
            with contextlib.suppress(OSError):  # the next start merely probes again
                kept.parent.mkdir(mode=0o700, exist_ok=True)
                atomic_write(kept, b"" if works else reason.encode())
        return None if works else reason

    def _remembered(self, binary: str) -> Path | None:
        """Where the finding for this very binary, on this boot of the host, is kept."""
        if self._cache_dir is None:
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        changed = Path(binary).stat().st_mtime_ns
        return self._cache_dir / f"kvm-{boot}-{changed}"

    async def start(self, spec: MachineSpec, resources: MachineResources) -> QemuMachine:
        """Spawn QEMU; with device state, load it and stand still. Nothing is left on failure."""
        build = await self._available()
        check_shape(spec, resources.memory_image)
        sockets = _Sockets(resources.directory)
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(sockets.remove)
            process = await asyncio.to_thread(
                _spawn, build, spec, resources, sockets, self._tracker
            )
            machine = QemuMachine(process, sockets)
            undo.push_async_callback(machine.kill)
            try:
                await machine.open()
                if resources.device_state is not None:
                    await machine.loaded()
            except VmmFailure as error:
                raise explained(error, resources.vmm_log, once_more=True) from error
            undo.pop_all()
        return machine

    async def adopt(self, process: ProcessIdentity, resources: MachineResources) -> QemuMachine:
        """Take over a QEMU that an earlier server started. Raises VmmFailure."""
        machine = QemuMachine(adopt(process), _Sockets(resources.directory))
        try:
            await machine.open()
            await machine.forget_copies()
        except BaseException:
            await machine.close()
            raise
        return machine

    async def _available(self) -> QemuBuild:
        probe = await self.probe()
        if self._build is None:
            raise MissingComponent(f"QEMU is not available: {probe.reason}", hint=probe.hint)
        return self._build


def _spawn(
    build: QemuBuild,
    spec: MachineSpec,
    resources: MachineResources,
    sockets: _Sockets,
    tracker: Path | None,
) -> Process:
    """Bind first, pass the descriptors: nobody ever waits for a socket to appear."""
    with _listening(sockets) as (monitor_fd, agent_fd), _opened(resources) as devices_fd:
        arguments = command_line(
            build, spec, resources,
            monitor_fd=monitor_fd, agent_fd=agent_fd, devices_fd=devices_fd,
        )  # fmt: skip
        inherited = [fd for fd in (monitor_fd, agent_fd, devices_fd) if fd is not None]
        return spawn(
            arguments, output=resources.vmm_log, pass_fds=inherited,
            extra_environment=tracking_environment(tracker, resources.memory_image),
        )  # fmt: skip


@contextlib.contextmanager
def _opened(resources: MachineResources) -> Iterator[int | None]:
    """A descriptor of the device state, if there is one: no QEMU needs to be asked to open it."""
    if resources.device_state is None:
        yield None
        return
    try:
        fd = os.open(resources.device_state, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise HostFailure(f"device state cannot be opened: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _listening(sockets: _Sockets) -> Iterator[tuple[int, int]]:
    try:
        with bind_unix(sockets.monitor) as monitor, bind_unix(sockets.agent) as agent:
            yield monitor.fileno(), agent.fileno()
    except OSError as error:
        raise HostFailure(f"the VM's sockets cannot be made: {error.strerror}") from error
