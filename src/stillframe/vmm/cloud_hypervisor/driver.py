"""Cloud Hypervisor (51 and newer) over its API socket; never by its command line.

Guest memory is a private mapping of the memory image from the first boot on, so dirty pages are
read from outside, as with QEMU. Cloud Hypervisor cannot leave memory out of a snapshot: what it
writes is dropped, which costs the time of writing all memory to the page cache in every pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
from pathlib import Path

from stillframe.host.capacity import processor
from stillframe.host.files import remove_tree, storage_errors
from stillframe.host.process import Process, adopt, run, spawn
from stillframe.host.sockets import bind_unix
from stillframe.model.errors import HostFailure, MissingComponent, StillframeError, VmmFailure
from stillframe.model.values import Hypervisor, ProcessIdentity
from stillframe.vmm.cloud_hypervisor import api
from stillframe.vmm.cloud_hypervisor.state import pack, unpack
from stillframe.vmm.driver import (
    AgentStream,
    DriverProbe,
    MachineResources,
    MachineSpec,
    MachineStatus,
    check_shape,
)
from stillframe.vmm.kvm import kvm_reason
from stillframe.vmm.names import give_names, last_words, remove_names
from stillframe.vmm.unix_http import Call, UnixHttp
from stillframe.vmm.versions import Version, refuse_known_bad
from stillframe.vmm.vsock import AGENT_ARGUMENT, AGENT_VSOCK_PORT, dial_vsock

_API, _VSOCK, _MEMORY, _CONSOLE = "api.sock", "vsock.sock", "memory.link", "console.link"
_SAVING, _LOADING = "saving.new", "loading.new"
_AGENT_DEADLINE = 120.0  # seconds for a guest to boot as far as its agent
_FEATURES = ("fork", "pause", "snapshots", "standby")
_VERSION = re.compile(rb"cloud-hypervisor v(\d+)\.(\d+)(?:\.(\d+))?")
_STATUS = {
    "Running": MachineStatus.RUNNING,
    "Paused": MachineStatus.PAUSED,
    "Shutdown": MachineStatus.SHUTDOWN,
}


class CloudHypervisorMachine:
    """One Cloud Hypervisor process. Implements ``Machine``."""

    def __init__(self, process: Process, directory: Path) -> None:
        """``directory`` is the VM's own."""
        self.process: ProcessIdentity = process.identity
        self.shutdown_reason: str | None = None
        self.writes_memory = False
        self._process = process
        self._directory = directory
        self._http = UnixHttp(directory / _API, f"Cloud Hypervisor (pid {process.identity.pid})")

    async def call(self, call: Call) -> object:
        """Send a request. Raises VmmFailure."""
        return await self._http.call(call)

    async def status(self) -> MachineStatus:
        """Ask for the state of the VM (vm.info)."""
        told = await self._http.call(api.describe())
        return _STATUS.get(told["state"], MachineStatus.UNKNOWN)

    async def pause(self) -> None:
        """Stop the vCPUs (vm.pause)."""
        await self._http.call(api.pause())

    async def resume(self) -> None:
        """Let the vCPUs run (vm.resume)."""
        await self._http.call(api.resume())

    async def save_devices(self, destination: Path, memory: Path | None = None) -> None:
        """Write device state (vm.snapshot), and drop the memory that comes with it.

        Raises DamagedData when the state is not as expected, StorageFull.
        """
        saving = self._directory / _SAVING
        with contextlib.ExitStack() as undo, storage_errors("save device state"):
            undo.callback(remove_tree, saving)
            saving.mkdir(mode=0o700)
            await self._http.call(api.snapshot(_SAVING))
            await asyncio.to_thread(pack, saving, destination)

    async def begin_disk_copy(self, index: int, copy: Path) -> bool:
        """Cloud Hypervisor does not tell what changes on a disk."""
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
        """Press the ACPI power button (vm.power-button)."""
        await self._http.call(api.power_button())

    async def kill(self) -> None:
        """SIGKILL Cloud Hypervisor, prove its death and remove its sockets."""
        await self._process.kill()
        await self._http.close()
        _clear(self._directory)

    async def wait_exit(self) -> None:
        """Return when Cloud Hypervisor is gone."""
        await self._process.wait()

    async def close(self) -> None:
        """Drop the connection; Cloud Hypervisor runs on."""
        await self._http.close()
        self._process.close()


class CloudHypervisorDriver:
    """Cloud Hypervisor on KVM. Implements ``Driver``."""

    hypervisor = Hypervisor.CLOUD_HYPERVISOR

    def __init__(
        self,
        binary: str = "cloud-hypervisor",
        *,
        accelerator: str = "auto",
        qemu_binary: str = "qemu-system-x86_64",
    ) -> None:
        """``accelerator``: auto has ``qemu_binary`` try whether KVM runs guests; kvm trusts it."""
        self._binary, self._accelerator, self._qemu = binary, accelerator, qemu_binary
        self._probing = asyncio.Lock()
        self._probe: DriverProbe | None = None

    async def probe(self) -> DriverProbe:
        """Find the binary, its version, and whether KVM runs guests here."""
        async with self._probing:
            if self._probe is None:
                try:
                    version = ".".join(map(str, await self._examine()))
                    self._probe = DriverProbe(
                        self.hypervisor, True, version, "kvm", processor(), _FEATURES
                    )
                except StillframeError as error:
                    self._probe = DriverProbe(
                        self.hypervisor, False, reason=error.message, hint=error.hint
                    )
            return self._probe

    async def _examine(self) -> Version:
        binary = shutil.which(self._binary)
        if binary is None:
            raise MissingComponent(
                f"{self._binary} is not installed", hint="stillframe setup cloud-hypervisor"
            )
        match = _VERSION.search((await run([binary, "--version"], timeout=30)).stdout)
        if match is None:
            raise VmmFailure(f"{binary} does not tell its version")
        version = tuple(int(part) for part in match.groups() if part is not None)
        refuse_known_bad(self.hypervisor, version)
        if self._accelerator == "auto":
            reason = await asyncio.to_thread(kvm_reason, self._qemu)
            if reason is not None:
                raise MissingComponent(
                    f"Cloud Hypervisor needs KVM: {reason}",
                    hint="use qemu or qemu-microvm, which run without KVM",
                )
        return version

    async def start(self, spec: MachineSpec, resources: MachineResources) -> CloudHypervisorMachine:
        """Spawn Cloud Hypervisor; boot, or restore and stand still. Nothing is left on failure."""
        probe = await self.probe()
        if not probe.available:
            raise MissingComponent(
                f"Cloud Hypervisor is not available: {probe.reason}", hint=probe.hint
            )
        check_shape(spec, resources.memory_image)
        directory = resources.directory
        async with contextlib.AsyncExitStack() as undo:
            _clear(directory)
            undo.callback(_clear, directory)
            disks = give_names(
                resources, {_MEMORY: resources.memory_image, _CONSOLE: resources.console_log}
            )
            process = await asyncio.to_thread(self._spawn, resources)
            machine = CloudHypervisorMachine(process, directory)
            undo.push_async_callback(machine.kill)
            try:
                if resources.device_state is None:
                    await self._boot(machine, spec, resources, disks)
                else:
                    await self._restore(machine, resources.device_state, directory)
            except VmmFailure as error:
                words = last_words(resources.vmm_log)
                raise VmmFailure(f"{error.message}{words}", hint=error.hint) from error
            undo.pop_all()
        return machine

    def _spawn(self, resources: MachineResources) -> Process:
        """Bind first, pass the descriptor: nobody waits for a socket to appear."""
        try:
            listener = bind_unix(resources.directory / _API)
        except OSError as error:
            raise HostFailure(f"the VM's socket cannot be made: {error.strerror}") from error
        with listener:
            return spawn(
                # The log's path also tells whose process it is: see host/orphans.py.
                [
                    self._binary,
                    "--api-socket",
                    f"fd={listener.fileno()}",
                    "--log-file",
                    resources.vmm_log,
                ],
                output=resources.vmm_log,
                pass_fds=[listener.fileno()],
                cwd=resources.directory,
            )

    async def _boot(
        self,
        machine: CloudHypervisorMachine,
        spec: MachineSpec,
        resources: MachineResources,
        disks: list[str],
    ) -> None:
        readonly = [disk.readonly for disk in resources.disks]
        config = api.create(
            spec,
            memory=_MEMORY,
            kernel=str(resources.kernel),
            initrd=None if resources.initrd == Path("/dev/null") else str(resources.initrd),
            arguments=f"{resources.kernel_arguments} {AGENT_ARGUMENT}",
            disks=list(zip(disks, readonly, strict=True)),
            console=_CONSOLE,
            vsock=_VSOCK,
        )
        await machine.call(config)
        await machine.call(api.boot())

    async def _restore(
        self, machine: CloudHypervisorMachine, devices: Path, directory: Path
    ) -> None:
        loading = directory / _LOADING
        with contextlib.ExitStack() as undo, storage_errors("unpack device state"):
            undo.callback(remove_tree, loading)
            loading.mkdir(mode=0o700)
            await asyncio.to_thread(unpack, devices, loading)
            await machine.call(api.restore(_LOADING))

    async def adopt(
        self, process: ProcessIdentity, resources: MachineResources
    ) -> CloudHypervisorMachine:
        """Take over a VMM that an earlier server started. Raises VmmFailure."""
        machine = CloudHypervisorMachine(adopt(process), resources.directory)
        try:
            await machine.status()
        except BaseException:
            await machine.close()
            raise
        return machine


def _clear(directory: Path) -> None:
    """Remove what only a running VMM needs, and what one that was killed left half-done."""
    remove_names(directory)
    for name in (_SAVING, _LOADING):
        remove_tree(directory / name)
