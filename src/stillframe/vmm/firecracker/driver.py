"""Firecracker (1.12 and newer) over its API socket.

A VM that was loaded is a private mapping of its memory image, like every other of ours: its dirty
pages are read from outside, and Firecracker is asked for device state only. After a cold boot its
memory is anonymous, and Firecracker writes all of it.

Firecracker runs in the VM's directory and knows its files by relative names, so that no path within
a snapshot leads to another VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from pathlib import Path

from stillframe.host.capacity import processor
from stillframe.host.process import Process, adopt, run, spawn
from stillframe.host.sockets import connect_socket
from stillframe.host.watch import file_changes
from stillframe.model.errors import MissingComponent, StillframeError, VmmFailure
from stillframe.model.values import Hypervisor, ProcessIdentity
from stillframe.vmm.driver import (
    AgentStream,
    DriverProbe,
    MachineResources,
    MachineSpec,
    MachineStatus,
    check_shape,
)
from stillframe.vmm.firecracker import api
from stillframe.vmm.kernel import uncompressed_kernel
from stillframe.vmm.kvm import kvm_reason
from stillframe.vmm.names import give_names, last_words, remove_names
from stillframe.vmm.unix_http import Call, UnixHttp
from stillframe.vmm.versions import refuse_known_bad
from stillframe.vmm.vsock import AGENT_ARGUMENT, AGENT_VSOCK_PORT, dial_vsock

_API, _VSOCK, _MEMORY, _DEVICES = "api.sock", "vsock.sock", "memory.link", "devices.link"
_START_DEADLINE = 30.0  # seconds until the API answers
_ABOUT_TO_LISTEN = 0.001  # seconds
_AGENT_DEADLINE = 120.0  # seconds for a guest to boot as far as its agent
_FEATURES = ("fork", "pause", "snapshots", "standby")
_VERSION = re.compile(rb"Firecracker v(\d+)\.(\d+)\.(\d+)")
_STATUS = {"Running": MachineStatus.RUNNING, "Paused": MachineStatus.PAUSED}


class FirecrackerMachine:
    """One Firecracker process. Implements ``Machine``."""

    def __init__(self, process: Process, directory: Path, *, loaded: bool) -> None:
        """``loaded``: its memory is a mapping of the image, not anonymous."""
        self.process: ProcessIdentity = process.identity
        self.shutdown_reason: str | None = None
        self.writes_memory = not loaded
        self._process = process
        self._directory = directory
        self._http = UnixHttp(directory / _API, f"Firecracker (pid {process.identity.pid})")

    async def call(self, call: Call) -> object:
        """Send a request. Raises VmmFailure, also when the process has ended."""
        return await self._http.call(call)

    async def status(self) -> MachineStatus:
        """Ask for the state of the VM (GET /)."""
        told = await self._http.call(api.describe())
        return _STATUS.get(told["state"], MachineStatus.UNKNOWN)

    async def pause(self) -> None:
        """Stop the vCPUs (PATCH /vm)."""
        await self._http.call(api.pause())

    async def resume(self) -> None:
        """Let the vCPUs run (PATCH /vm)."""
        await self._http.call(api.resume())

    async def save_devices(self, destination: Path, memory: Path | None = None) -> None:
        """Write device state; all memory too where it is anonymous (PUT /snapshot/create).

        Firecracker cannot leave memory out. What it has noted as dirty since the last time goes
        into memory of ours that is dropped: it is read from outside, where nothing is forgotten.
        """
        if memory is not None:
            call = api.create_snapshot(str(destination), str(memory), diff=False)
            await self._http.call(call)
            return
        dropped = os.memfd_create("stillframe-dropped", os.MFD_CLOEXEC)
        try:
            path = f"/proc/{os.getpid()}/fd/{dropped}"
            await self._http.call(api.create_snapshot(str(destination), path, diff=True))
        finally:
            os.close(dropped)

    async def begin_disk_copy(self, index: int, copy: Path) -> bool:
        """Firecracker does not tell what changes on a disk."""
        return False

    async def finish_disk_copy(self, index: int) -> None:
        """Nothing: no copy is ever under way."""

    async def end_disk_copy(self, index: int) -> None:
        """Nothing: no copy is ever under way."""

    async def dial_agent(self) -> AgentStream:
        """Connect to the agent's vsock port."""
        return await dial_vsock(
            self._directory / _VSOCK, AGENT_VSOCK_PORT, deadline=_AGENT_DEADLINE
        )

    async def power_button(self) -> None:
        """Press Ctrl-Alt-Del (PUT /actions)."""
        await self._http.call(api.power_button())

    async def kill(self) -> None:
        """SIGKILL Firecracker, prove its death and remove its sockets."""
        await self._process.kill()
        await self._http.close()
        remove_names(self._directory)

    async def wait_exit(self) -> None:
        """Return when Firecracker is gone."""
        await self._process.wait()

    async def close(self) -> None:
        """Drop the connection; Firecracker runs on."""
        await self._http.close()
        self._process.close()


class FirecrackerDriver:
    """Firecracker on KVM. Implements ``Driver``."""

    hypervisor = Hypervisor.FIRECRACKER

    def __init__(
        self,
        binary: str = "firecracker",
        *,
        accelerator: str = "auto",
        qemu_binary: str = "qemu-system-x86_64",
    ) -> None:
        """``accelerator``: auto has ``qemu_binary`` try whether KVM runs guests; kvm trusts it."""
        self._binary, self._accelerator, self._qemu = binary, accelerator, qemu_binary
        self._probing = asyncio.Lock()
        self._probe: DriverProbe | None = None
        self._version: api.Version | None = None

    async def probe(self) -> DriverProbe:
        """Find the binary, its version, and whether KVM runs guests here."""
        async with self._probing:
            if self._probe is None:
                try:
                    self._version = await self._examine()
                    self._probe = DriverProbe(
                        self.hypervisor,
                        True,
                        ".".join(map(str, self._version)),
                        "kvm",
                        processor(),
                        _FEATURES,
                    )
                except StillframeError as error:
                    self._probe = DriverProbe(
                        self.hypervisor, False, reason=error.message, hint=error.hint
                    )
            return self._probe

    async def _examine(self) -> api.Version:
        binary = shutil.which(self._binary)
        if binary is None:
            raise MissingComponent(
                f"{self._binary} is not installed", hint="stillframe setup firecracker"
            )
        match = _VERSION.search((await run([binary, "--version"], timeout=30)).stdout)
        if match is None:
            raise VmmFailure(f"{binary} does not tell its version")
        major, minor, micro = (int(part) for part in match.groups())
        refuse_known_bad(self.hypervisor, (major, minor, micro))
        if self._accelerator == "auto":
            reason = await asyncio.to_thread(kvm_reason, self._qemu)
            if reason is not None:
                raise MissingComponent(f"Firecracker needs KVM: {reason}")
        return major, minor, micro

    async def start(self, spec: MachineSpec, resources: MachineResources) -> FirecrackerMachine:
        """Spawn Firecracker; boot, or load and stand still. Nothing is left on failure."""
        probe = await self.probe()
        if self._version is None:
            raise MissingComponent(f"Firecracker is not available: {probe.reason}", hint=probe.hint)
        check_shape(spec, resources.memory_image)
        directory = resources.directory
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(remove_names, directory)
            remove_names(directory)
            others = {_MEMORY: resources.memory_image}
            if resources.device_state is not None:
                others[_DEVICES] = resources.device_state
            names = give_names(resources, others)
            async with file_changes(directory) as changed:
                process = await asyncio.to_thread(
                    spawn,
                    [self._binary, "--api-sock", _API, "--level", "Warning"],
                    output=resources.console_log,
                    cwd=directory,
                )
                machine = FirecrackerMachine(
                    process, directory, loaded=resources.device_state is not None
                )
                undo.push_async_callback(machine.kill)
                try:
                    await _until_listening(directory / _API, process, changed)
                    await self._configure(machine, spec, resources, names)
                except VmmFailure as error:
                    words = last_words(resources.console_log)
                    raise VmmFailure(f"{error.message}{words}", hint=error.hint) from error
            undo.pop_all()
        return machine

    async def _configure(
        self,
        machine: FirecrackerMachine,
        spec: MachineSpec,
        resources: MachineResources,
        disks: list[str],
    ) -> None:
        assert self._version is not None  # noqa: S101 - for the type checker
        if resources.device_state is not None:
            await machine.call(
                api.load_snapshot(self._version, _DEVICES, _MEMORY, vsock_path=_VSOCK)
            )
            return
        kernel = await asyncio.to_thread(uncompressed_kernel, resources.kernel)
        initrd = None if resources.initrd == Path("/dev/null") else str(resources.initrd)
        arguments = f"{resources.kernel_arguments} {AGENT_ARGUMENT}"
        await machine.call(api.machine_config(spec))
        await machine.call(api.boot_source(str(kernel), initrd, arguments))
        for index, (name, disk) in enumerate(zip(disks, resources.disks, strict=True)):
            await machine.call(api.drive(index, name, readonly=disk.readonly))
        await machine.call(api.vsock(_VSOCK))
        await machine.call(api.entropy())
        await machine.call(api.start())

    async def adopt(
        self, process: ProcessIdentity, resources: MachineResources
    ) -> FirecrackerMachine:
        """Take over a Firecracker that an earlier server started. Raises VmmFailure."""
        adopted = adopt(process)
        loaded = await asyncio.to_thread(_maps, process.pid, resources.memory_image)
        machine = FirecrackerMachine(adopted, resources.directory, loaded=loaded)
        try:
            await machine.status()
        except BaseException:
            await machine.close()
            raise
        return machine


async def _until_listening(path: Path, process: Process, changed: asyncio.Event) -> None:
    """Wait until ``process`` listens at ``path``; ``changed`` tells of files made beside it."""
    died = asyncio.ensure_future(process.wait())
    try:
        async with asyncio.timeout(_START_DEADLINE):
            while not _listens(path):
                if died.done():
                    raise VmmFailure("Firecracker ended before it listened")
                if path.exists():  # bound, and about to listen, of which nobody is told
                    await asyncio.sleep(_ABOUT_TO_LISTEN)
                    continue
                waiting = asyncio.ensure_future(changed.wait())
                await asyncio.wait([waiting, died], return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                changed.clear()
    except TimeoutError as error:
        raise VmmFailure("Firecracker does not listen on its socket") from error
    finally:
        died.cancel()


def _listens(path: Path) -> bool:
    try:
        connect_socket(path).close()
    except VmmFailure:
        return False
    return True


def _maps(pid: int, image: Path) -> bool:
    try:
        status = image.stat()
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False
    return any(line.split()[4] == str(status.st_ino) for line in maps.splitlines())
