"""The vz driver: VMs of Apple's Virtualization.framework, each in a shim process of its own.

The framework keeps a guest's memory to itself: it is no mapping of our memory image, and it is
saved within the framework's own state file. Therefore that file, with a trailer (``state.py``), is
our device state; the memory image stays the empty, sparse file that it is made as.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

from stillframe.host.files import storage_errors
from stillframe.host.process import Process, adopt, spawn
from stillframe.host.sockets import bind_unix, connect_unix
from stillframe.model.errors import (
    HostFailure,
    InsufficientResources,
    MissingComponent,
    StillframeError,
    StorageFull,
    VmmFailure,
)
from stillframe.model.values import Hypervisor, ProcessIdentity
from stillframe.vmm.driver import (
    AgentStream,
    DriverProbe,
    Limit,
    MachineResources,
    MachineSpec,
    MachineStatus,
    NoDiskCopies,
    check_shape,
)
from stillframe.vmm.logs import explained, log_end, log_size
from stillframe.vmm.probing import ProbeOnce, features
from stillframe.vmm.vsock import AGENT_ARGUMENT, AGENT_VSOCK_PORT, dial_vsock
from stillframe.vmm.vz.probe import (
    PlatformFacts,
    ask_framework,
    check_facts,
    shim_command,
    shim_environment,
)
from stillframe.vmm.vz.protocol import (
    ENDED,
    MAX_LINE,
    SOCKET,
    Description,
    Identity,
    Refusal,
)
from stillframe.vmm.vz.state import Trailer, append_trailer, detach

_LOADING = "loading.vzstate"  # in the VM's directory
_CONSOLE = "console=hvc0"
_NO_INITRD = Path("/dev/null")
_DEADLINE = 60.0  # seconds
_STATE_DEADLINE = 600.0  # seconds; all memory may have to go to or come from a slow disk
_STOP_DEADLINE = 5.0  # seconds for the framework to let go of a guest
_AGENT_DEADLINE = 120.0  # seconds for a guest to boot as far as its agent
_RESTORE_HINT = (
    "state loads only on the Mac and for the user that saved it; a newer macOS may refuse it; "
    "start the instance from its disks"
)
_STATUS = {
    "running": MachineStatus.RUNNING,
    "starting": MachineStatus.RUNNING,
    "resuming": MachineStatus.RUNNING,
    "paused": MachineStatus.PAUSED,
    "pausing": MachineStatus.PAUSED,
    "saving": MachineStatus.PAUSED,
    "restoring": MachineStatus.PAUSED,
    "stopped": MachineStatus.SHUTDOWN,
    "stopping": MachineStatus.SHUTDOWN,
}


class VzMachine(NoDiskCopies):
    """One shim process. Implements ``Machine``."""

    def __init__(self, process: Process, resources: MachineResources) -> None:
        """``process`` was started for a VM with these ``resources``."""
        self.process: ProcessIdentity = process.identity
        self.shutdown_reason: str | None = None
        self.lacks_space = asyncio.Event()
        self.writes_memory = True
        self._process = process
        self._directory = resources.directory
        self._console, self._log = resources.console_log, resources.vmm_log
        self._logged_before = log_size(self._log)

    async def ask(self, verb: str, deadline: float = _DEADLINE, **rest: Any) -> dict[str, Any]:
        """Send a request over a connection of its own; the answer.

        Raises VmmFailure, StorageFull.
        """
        name = f"the vz shim (pid {self.process.pid})"
        line = b""
        try:
            async with asyncio.timeout(deadline):
                reader, writer = await connect_unix(self._directory / SOCKET, limit=MAX_LINE)
                try:
                    writer.write(json.dumps({"do": verb, **rest}).encode() + b"\n")
                    await writer.drain()
                    line = await reader.readline()
                finally:
                    writer.close()
        except TimeoutError as error:
            reason = f"{name} did not answer {verb} within {deadline:.0f} s"
            raise VmmFailure(reason, command=verb) from error
        except (OSError, ValueError) as error:
            raise VmmFailure(f"{name} was lost during {verb}: {error}", command=verb) from error
        return _understood(line, name, verb)

    async def status(self) -> MachineStatus:
        """Ask for the VM's state."""
        told = await self.ask("status")
        return _STATUS.get(told["state"], MachineStatus.UNKNOWN)

    async def pause(self) -> None:
        """Stop the vCPUs."""
        await self.ask("pause")

    async def resume(self) -> None:
        """Let the vCPUs run."""
        await self.ask("resume")

    async def save_devices(self, destination: Path, memory: Path | None = None) -> None:
        """Write the framework's state file, which holds the memory too, and its trailer.

        ``memory`` is left as it is: empty. Raises VmmFailure, StorageFull, HostFailure.
        """
        answer = await self.ask("save", _STATE_DEADLINE, path=str(destination))
        try:
            trailer = _trailer(answer)
            with storage_errors("save device state"):
                await asyncio.to_thread(append_trailer, destination, trailer)
        except BaseException:
            destination.unlink(missing_ok=True)
            raise

    async def dial_agent(self) -> AgentStream:
        """Connect to the agent's vsock port, through the shim."""
        return await dial_vsock(
            self._directory / SOCKET, AGENT_VSOCK_PORT, deadline=_AGENT_DEADLINE,
            console=self._console,
        )  # fmt: skip

    async def power_button(self) -> None:
        """Ask the guest to shut down."""
        await self.ask("power")

    async def kill(self) -> None:
        """Have the framework stop the guest, SIGKILL the shim, prove its death, remove its socket.

        The guest runs in a process of macOS's own. That ends with the shim, but nobody would say
        when it has let go of the disks; the framework does, when it was asked to stop.
        """
        try:
            if self._process.alive:
                with contextlib.suppress(StillframeError):
                    await self.ask("stop", _STOP_DEADLINE)
        finally:
            await self._process.kill()
        await asyncio.to_thread(self._clear)

    async def wait_exit(self) -> None:
        """Return when the shim is gone and it is known why."""
        await self._process.wait()
        await asyncio.to_thread(self._clear)

    async def close(self) -> None:
        """Stop watching; the shim runs on. There is no lasting connection."""
        self._process.close()

    def _clear(self) -> None:
        self.shutdown_reason = self.shutdown_reason or self._reason()
        _clear(self._directory)

    def _reason(self) -> str | None:
        """Why the guest ended, by the last line of the shim; None if it was not to say so."""
        lines = log_end(self._log, self._logged_before).decode(errors="replace").splitlines()
        reasons = [line.removeprefix(ENDED) for line in lines if line.startswith(ENDED)]
        return reasons[-1] if reasons else None


class VzDriver:
    """Virtualization.framework. Implements ``Driver``."""

    hypervisor = Hypervisor.VZ
    limits = frozenset[Limit]()  # the framework has none

    def __init__(self, facts: PlatformFacts | None = None) -> None:
        """``facts`` are those of this host unless given."""
        self._facts = facts or PlatformFacts.here()
        self._probed = ProbeOnce(self.hypervisor, self._look)

    async def probe(self) -> DriverProbe:
        """Look at the host, then have the framework validate a VM. The version is macOS's."""
        return await self._probed()

    async def _look(self) -> DriverProbe:
        check_facts(self._facts)
        await ask_framework(self._facts.interpreter)
        return DriverProbe(
            self.hypervisor, True, self._facts.release, "vz", features=features(self.limits)
        )

    async def start(self, spec: MachineSpec, resources: MachineResources) -> VzMachine:
        """Spawn a shim; boot, or restore and stand still. Nothing is left on failure.

        Raises VmmFailure, MissingComponent, DamagedData for state of another VM.
        """
        probe = await self.probe()
        if not probe.available:
            raise MissingComponent(f"vz is not available: {probe.reason}", hint=probe.hint)
        check_shape(spec, resources.memory_image)
        directory = resources.directory
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(_clear, directory)
            await asyncio.to_thread(_clear, directory)
            process = await asyncio.to_thread(self._spawn, resources)
            machine = VzMachine(process, resources)
            undo.push_async_callback(machine.kill)
            try:
                if resources.device_state is None:
                    await _boot(machine, spec, resources)
                else:
                    await _restore(machine, spec, resources, resources.device_state)
            except VmmFailure as error:
                raise explained(error, resources.vmm_log) from error
            undo.pop_all()
        return machine

    def _spawn(self, resources: MachineResources) -> Process:
        """Bind first, pass the descriptor: nobody waits for a socket to appear."""
        try:
            listener = bind_unix(resources.directory / SOCKET)
        except OSError as error:
            raise HostFailure(f"the VM's socket cannot be made: {error.strerror}") from error
        with listener:
            arguments = ["--listen", str(listener.fileno())]
            # With its slash the directory also tells whose process it is: see host/orphans.py.
            arguments += ["--directory", f"{resources.directory}/"]
            return spawn(
                shim_command(self._facts.interpreter, *arguments),
                output=resources.vmm_log, pass_fds=[listener.fileno()],
                cwd=resources.directory, extra_environment=shim_environment(),
            )  # fmt: skip

    async def adopt(self, process: ProcessIdentity, resources: MachineResources) -> VzMachine:
        """Take over a shim that an earlier server started. Raises VmmFailure."""
        adopted = adopt(process)
        try:
            machine = VzMachine(adopted, resources)
            await machine.status()
        except BaseException:
            adopted.close()
            raise
        return machine


async def _boot(machine: VzMachine, spec: MachineSpec, resources: MachineResources) -> None:
    description = _description(spec, resources)
    if spec.network:
        description = replace(description, mac=network_address(resources.generation_id))
    await machine.ask("boot", vm=description.as_json())


async def _restore(
    machine: VzMachine, spec: MachineSpec, resources: MachineResources, state: Path
) -> None:
    loading = resources.directory / _LOADING
    with storage_errors("unpack device state"):
        trailer = await asyncio.to_thread(detach, state, loading)
    try:
        trailer.check(spec)
        identity = trailer.identity
        description = replace(
            _description(spec, resources),
            machine=identity.machine, mac=identity.mac, entropy=identity.entropy,
        )  # fmt: skip
        await machine.ask("restore", _STATE_DEADLINE, vm=description.as_json(), path=str(loading))
    finally:
        loading.unlink(missing_ok=True)


def _description(spec: MachineSpec, resources: MachineResources) -> Description:
    initrd = None if resources.initrd == _NO_INITRD else str(resources.initrd)
    return Description(
        vcpus=spec.vcpus,
        memory_bytes=spec.memory_bytes,
        kernel=str(resources.kernel),
        initrd=initrd,
        # The last console named is the one that the guest's init writes to.
        arguments=f"{resources.kernel_arguments} {_CONSOLE} {AGENT_ARGUMENT}".strip(),
        disks=tuple((str(disk.path), disk.readonly) for disk in resources.disks),
        console=str(resources.console_log),
    )


def network_address(generation_id: UUID) -> str:
    """The address of a new VM's network card: unicast, locally administered."""
    first, *rest = generation_id.bytes[:6]
    return ":".join(f"{byte:02x}" for byte in [(first & 0xFC) | 0x02, *rest])


def _understood(line: bytes, name: str, verb: str) -> dict[str, Any]:
    """The answer in a line. Raises VmmFailure, StorageFull, InsufficientResources."""
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise VmmFailure(f"{name} was lost during {verb}", command=verb) from error
    if not isinstance(answer, dict):
        raise VmmFailure(f"{name} answered {verb} with something else", command=verb)
    if "error" not in answer:
        return answer
    if answer.get("kind") == Refusal.NO_SPACE:
        raise StorageFull(f"no space for what {name} writes: {answer['error']}")
    words = f"{name} refused {verb}: {answer['error']}"
    if answer.get("kind") == Refusal.LIMIT:
        raise InsufficientResources(words, hint="stop another VM of this Mac")
    hint = _RESTORE_HINT if answer.get("kind") == Refusal.RESTORE else None
    raise VmmFailure(words, hint=hint, command=verb, refused=True)


def _trailer(answer: dict[str, Any]) -> Trailer:
    try:
        identity = Identity.from_json(answer["identity"])
        return Trailer(int(answer["vcpus"]), int(answer["memory_bytes"]), identity)
    except (ValueError, KeyError, TypeError) as error:
        raise VmmFailure(f"the vz shim does not tell whose state it saved: {error}") from error


def _clear(directory: Path) -> None:
    """Remove the socket, and what a shim that was killed left half-done."""
    for name in (SOCKET, _LOADING):
        with contextlib.suppress(OSError):
            (directory / name).unlink(missing_ok=True)
