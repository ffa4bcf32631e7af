"""One Firecracker process: what is asked of it while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import stat
from pathlib import Path

from stillframe.host.files import clone, storage_errors
from stillframe.host.process import Process
from stillframe.model.errors import VmmFailure
from stillframe.vmm.driver import MachineStatus
from stillframe.vmm.firecracker import api
from stillframe.vmm.firecracker.isolation import SharedDirectory
from stillframe.vmm.logs import EXIT_MARK, log_end
from stillframe.vmm.over_http import HttpMachine

_SNAPSHOT_DEADLINE = 600.0  # seconds; memory may have to go to a slow disk
_STATUS = {"Running": MachineStatus.RUNNING, "Paused": MachineStatus.PAUSED}
_SWAPS = Path("/proc/swaps")


class FirecrackerMachine(HttpMachine):
    """One Firecracker process. Implements ``Machine``."""

    def __init__(
        self,
        process: Process,
        shared: SharedDirectory,
        version: api.Version,
        *,
        loaded: bool,
        console_log: Path,
        vmm_log: Path,
    ) -> None:
        """``loaded``: its memory is a mapping of the image, not anonymous. Raises VmmFailure."""
        super().__init__(
            process, "Firecracker", api, _STATUS,
            socket=shared.api, agent=shared.agent, console_log=console_log,
        )  # fmt: skip
        self.writes_memory = not loaded
        self.version = version
        self._shared, self._vmm_log = shared, vmm_log

    async def save_devices(self, destination: Path, memory: Path | None = None) -> None:
        """Write device state; all memory too where it is anonymous (PUT /snapshot/create).

        Firecracker cannot leave memory out. After a load, what it has noted as dirty since the last
        time goes into memory of its own file tree and is dropped: it is read from outside, where
        nothing is forgotten. Raises VmmFailure, StorageFull.
        """
        if self.writes_memory and memory is None:
            raise VmmFailure("Firecracker must be given a file for the guest's memory")
        written = self._shared.memory if self.writes_memory else self._scratch
        inside = SharedDirectory.MEMORY if self.writes_memory else SharedDirectory.SCRATCH
        # Swapped pages are not resident, and would be left out of a diff.
        diff = not self.writes_memory or (self.version >= api.RESIDENT_PAGES and not _swaps())
        call = api.create_snapshot(SharedDirectory.STATE, inside, diff=diff)
        try:
            await self._http.call(call, deadline=_SNAPSHOT_DEADLINE)
            await asyncio.to_thread(_move, self._shared.state, destination)
            if self.writes_memory and memory is not None:
                await asyncio.to_thread(_move, written, memory)
        finally:
            for path in (self._shared.state, written):
                with contextlib.suppress(OSError):  # also when the process is gone, and all with it
                    path.unlink()

    @property
    def _scratch(self) -> Path:
        """The dropped memory as the host sees it: by the process's own root (proc(5))."""
        return Path(f"/proc/{self.process.pid}/root{SharedDirectory.SCRATCH}")

    async def kill(self) -> None:
        """SIGKILL Firecracker, prove its death and remove its sockets."""
        await self._process.kill()
        await self._http.close()
        await asyncio.to_thread(self._clear)

    async def wait_exit(self) -> None:
        """Return when Firecracker is gone and it is known why."""
        await self._process.wait()
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        """Note why the guest ended, keep Firecracker's log, remove what it shared with us."""
        said = log_end(self._shared.log)
        with contextlib.suppress(OSError):
            printed = log_end(self._console_log, self._printed_before)
            self.shutdown_reason = self.shutdown_reason or end_of_guest(said, printed)
            with self._vmm_log.open("ab") as kept:
                kept.write(said)
        with contextlib.suppress(OSError):
            self._shared.remove()


def end_of_guest(log: bytes, console: bytes) -> str | None:
    """Why the guest ended, by what Firecracker and the guest wrote; None if it did not end itself.

    Firecracker has no power to switch off: a guest that halts and one that reboots both end in a
    reset, and so in exit code 0. One that is shut down by its agent has said so on the console.
    What KVM could not run may end in exit code 0 as well, but not without an error.
    """
    faults = (b"KVM_EXIT_INTERNAL_ERROR", b"Unexpected exit reason")
    if b"exit_code=0" not in log or any(fault in log for fault in faults):
        return None
    return "guest-shutdown" if EXIT_MARK in console else "guest-reset"


def _swaps() -> bool:
    """Whether this host can swap memory out (proc(5): a line for each swap area, below a head)."""
    try:
        return len(_SWAPS.read_text().splitlines()) > 1
    except OSError:
        return False  # a kernel without swap


def _move(source: Path, destination: Path) -> None:
    """Move a file, to another file system by copying it. Raises StorageFull, HostFailure.

    Only a regular file without other names: nothing else that Firecracker could have put there.
    """
    try:
        source.replace(destination)
        held = destination.lstat()  # out of Firecracker's reach
        if not stat.S_ISREG(held.st_mode) or held.st_nlink > 1:
            destination.unlink()
            raise VmmFailure("what Firecracker wrote is no file")
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise VmmFailure(f"what Firecracker wrote is lost: {error.strerror}") from error
        with storage_errors("keep what Firecracker wrote"):
            destination.unlink(missing_ok=True)
            clone(source, destination)
            source.unlink()
