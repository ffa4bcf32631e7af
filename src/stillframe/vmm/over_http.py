"""What machines that are controlled over an HTTP socket, with an agent on vsock, have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from stillframe.host.process import Process
from stillframe.model.values import ProcessIdentity
from stillframe.vmm.driver import AgentStream, MachineStatus, NoDiskCopies
from stillframe.vmm.logs import log_size
from stillframe.vmm.unix_http import Call, UnixHttp
from stillframe.vmm.vsock import AGENT_VSOCK_PORT, dial_vsock

_AGENT_DEADLINE = 120.0  # seconds for a guest to boot as far as its agent


class Calls(Protocol):
    """The requests of one VMM's API (a module)."""

    def describe(self) -> Call:
        """What the VM is doing; the answer has a ``state``."""

    def pause(self) -> Call:
        """Stop the vCPUs."""

    def resume(self) -> Call:
        """Let the vCPUs run."""

    def power_button(self) -> Call:
        """Ask the guest to shut down."""


class HttpMachine(NoDiskCopies):
    """A process that listens at ``socket``; a base for implementations of ``Machine``.

    ``agent`` is the host's side of the guest's vsock device; ``states`` are the API's words.
    """

    def __init__(
        self,
        process: Process,
        name: str,
        calls: Calls,
        states: Mapping[str, MachineStatus],
        *,
        socket: Path,
        agent: Path,
        console_log: Path,
    ) -> None:
        self.process: ProcessIdentity = process.identity
        self.shutdown_reason: str | None = None
        self.lacks_space = asyncio.Event()
        self._process, self._calls, self._states = process, calls, states
        self._agent, self._console_log = agent, console_log
        self._printed_before = log_size(console_log)
        self._http = UnixHttp(socket, f"{name} (pid {process.identity.pid})")

    async def call(self, call: Call) -> Any:
        """Send a request; its answer. Raises VmmFailure, StorageFull."""
        return await self._http.call(call)

    async def status(self) -> MachineStatus:
        """Ask for the state of the VM."""
        told = await self._http.call(self._calls.describe())
        return self._states.get(told["state"], MachineStatus.UNKNOWN)

    async def pause(self) -> None:
        """Stop the vCPUs."""
        await self._http.call(self._calls.pause())

    async def resume(self) -> None:
        """Let the vCPUs run."""
        await self._http.call(self._calls.resume())

    async def power_button(self) -> None:
        """Ask the guest to shut down."""
        await self._http.call(self._calls.power_button())

    async def dial_agent(self) -> AgentStream:
        """Connect to the agent's vsock port."""
        return await dial_vsock(
            self._agent, AGENT_VSOCK_PORT, deadline=_AGENT_DEADLINE, console=self._console_log
        )

    async def close(self) -> None:
        """Drop the connection; the VMM runs on."""
        await self._http.close()
        self._process.close()
