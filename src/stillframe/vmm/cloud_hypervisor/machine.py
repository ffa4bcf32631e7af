"""One Cloud Hypervisor process: what is asked of it while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path
from typing import Any

from stillframe.host.files import open_regular, remove_tree, storage_errors
from stillframe.host.process import Process
from stillframe.model.errors import VmmFailure
from stillframe.model.values import ProcessIdentity
from stillframe.vmm.cloud_hypervisor import api, state
from stillframe.vmm.driver import AgentStream, MachineResources, MachineStatus
from stillframe.vmm.names import remove_names
from stillframe.vmm.unix_http import Call, UnixHttp
from stillframe.vmm.vsock import AGENT_VSOCK_PORT, dial_vsock

API = "api.sock"
EVENTS = "events.new"  # what Cloud Hypervisor tells of itself
SAVING, LOADING = "saving.new", "loading.new"
_AGENT_DEADLINE = 120.0  # seconds for a guest to boot as far as its agent
_STATUS = {
    "Running": MachineStatus.RUNNING,
    "Paused": MachineStatus.PAUSED,
    "Shutdown": MachineStatus.SHUTDOWN,
}
_EXIT_MARK = b"STILLFRAME-EXIT nonce="  # the agent's last word before it halts the guest
_REBOOT_MARK = b"VmReboot"  # Cloud Hypervisor's last word, when it cannot boot again
_SHUTDOWN_MARK = re.compile(rb'"source": *"vmm",\s*"event": *"shutdown"')
_TAIL = 65536  # bytes of a log that are read


class CloudHypervisorMachine:
    """One Cloud Hypervisor process. Implements ``Machine``."""

    def __init__(self, process: Process, resources: MachineResources) -> None:
        """``process`` was started for a VM with these ``resources``."""
        self.process: ProcessIdentity = process.identity
        self.shutdown_reason: str | None = None
        self.writes_memory = False
        self._process = process
        self._directory = resources.directory
        self._console_log, self._vmm_log = resources.console_log, resources.vmm_log
        self._printed_before = _size(self._console_log)
        self._logged_before = _size(self._vmm_log)
        self._http = UnixHttp(
            self._directory / API, f"Cloud Hypervisor (pid {process.identity.pid})"
        )

    async def call(self, call: Call) -> Any:
        """Send a request; its answer. Raises VmmFailure, StorageFull."""
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
        """Write device state (vm.snapshot), which ends where memory would be written.

        Raises DamagedData when the state is not as expected, StorageFull.
        """
        saving = self._directory / SAVING
        with contextlib.ExitStack() as undo, storage_errors("save device state"):
            undo.callback(remove_tree, saving)
            saving.mkdir(mode=0o700)
            state.hold_memory_off(saving)
            try:
                await self._http.call(api.snapshot(SAVING))
            except VmmFailure as refusal:
                if not (refusal.facts.get("refused") and state.complete(saving)):
                    raise
            await asyncio.to_thread(state.pack, saving, destination)

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
            self._directory / api.VSOCK,
            AGENT_VSOCK_PORT,
            deadline=_AGENT_DEADLINE,
            console=self._console_log,
        )

    async def power_button(self) -> None:
        """Press the ACPI power button (vm.power-button)."""
        await self._http.call(api.power_button())

    async def kill(self) -> None:
        """SIGKILL Cloud Hypervisor, prove its death and remove its sockets."""
        await self._process.kill()
        await self._http.close()
        clear(self._directory)

    async def wait_exit(self) -> None:
        """Return when Cloud Hypervisor is gone and it is known why."""
        await self._process.wait()
        self.shutdown_reason = self.shutdown_reason or end_of_guest(
            _end_of(self._vmm_log, self._logged_before),
            _end_of(self._console_log, self._printed_before),
            _end_of(self._directory / EVENTS, 0),
        )

    async def close(self) -> None:
        """Drop the connection; Cloud Hypervisor runs on."""
        await self._http.close()
        self._process.close()


def end_of_guest(log: bytes, console: bytes, events: bytes) -> str | None:
    """Why the guest ended, by what Cloud Hypervisor and the guest wrote; None if that is unknown.

    After a reset it has nothing to boot a second time (``driver.py``), and says so. An orderly end
    that is no reset is the guest's: we ask for none.
    """
    if _REBOOT_MARK in log:
        return "guest-reset"
    orderly = _SHUTDOWN_MARK.search(events) is not None
    return "guest-shutdown" if orderly or _EXIT_MARK in console else None


def clear(directory: Path) -> None:
    """Remove what only a running VMM needs, and what one that was killed left half-done."""
    remove_names(directory)
    for name in (SAVING, LOADING):
        remove_tree(directory / name)
    with contextlib.suppress(OSError):
        (directory / EVENTS).unlink(missing_ok=True)


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0


def _end_of(log: Path, start: int) -> bytes:
    """The last of what a log holds from ``start`` on; nothing if there is none."""
    try:
        with open(open_regular(log), "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(max(start, os.fstat(file.fileno()).st_size - _TAIL))
            return file.read()
    except OSError:
        return b""
