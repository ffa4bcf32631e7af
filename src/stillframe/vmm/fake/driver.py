"""The fake hypervisor: real processes, real memory images and captures, but no guest kernel.

It keeps every promise of the driver protocol (tests/conformance holds both drivers to them) and
boots in well under a second, so everything above the drivers can be tried without a VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillframe.host.process import Process, adopt, spawn
from stillframe.host.sockets import bind_unix, connect_unix
from stillframe.model.errors import HostFailure, VmmFailure
from stillframe.model.values import Hypervisor, ProcessIdentity
from stillframe.vmm.driver import (
    AgentStream,
    DriverProbe,
    Limit,
    MachineResources,
    MachineSpec,
    MachineStatus,
    NoDiskCopies,
)
from stillframe.vmm.logs import explained
from stillframe.vmm.probing import features
from stillframe.vmm.tracking import tracking_environment

_PACKAGE_ROOT = Path(__file__).resolve().parents[3]
_DEADLINE = 30.0  # seconds for an answer; a busy host may take a while to start an interpreter
_VERSION = "1"


class FakeMachine(NoDiskCopies):
    """One fake VMM process. Implements ``Machine``."""

    def __init__(self, process: Process, directory: Path) -> None:
        """Use ``open`` before anything else."""
        self.process: ProcessIdentity = process.identity
        self.shutdown_reason: str | None = None
        self.lacks_space = asyncio.Event()
        self.writes_memory = False
        self._process = process
        self._directory = directory
        self._writer: asyncio.StreamWriter | None = None
        self._pump: asyncio.Task[None] | None = None
        self._answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._asking = asyncio.Lock()
        self._number = 0

    async def open(self) -> None:
        """Connect to the control socket. Raises VmmFailure."""
        reader, self._writer = await connect_unix(self._directory / "control.sock")
        self._pump = asyncio.create_task(self._listen(reader))
        await self.status()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self.shutdown_reason = message["reason"]
                else:
                    self._answers.put_nowait(message)
        except (OSError, ValueError):
            pass  # said to whoever asks, by the None
        finally:
            self._answers.put_nowait(None)

    async def _ask(self, command: str, **arguments: str) -> str:
        async with self._asking:
            if self._writer is None:
                raise VmmFailure("the connection to the fake VMM is closed")
            self._number += 1
            request = {"id": self._number, "command": command, **arguments}
            try:
                async with asyncio.timeout(_DEADLINE):
                    self._writer.write(json.dumps(request).encode() + b"\n")
                    await self._writer.drain()
                    answer = await self._answer_to(self._number)
            except TimeoutError as error:
                raise VmmFailure(f"the fake VMM did not answer {command!r} in time") from error
            except OSError as error:
                raise VmmFailure(f"the fake VMM is gone ({error.strerror})") from error
        if "error" in answer:
            raise VmmFailure(f"the fake VMM refused {command!r}: {answer['error']}")
        return str(answer["status"])

    async def _answer_to(self, number: int) -> dict[str, Any]:
        """The answer with that number; those to requests that were given up are dropped."""
        while (answer := await self._answers.get()) is not None:
            if answer.get("id") == number:
                return answer
        self._answers.put_nowait(None)  # for whoever asks next
        raise VmmFailure("the fake VMM is gone", pid=self.process.pid)

    async def status(self) -> MachineStatus:
        """Ask the VMM what its guest is doing."""
        return MachineStatus(await self._ask("status"))

    async def pause(self) -> None:
        """Stop the guest's clock, counter and agent."""
        await self._ask("pause")

    async def resume(self) -> None:
        """Let the guest run (on)."""
        await self._ask("resume")
        self.lacks_space.clear()

    async def save_devices(self, destination: Path, memory: Path | None = None) -> None:
        """Write the spec as device state, of a paused guest, to a new file."""
        await self._ask("save", path=str(destination))

    async def dial_agent(self) -> AgentStream:
        """Connect to the agent's socket."""
        return await connect_unix(self._directory / "agent.sock")

    async def power_button(self) -> None:
        """End the guest as a power button would."""
        await self._ask("power")

    async def kill(self) -> None:
        """SIGKILL the process, prove its death, remove its sockets."""
        await self._process.kill()
        await self._drain_events()
        await self._disconnect()
        _remove_sockets(self._directory)

    async def wait_exit(self) -> None:
        """Return when the process is gone and its last words were heard."""
        await self._process.wait()
        await self._drain_events()

    async def close(self) -> None:
        """Drop the connection; the VMM runs on."""
        await self._disconnect()
        self._process.close()

    async def _drain_events(self) -> None:
        if self._pump is not None:  # ends by itself: the stream of a dead process does
            await asyncio.wait([self._pump])

    async def _disconnect(self) -> None:
        writer, self._writer = self._writer, None
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class FakeDriver:
    """The fake hypervisor. Implements ``Driver``."""

    hypervisor = Hypervisor.FAKE
    # It has no devices that could be too fast; limits are taken, kept and told like others.
    limits = frozenset({Limit.DISK, Limit.BANDWIDTH})

    def __init__(self, tracker: Path | None = None) -> None:
        """``tracker`` is the library that has writes to guest memory tracked, if there is one."""
        self._tracker = tracker

    async def probe(self) -> DriverProbe:
        """It works wherever this interpreter does."""
        return DriverProbe(self.hypervisor, True, _VERSION, "none", features=features(self.limits))

    async def start(self, spec: MachineSpec, resources: MachineResources) -> FakeMachine:
        """Spawn a process; with device state it stands still. Nothing is left on failure.

        Raises VmmFailure, with what the process said, when state or memory do not fit the spec.
        """
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(_remove_sockets, resources.directory)
            process = await asyncio.to_thread(_spawn, spec, resources, self._tracker)
            machine = FakeMachine(process, resources.directory)
            undo.push_async_callback(machine.kill)
            try:
                await machine.open()
            except VmmFailure as error:
                raise explained(error, resources.vmm_log) from error
            undo.pop_all()
        return machine

    async def adopt(self, process: ProcessIdentity, resources: MachineResources) -> FakeMachine:
        """Take over a process that an earlier server started. Raises VmmFailure."""
        machine = FakeMachine(adopt(process), resources.directory)
        try:
            await machine.open()
        except BaseException:
            await machine.close()
            raise
        return machine


def _spawn(spec: MachineSpec, resources: MachineResources, tracker: Path | None) -> Process:
    devices = resources.device_state
    with _listening(resources.directory) as (control_fd, agent_fd):
        arguments = {
            "directory": str(resources.directory),
            "spec": asdict(spec),
            "memory": str(resources.memory_image),
            "devices": None if devices is None else str(devices),
            "disks": [[str(disk.path), disk.readonly] for disk in resources.disks],
            "console": str(resources.console_log),
            "control_fd": control_fd,
            "agent_fd": agent_fd,
        }
        # -S: without site packages the interpreter starts twice as fast.
        command = [sys.executable, "-S", "-m", "stillframe.vmm.fake.guest", json.dumps(arguments)]
        return spawn(
            command, output=resources.vmm_log, pass_fds=(control_fd, agent_fd),
            extra_environment={
                "PYTHONPATH": str(_PACKAGE_ROOT),
                **tracking_environment(tracker, resources.memory_image),
            },
        )  # fmt: skip


@contextlib.contextmanager
def _listening(directory: Path) -> Iterator[tuple[int, int]]:
    try:
        with (
            bind_unix(directory / "control.sock") as control,
            bind_unix(directory / "agent.sock") as agent,
        ):
            yield control.fileno(), agent.fileno()
    except OSError as error:
        raise HostFailure(f"the VM's sockets cannot be made: {error.strerror}") from error


def _remove_sockets(directory: Path) -> None:
    for name in ("control.sock", "agent.sock"):
        with contextlib.suppress(OSError):  # nobody listens there: it is only a name
            (directory / name).unlink(missing_ok=True)
