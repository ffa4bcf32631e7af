"""One Cloud Hypervisor process: what is asked of it while it runs."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from stillframe.host.files import remove_tree, storage_errors
from stillframe.host.process import Process
from stillframe.host.threads import in_own_thread
from stillframe.model.errors import VmmFailure
from stillframe.vmm.cloud_hypervisor import api, state
from stillframe.vmm.driver import MachineResources, MachineStatus, ReadFromOutside
from stillframe.vmm.logs import EXIT_MARK, log_end, log_size
from stillframe.vmm.moments import Moment
from stillframe.vmm.names import remove_names
from stillframe.vmm.over_http import HttpMachine

API = "api.sock"
EVENTS = "events.new"  # what Cloud Hypervisor tells of itself
SAVING, LOADING = "saving.new", "loading.new"
_STATUS = {
    "Running": MachineStatus.RUNNING,
    "Paused": MachineStatus.PAUSED,
    "Shutdown": MachineStatus.SHUTDOWN,
}
_REBOOT_MARK = b"VmReboot"  # Cloud Hypervisor's last word, when it cannot boot again
_SHUTDOWN_MARK = re.compile(rb'"source": *"vmm",\s*"event": *"shutdown"')


class CloudHypervisorMachine(ReadFromOutside, HttpMachine):
    """One Cloud Hypervisor process. Implements ``Machine``."""

    def __init__(self, process: Process, resources: MachineResources) -> None:
        """``process`` was started for a VM with these ``resources``."""
        super().__init__(
            process, "Cloud Hypervisor", api, _STATUS,
            socket=resources.directory / API, agent=resources.directory / api.VSOCK,
            console_log=resources.console_log,
        )  # fmt: skip
        self._directory, self._vmm_log = resources.directory, resources.vmm_log
        self._logged_before = log_size(resources.vmm_log)

    async def save_devices(
        self, destination: Path, memory: Path | None = None, since: Moment | None = None
    ) -> None:
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
            await in_own_thread(lambda: state.pack(saving, destination))

    async def kill(self) -> None:
        """SIGKILL Cloud Hypervisor, prove its death and remove its sockets."""
        await self._process.kill()
        await self._http.close()
        clear(self._directory)

    async def wait_exit(self) -> None:
        """Return when Cloud Hypervisor is gone and it is known why."""
        await self._process.wait()
        self.shutdown_reason = self.shutdown_reason or end_of_guest(
            log_end(self._vmm_log, self._logged_before),
            log_end(self._console_log, self._printed_before),
            log_end(self._directory / EVENTS),
            self._process.exit_code,
        )


def end_of_guest(
    log: bytes, console: bytes, events: bytes, exit_code: int | None = None
) -> str | None:
    """Why the guest ended, by what Cloud Hypervisor and the guest wrote; None if that is unknown.

    After a reset it has nothing to boot a second time (``driver.py``), and says so. An orderly end
    that is no reset is the guest's: we ask for none. It shows in the exit code, of a child, and in
    the last event, which is written by another thread and may be late.
    """
    if _REBOOT_MARK in log:
        return "guest-reset"
    orderly = exit_code == 0 or _SHUTDOWN_MARK.search(events) is not None
    return "guest-shutdown" if orderly or EXIT_MARK in console else None


def clear(directory: Path) -> None:
    """Remove what only a running VMM needs, and what one that was killed left half-done."""
    remove_names(directory)
    for name in (SAVING, LOADING):
        remove_tree(directory / name)
    with contextlib.suppress(OSError):
        (directory / EVENTS).unlink(missing_ok=True)
