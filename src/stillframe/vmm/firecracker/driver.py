"""Firecracker (1.12 and newer) over its API socket.

A VM that was loaded is a private mapping of its memory image, like every other of ours, so forks
share it; one that was booted has anonymous memory. Firecracker itself writes what of it has changed
(``machine.py``).

Each Firecracker lives in a file tree of its own (``isolation.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from platform import machine as architecture

from stillframe.host.capacity import processor
from stillframe.host.process import Process, adopt, run, spawn
from stillframe.host.programs import find_program
from stillframe.host.sockets import connect_socket
from stillframe.host.watch import file_changes
from stillframe.model.errors import HostFailure, MissingComponent, VmmFailure
from stillframe.model.values import Hypervisor, ProcessIdentity
from stillframe.vmm.driver import DriverProbe, Limit, MachineResources, MachineSpec, check_shape
from stillframe.vmm.firecracker import api
from stillframe.vmm.firecracker.isolation import Seen, SharedDirectory, confined
from stillframe.vmm.firecracker.machine import FirecrackerMachine
from stillframe.vmm.firecracker.probe import kvm_refusal
from stillframe.vmm.isolation.command import (
    TAP,
    USER_NAMESPACES,
    check_launch,
    find_uplink,
)
from stillframe.vmm.kernel import uncompressed_kernel
from stillframe.vmm.logs import explained, log_size
from stillframe.vmm.moments import Moment
from stillframe.vmm.probing import ProbeOnce, features
from stillframe.vmm.unix_http import Call
from stillframe.vmm.versions import refuse_known_bad
from stillframe.vmm.vsock import AGENT_ARGUMENT

_START_DEADLINE = 60.0  # seconds until the API answers
_VERSION = re.compile(rb"Firecracker v(\d+)\.(\d+)\.(\d+)")
_ANSWERED_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_KERNEL, _INITRD, _LOADED, _IMAGE = "/kernel", "/initrd", "/devices", "/memory"
# A guest that resets by the keyboard controller ends Firecracker with 0, by a triple fault with an
# error. The last of several such arguments counts.
_RESET = "reboot=k"
_NO_INITRD = Path("/dev/null")
_SCRATCH = 512 << 20  # bytes, for the difference that a snapshot writes during the pause
_SCRATCH_RESERVE = 4 << 20  # bytes for device state


class FirecrackerDriver:
    """Firecracker on KVM. Implements ``Driver``."""

    hypervisor = Hypervisor.FIRECRACKER
    limits = frozenset({Limit.DISK, Limit.BANDWIDTH})

    def __init__(
        self,
        binary: str = "firecracker",
        *,
        accelerator: str = "auto",
        installed: Path | None = None,
        scratch_bytes: int = _SCRATCH,
    ) -> None:
        """``accelerator``: auto tries whether KVM runs guests; kvm trusts it.

        ``binary`` is looked for on PATH, then in ``installed``.
        ``scratch_bytes`` bounds the host memory that a snapshot of a VM takes during its pause.
        """
        self._name, self._accelerator, self._installed = binary, accelerator, installed
        self._scratch_bytes = scratch_bytes
        self._probed = ProbeOnce(self.hypervisor, self._look)
        self._binary = ""
        self._version: api.Version | None = None

    async def probe(self) -> DriverProbe:
        """Find the binary, its version, its file tree, and whether KVM runs guests here."""
        return await self._probed()

    async def _look(self) -> DriverProbe:
        version = self._version = await self._examine()
        text = ".".join(map(str, version))
        offered = features(self.limits, "vsock")
        return DriverProbe(self.hypervisor, True, text, "kvm", processor(), offered)

    async def _examine(self) -> api.Version:
        found = find_program(self._name, self._installed)
        if found is None:
            raise MissingComponent(
                f"{self._name} is not installed", hint="stillframe setup firecracker"
            )
        self._binary = found
        version = await _version_of(found)
        refuse_known_bad(self.hypervisor, version)
        if self._accelerator == "auto":
            refusal = await kvm_refusal(found)
            if refusal is not None:
                raise MissingComponent(
                    f"Firecracker needs KVM: {refusal}",
                    hint="use qemu or qemu-microvm, which run without KVM",
                )
        return version

    async def start(self, spec: MachineSpec, resources: MachineResources) -> FirecrackerMachine:
        """Spawn Firecracker; boot, or load and stand still. Nothing is left on failure."""
        probe = await self.probe()
        if self._version is None:
            raise MissingComponent(f"Firecracker is not available: {probe.reason}", hint=probe.hint)
        uplink = find_uplink() if spec.network else None
        check_shape(spec, resources.memory_image)
        clock = architecture() == "x86_64"  # others have none to move (builder.rs)
        try:
            return await self._start(self._version, spec, resources, uplink=uplink, clock=clock)
        except VmmFailure as error:
            if not clock or api.NO_CLOCK_IN_STATE not in error.message:
                raise
        return await self._start(self._version, spec, resources, uplink=uplink, clock=False)

    async def _start(
        self,
        version: api.Version,
        spec: MachineSpec,
        resources: MachineResources,
        *,
        uplink: str | None,
        clock: bool,
    ) -> FirecrackerMachine:
        logged = log_size(resources.vmm_log)
        shared = SharedDirectory(resources.directory)
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(_remove, shared)
            await asyncio.to_thread(shared.make)
            seen = await asyncio.to_thread(_seen, resources)
            scratch = min(spec.memory_bytes, self._scratch_bytes) + _SCRATCH_RESERVE
            process = await asyncio.to_thread(
                _spawn,
                self._binary,
                resources,
                shared,
                seen,
                scratch_bytes=scratch,
                uplink=uplink,
            )
            undo.push_async_callback(process.kill)
            try:
                await _until_listening(process, shared)
                machine = FirecrackerMachine(
                    process, shared, version,
                    moment=Moment(resources.memory_image),
                    told_of_reset=resources.device_state is not None,
                    console_log=resources.console_log, vmm_log=resources.vmm_log,
                )  # fmt: skip
                undo.push_async_callback(machine.kill)
                await _configure(machine, version, spec, resources, clock=clock)
            except VmmFailure as error:
                check_launch(resources.vmm_log, logged)
                raise explained(error, shared.log, resources.vmm_log, once_more=True) from error
            undo.pop_all()
        return machine

    async def adopt(
        self, process: ProcessIdentity, resources: MachineResources
    ) -> FirecrackerMachine:
        """Take over a Firecracker that an earlier server started. Raises VmmFailure.

        Nobody knows since when it has noted writes.
        """
        try:
            adopted = adopt(process)
        except VmmFailure:  # nobody else would remove what it left
            await asyncio.to_thread(_remove, SharedDirectory(resources.directory))
            raise
        try:
            # The running one may be older than what is installed by now: it says itself.
            machine = FirecrackerMachine(
                adopted, SharedDirectory(resources.directory), api.RESET_AWAITED,
                console_log=resources.console_log, vmm_log=resources.vmm_log,
            )  # fmt: skip
            try:
                machine.version = _parsed(await machine.call(api.describe()))
            except BaseException:
                await machine.close()
                raise
        except BaseException:
            adopted.close()
            raise
        return machine


async def _version_of(binary: str) -> api.Version:
    """Ask it within a file tree like those of VMs. Raises MissingComponent where there is none."""
    with tempfile.TemporaryDirectory(prefix="stillframe-probe-") as directory:
        shared = SharedDirectory(Path(directory))
        shared.make()
        command = confined(binary, ["--version"], shared.path, [])
        done = await run(command, timeout=30, check=False)
    words = done.stderr.decode(errors="replace").strip()
    if done.returncode != 0 and "no private file tree" in words:
        raise MissingComponent(f"Firecracker cannot be confined: {words}", hint=USER_NAMESPACES)
    match = _VERSION.search(done.stdout)
    if match is None:
        raise MissingComponent(f"{binary} does not tell its version ({words or 'no message'})")
    major, minor, micro = (int(part) for part in match.groups())
    return major, minor, micro


def _parsed(described: dict[str, str]) -> api.Version:
    match = _ANSWERED_VERSION.search(described["vmm_version"])
    if match is None:
        raise VmmFailure(f"Firecracker has no version: {described['vmm_version']}")
    major, minor, micro = (int(part) for part in match.groups())
    return major, minor, micro


def _seen(resources: MachineResources) -> list[Seen]:
    """The VM's files by their names inside. Unpacks the kernel where that is necessary."""
    seen = [
        Seen(f"/disk{index}", disk.path, disk.readonly)
        for index, disk in enumerate(resources.disks)
    ]
    if resources.device_state is not None:
        return [*seen, Seen(_LOADED, resources.device_state), Seen(_IMAGE, resources.memory_image)]
    seen.append(Seen(_KERNEL, uncompressed_kernel(resources.kernel)))
    if resources.initrd != _NO_INITRD:
        seen.append(Seen(_INITRD, resources.initrd))
    return seen


def _spawn(
    binary: str,
    resources: MachineResources,
    shared: SharedDirectory,
    seen: list[Seen],
    *,
    scratch_bytes: int,
    uplink: str | None,
) -> Process:
    arguments = ["--api-sock", shared.API, "--log-path", shared.LOG, "--level", "Info"]
    command = confined(
        binary, arguments, shared.path, seen,
        scratch_bytes=scratch_bytes, console=resources.console_log, uplink=uplink,
    )  # fmt: skip
    return spawn(command, output=resources.vmm_log)


async def _configure(
    machine: FirecrackerMachine,
    version: api.Version,
    spec: MachineSpec,
    resources: MachineResources,
    *,
    clock: bool = True,
) -> None:
    """Boot; or load, and refuse a VM that is not of the shape that it should have."""
    if resources.device_state is None:
        for call in _boot_calls(spec, resources):
            await machine.call(call)
        return
    taps = {api.NETWORK_INTERFACE: TAP} if spec.network else {}
    await machine.call(
        api.load_snapshot(
            version, _LOADED, _IMAGE, vsock_path=SharedDirectory.AGENT, taps=taps, clock=clock
        )
    )
    shape = await machine.call(api.shape())
    found = (shape["vcpu_count"], shape["mem_size_mib"] << 20)
    if found != (spec.vcpus, spec.memory_bytes):
        raise VmmFailure(
            f"the device state is of a VM with {found[0]} vCPUs and {found[1]} bytes of memory"
        )
    for call in _limit_calls(spec, resources):
        await machine.call(call)


def _limit_calls(spec: MachineSpec, resources: MachineResources) -> Iterator[Call]:
    """Limits of a VM that was loaded. Its state has them too, but that may come from elsewhere."""
    limits = resources.limits
    bandwidth = api.RateLimit.per_second(limits.disk)
    if bandwidth is not None:
        for index in range(len(resources.disks)):
            yield api.limit_drive(index, bandwidth)
    if spec.network and (limits.download or limits.upload):
        yield api.limit_network(
            download=api.RateLimit.per_second(limits.download),
            upload=api.RateLimit.per_second(limits.upload),
        )


def _boot_calls(spec: MachineSpec, resources: MachineResources) -> Iterator[Call]:
    limits = resources.limits
    initrd = None if resources.initrd == _NO_INITRD else _INITRD
    yield api.machine_config(spec)
    arguments = f"{resources.kernel_arguments} {_RESET} {AGENT_ARGUMENT}".strip()
    yield api.boot_source(_KERNEL, initrd, arguments)
    for index, disk in enumerate(resources.disks):
        bandwidth = api.RateLimit.per_second(limits.disk)
        yield api.drive(index, f"/disk{index}", readonly=disk.readonly, bandwidth=bandwidth)
    if spec.network:
        yield api.network(
            TAP,
            download=api.RateLimit.per_second(limits.download),
            upload=api.RateLimit.per_second(limits.upload),
        )
    yield api.vsock(SharedDirectory.AGENT)
    yield api.entropy()
    yield api.start()


async def _until_listening(process: Process, shared: SharedDirectory) -> None:
    """Return when Firecracker accepts connections. Raises VmmFailure when it ends before that.

    The socket's name appears at bind(2), a moment before listen(2); the line that Firecracker logs
    then comes after both. Either is a reason to try, so nothing is asked again and again.
    """
    died = asyncio.ensure_future(process.wait())
    try:
        async with (
            asyncio.timeout(_START_DEADLINE),
            file_changes(shared.path) as named,
            file_changes(shared.log) as logged,
        ):
            while not _listens(shared.api):
                waits = [asyncio.ensure_future(event.wait()) for event in (named, logged)]
                await asyncio.wait([died, *waits], return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                if died.done():
                    raise VmmFailure("Firecracker ended before it answered")
                named.clear()
                logged.clear()
    except TimeoutError as error:
        raise VmmFailure(f"Firecracker did not answer within {_START_DEADLINE:.0f} s") from error
    except OSError as error:
        raise HostFailure(f"the VM's directory cannot be watched: {error.strerror}") from error
    finally:
        died.cancel()


def _listens(path: Path) -> bool:
    try:
        connect_socket(path).close()
    except VmmFailure:
        return False
    return True


def _remove(shared: SharedDirectory) -> None:
    with contextlib.suppress(OSError):
        shared.remove()
