"""Cloud Hypervisor (51 and newer) over its API socket; never by its command line.

Guest memory is a private mapping of the memory image from the first boot on, so dirty pages are
read from outside, as with QEMU. Cloud Hypervisor would boot a guest that resets again by itself, on
memory that is mapped anew behind our back; but the names of the files that takes are removed once
it has opened them, so it ends instead, and the engine boots again, as with every hypervisor.

Where the kernel has Landlock, it may open nothing but its VM's files from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillframe.host.capacity import processor
from stillframe.host.files import remove_tree, storage_errors
from stillframe.host.probes import landlock_version
from stillframe.host.process import Process, adopt, run, spawn
from stillframe.host.programs import find_program
from stillframe.host.sockets import bind_unix
from stillframe.model.errors import HostFailure, MissingComponent, VmmFailure
from stillframe.model.values import Hypervisor, ProcessIdentity
from stillframe.vmm.cloud_hypervisor import api
from stillframe.vmm.cloud_hypervisor.machine import (
    API,
    EVENTS,
    LOADING,
    CloudHypervisorMachine,
    clear,
)
from stillframe.vmm.cloud_hypervisor.state import SavedState
from stillframe.vmm.driver import (
    GUEST_MAC,
    DriverProbe,
    Limit,
    MachineResources,
    MachineSpec,
    check_shape,
)
from stillframe.vmm.isolation.command import TAP, apart, check_launch, find_uplink
from stillframe.vmm.kvm import kvm_reason
from stillframe.vmm.logs import explained, log_size
from stillframe.vmm.names import give_names, remove_names
from stillframe.vmm.probing import ProbeOnce, features
from stillframe.vmm.versions import Version, refuse_known_bad
from stillframe.vmm.vsock import AGENT_ARGUMENT

_VERSION = re.compile(rb"cloud-hypervisor v(\d+)\.(\d+)(?:\.(\d+))?")
_LANDLOCK = 3  # Cloud Hypervisor refuses to start confined with an older one (vmm/src/landlock.rs)
_NONE = Path("/dev/null")  # stands for an initrd that is not there


class CloudHypervisorDriver:
    """Cloud Hypervisor on KVM. Implements ``Driver``."""

    hypervisor = Hypervisor.CLOUD_HYPERVISOR
    # One figure for a network device: Cloud Hypervisor makes a limiter of it for either direction
    # (virtio-devices/src/net.rs, ``rate_limiter_config``; 51.0 to 53.0).
    limits = frozenset({Limit.DISK, Limit.BANDWIDTH_ALIKE})

    def __init__(
        self,
        binary: str = "cloud-hypervisor",
        *,
        accelerator: str = "auto",
        installed: Path | None = None,
        qemu_binary: str = "qemu-system-x86_64",
    ) -> None:
        """``accelerator``: auto has ``qemu_binary`` try whether KVM runs guests; kvm trusts it.

        ``binary`` is looked for on PATH, then in ``installed``.
        """
        self._name, self._accelerator, self._qemu = binary, accelerator, qemu_binary
        self._installed, self._binary = installed, ""
        self._probed = ProbeOnce(self.hypervisor, self._look)
        self._drains_disks = False

    async def probe(self) -> DriverProbe:
        """Find the binary, its version, and whether KVM runs guests."""
        return await self._probed()

    async def _look(self) -> DriverProbe:
        version = await self._examine()
        self._drains_disks = version >= api.DRAINS_DISKS
        text = ".".join(map(str, version))
        offered = features(self.limits, "vsock")
        return DriverProbe(self.hypervisor, True, text, "kvm", processor(), offered)

    async def _examine(self) -> Version:
        binary = find_program(self._name, self._installed)
        if binary is None:
            raise MissingComponent(
                f"{self._name} is not installed", hint="stillframe setup cloud-hypervisor"
            )
        self._binary = binary
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
        uplink = find_uplink() if spec.network else None
        check_shape(spec, resources.memory_image)
        directory, logged = resources.directory, log_size(resources.vmm_log)
        async with contextlib.AsyncExitStack() as undo:
            clear(directory)
            undo.callback(clear, directory)
            disks = give_names(resources, _others(resources))
            process = await asyncio.to_thread(self._spawn, resources, uplink)
            undo.push_async_callback(process.kill)
            machine = CloudHypervisorMachine(process, resources)
            undo.push_async_callback(machine.kill)
            try:
                await configure(machine, spec, resources, disks, synchronous=not self._drains_disks)
            except VmmFailure as error:
                check_launch(resources.vmm_log, logged)
                raise explained(error, resources.vmm_log) from error
            remove_names(directory, sockets=False)
            undo.pop_all()
        return machine

    def _spawn(self, resources: MachineResources, uplink: str | None) -> Process:
        """Bind first, pass the descriptor: nobody waits for a socket to appear.

        With an ``uplink`` it starts in a network of its own, else in ours and without a launcher.
        The absolute name of a file on the command line is how a VMM is found that nobody has a
        record of (``host/orphans.py``).
        """
        events = f'path="{resources.directory / EVENTS}"'
        try:
            listener = bind_unix(resources.directory / API)
        except OSError as error:
            raise HostFailure(f"the VM's socket cannot be made: {error.strerror}") from error
        arguments = ["--api-socket", f"fd={listener.fileno()}", "--event-monitor", events]
        command = [self._binary, *arguments]
        if uplink is not None:
            command = apart(self._binary, self._binary, arguments, uplink=uplink)
        with listener:
            return spawn(
                command,
                output=resources.vmm_log,
                standard_output=resources.console_log,
                pass_fds=[listener.fileno()],
                cwd=resources.directory,
            )  # fmt: skip

    async def adopt(
        self, process: ProcessIdentity, resources: MachineResources
    ) -> CloudHypervisorMachine:
        """Take over a VMM that an earlier server started. Raises VmmFailure."""
        machine = CloudHypervisorMachine(adopt(process), resources)
        try:
            await machine.status()
        except BaseException:
            await machine.close()
            raise
        return machine


def _others(resources: MachineResources) -> Mapping[str, Path]:
    """The VM's files but its disks, by name. A restore reads neither kernel nor initrd."""
    names = {api.MEMORY: resources.memory_image}
    if resources.device_state is None:
        names[api.KERNEL] = resources.kernel
        if resources.initrd != _NONE:
            names[api.INITRD] = resources.initrd
    return names


async def configure(
    machine: CloudHypervisorMachine,
    spec: MachineSpec,
    resources: MachineResources,
    disks: list[str],
    *,
    synchronous: bool = False,
) -> None:
    """Boot, or restore; ``disks`` are the names of the disks. Raises VmmFailure, DamagedData."""
    if resources.device_state is None:
        config = _configuration(spec, resources, disks, synchronous=synchronous)
        await machine.call(api.create(config))
        await machine.call(api.boot())
        return
    loading = resources.directory / LOADING
    with contextlib.ExitStack() as undo, storage_errors("unpack device state"):
        undo.callback(remove_tree, loading)
        loading.mkdir(mode=0o700)
        saved = await asyncio.to_thread(SavedState, resources.device_state)
        config = _configuration(spec, resources, disks, mac=saved.mac, synchronous=synchronous)
        await asyncio.to_thread(saved.unpack, loading, config)
        await machine.call(api.restore(LOADING))


def _configuration(
    spec: MachineSpec,
    resources: MachineResources,
    disks: list[str],
    *,
    mac: str | None = None,
    synchronous: bool = False,
) -> dict[str, Any]:
    readonly = [disk.readonly for disk in resources.disks]
    return api.configuration(
        spec,
        arguments=f"{resources.kernel_arguments} {AGENT_ARGUMENT}",
        disks=list(zip(disks, readonly, strict=True)),
        initrd=resources.initrd != _NONE,
        tap=TAP if spec.network else None,
        mac=mac or GUEST_MAC,
        confined=landlock_version() >= _LANDLOCK,
        synchronous=synchronous,
        disk_rate=resources.limits.disk,
        network_rate=resources.limits.download,  # and of uploads: see ``limits``
    )
