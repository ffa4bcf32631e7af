"""One Firecracker process: what is asked of it while it runs.

Firecracker's devices live in its event loop, which pausing does not stop: with the vCPUs standing
still, a packet from the tap device or bytes from the vsock socket still change guest memory and
rings (event handlers of devices/virtio). So memory read from outside after device state was written
may be of a later moment. ``PUT /snapshot/create`` is one step of that loop, so Firecracker writes
both: of memory, what was dirtied since the last time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from stillframe.host.files import (
    create_new,
    data_extents,
    open_regular,
    read_exactly,
    storage_errors,
    write_fully,
)
from stillframe.host.process import Process
from stillframe.host.runs import Runs
from stillframe.host.threads import in_own_thread
from stillframe.model.errors import StorageFull, VmmFailure
from stillframe.vmm.driver import MachineStatus
from stillframe.vmm.firecracker import api
from stillframe.vmm.firecracker.isolation import Scratch, SharedDirectory
from stillframe.vmm.logs import EXIT_MARK, log_end
from stillframe.vmm.moments import MemoryDifference, Moment
from stillframe.vmm.over_http import HttpMachine

_SNAPSHOT_DEADLINE = 600.0  # seconds; memory may have to go to a slow disk
_RESET_DEADLINE = 10.0  # seconds; nothing is written
_STATUS = {"Running": MachineStatus.RUNNING, "Paused": MachineStatus.PAUSED}
_NOWHERE = "/nowhere/file"  # no such directory is in the VMM's file tree
_SHMEM_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class FirecrackerMachine(HttpMachine):
    """One Firecracker process. Implements ``Machine``."""

    writes_memory = True
    saving_hangs_up = True  # the guest is told to drop its vsock connections, the host is not

    def __init__(
        self,
        process: Process,
        shared: SharedDirectory,
        version: api.Version,
        *,
        moment: Moment | None = None,
        told_of_reset: bool = False,
        console_log: Path,
        vmm_log: Path,
    ) -> None:
        """``moment``: since when it notes writes, if that is known.

        ``told_of_reset``: its guest stands still, and was told to reset its vsock. Raises
        VmmFailure.
        """
        super().__init__(
            process, "Firecracker", api, _STATUS,
            socket=shared.api, agent=shared.agent, console_log=console_log,
        )  # fmt: skip
        self.moment = moment
        self.version = version
        self._told_of_reset = told_of_reset
        self._shared, self._vmm_log = shared, vmm_log

    async def pause(self) -> None:
        """Stop the vCPUs; devices go on."""
        self._told_of_reset = False
        await super().pause()

    async def resume(self) -> None:
        """Let the vCPUs run.

        From 1.16 on the vsock device gives the guest nothing more after a resume until that has
        acknowledged a reset of the transport, which only saving tells it of (Firecracker's pull
        request 6100). A save that fails at its first file is enough, and touches no memory log.
        """
        if self.version >= api.RESET_AWAITED and not self._told_of_reset:
            with contextlib.suppress(VmmFailure):  # refused, as intended; or resume says what is
                call = api.create_snapshot(_NOWHERE, _NOWHERE, diff=True)
                await self._http.call(call, deadline=_RESET_DEADLINE)
        await super().resume()

    async def save_devices(
        self, destination: Path, memory: Path | None = None, since: Moment | None = None
    ) -> MemoryDifference | None:
        """Write device state, and what of memory was dirtied ``since`` (PUT /snapshot/create).

        A difference goes into memory of Firecracker's file tree, so the pause sees no disk. What is
        too much for that goes to the image at once. All memory is written when ``since`` is not the
        moment since which Firecracker keeps its log. Raises VmmFailure, StorageFull, HostFailure.
        """
        if memory is None:
            raise VmmFailure("Firecracker must be given a file for the guest's memory")
        diff = since is not None and since is self.moment
        # From here on only success tells what the log is relative to.
        self.moment = None
        with self._scratch() as scratch, contextlib.ExitStack() as undo:
            difference = None
            if not (diff and _single_pages() and await self._fits(scratch)):
                await self._save_into(memory, diff=diff)
            else:
                difference = await in_own_thread(lambda: _difference(scratch))
                undo.callback(difference.close)
            await in_own_thread(lambda: _keep_state(scratch, destination))
            undo.pop_all()
        self.moment, self._told_of_reset = Moment(), True
        return difference

    async def _fits(self, scratch: int) -> bool:
        """Have it write the difference into memory; whether there was room for it.

        Nothing is forgotten when there was not: what could not be written stays in the log
        (store_dirty_bitmap of vstate/memory.rs), so the same can be asked once more.
        """
        try:
            await self._create(Scratch.MEMORY, diff=True)
        except StorageFull:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(Path(Scratch.MEMORY).name, dir_fd=scratch)
            return False
        return True

    async def _save_into(self, memory: Path, *, diff: bool) -> None:
        """Have it write into the image itself: all of memory, or the difference."""
        inside = self._shared.memory
        with storage_errors("hand Firecracker the memory image"):
            inside.unlink(missing_ok=True)
            os.link(memory, inside, follow_symlinks=False)
        try:
            await self._create(SharedDirectory.MEMORY, diff=diff)
        finally:
            inside.unlink(missing_ok=True)

    async def _create(self, memory: str, *, diff: bool) -> None:
        call = api.create_snapshot(Scratch.STATE, memory, diff=diff)
        await self._http.call(call, deadline=_SNAPSHOT_DEADLINE)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[int]:
        """The open directory that Firecracker writes into; its names are gone afterwards."""
        try:
            scratch = Scratch.open(self.process.pid)
        except OSError as error:
            raise VmmFailure(f"Firecracker is gone: {error.strerror}") from error
        try:
            yield scratch
        finally:
            for name in (Scratch.STATE, Scratch.MEMORY):
                with contextlib.suppress(OSError):  # also when the process is gone, and all with it
                    os.unlink(Path(name).name, dir_fd=scratch)
            os.close(scratch)

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


def _single_pages() -> bool:
    """Whether files in memory grow by single pages, as Firecracker's file tree is mounted.

    Else their extents would not tell which pages were written. Only a host that forces huge pages
    on all such file systems does not keep to it (Documentation/admin-guide/mm/transhuge.rst).
    """
    try:
        return "[force]" not in _SHMEM_PAGES.read_text()
    except OSError:
        return True  # a kernel without huge pages


def _keep_state(scratch: int, destination: Path) -> None:
    """Copy the device state to where it is wanted. Raises VmmFailure, StorageFull, HostFailure."""
    with _written(scratch, Scratch.STATE) as source, storage_errors("keep the device state"):
        state = read_exactly(source, os.fstat(source).st_size, 0)
        fd = create_new(destination)
        try:
            write_fully(fd, state, 0)
        finally:
            os.close(fd)


def _difference(scratch: int) -> MemoryDifference:
    """The pages in the memory file: its data extents, for nothing else was ever in it."""
    with _written(scratch, Scratch.MEMORY) as fd:
        runs = Runs.of(data_extents(fd, os.fstat(fd).st_size))
        return MemoryDifference(os.dup(fd), runs)


@contextlib.contextmanager
def _written(scratch: int, name: str) -> Iterator[int]:
    """What Firecracker wrote, open: a regular file, nothing else that it could have put there."""
    try:
        fd = open_regular(Path(name).name, dir_fd=scratch)
    except OSError as error:
        raise VmmFailure(f"what Firecracker wrote is no file: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)
