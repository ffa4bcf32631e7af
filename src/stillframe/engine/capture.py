"""Capturing a running VM: the heart of snapshot, standby and live fork.

1. clone the image below (reflink, or its data) beside: it never changes, so the guest runs on;
2. copy ahead what can be copied while the guest runs: memory (``host/capture.py``), and the disk
   where the file system cannot share its blocks;
3. pause; device state; the pages and disk blocks that are left; resume - nothing else;
4. write the buffer into the clone, zero pages as holes; digest what changed; make all durable.

The image below is the one of the last capture of this VMM, if there is one still, so that a second
snapshot stores what changed since the first; else the one that the VMM maps.

Where the VMM writes memory itself, it does so together with device state, and the image below is
the one of the moment since which it has noted writes (``vmm/moments.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from stillframe.engine.context import Context, LiveInstance, Phases, finish
from stillframe.host.capture import MemoryCapture
from stillframe.host.files import clone, copy_into, create_sparse, fsync_data, storage_errors
from stillframe.host.image import drop_zeros, merge_pages, open_private
from stillframe.host.memory import GuestMemory
from stillframe.host.runs import Runs
from stillframe.model.errors import DamagedData, VmmFailure
from stillframe.model.values import Instance
from stillframe.store.digests import update_table, write_table
from stillframe.store.manifest import file_entries, read_manifest
from stillframe.store.paths import InstancePaths, Payload
from stillframe.store.payloads import PayloadSize, seal
from stillframe.store.readers import FileReader
from stillframe.vmm.moments import MemoryDifference, Moment

OVERLAY = 1  # the writable disk's place among a VM's disks
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Captured:
    """A sealed payload: its size, and how long the guest stood still (ms).

    ``moment`` is the one of the capture, where the VMM notes writes: whoever moves the image to
    where it stays tells it so.
    """

    size: PayloadSize
    pause_ms: float
    moment: Moment | None = None


async def capture(
    context: Context,
    instance: Instance,
    live: LiveInstance,
    payload: Payload,
    phases: Phases,
    *,
    stay_paused: bool = False,
) -> Captured:
    """Capture memory, devices and (unless ``stay_paused``) the disk into an existing empty payload.

    The guest runs again afterwards, also on failure; with ``stay_paused`` it stands still if all
    went well, and its own disk is part of the capture. The payload is durable on return.
    Raises VmmFailure, StorageFull, HostFailure, and DamagedData when what the memory would be built
    on has changed on disk; the caller removes the payload then.
    """
    # A thread of its own: the pause must not wait for one of the shared threads.
    with ThreadPoolExecutor(1, "capture") as thread, storage_errors("capture guest memory"):
        one = _Capture(
            context, instance, live, payload,
            phases=phases, stay_paused=stay_paused, thread=thread,
        )  # fmt: skip
        stands_still = False
        try:
            try:
                with phases.measure("disk_ahead"):
                    await one.disk_ahead()
                with phases.measure("memory_ahead"):
                    await one.in_thread(one.memory_ahead)
                pause_ms = await one.pause()
                stands_still = stay_paused
                with phases.measure("write_memory"):
                    await one.in_thread(one.after)
                with phases.measure("digest"):
                    tables = await one.in_thread(one.digest)
                with phases.measure("durable"):
                    size = await one.in_thread(
                        lambda: seal(payload, manifest_facts(instance), tables)
                    )
                if one.moment is not None:
                    one.moment.is_kept_in(payload.memory)
            except DamagedData as error:
                raise one.of_below(error) from error
            finally:
                await finish(one.close())
        except BaseException:
            if stands_still:  # and nobody will take the guest from here
                await finish(live.machine.resume())
            raise
    return Captured(size, pause_ms, one.moment)


class _Capture:
    """What one capture holds open, and its steps."""

    def __init__(
        self,
        context: Context,
        instance: Instance,
        live: LiveInstance,
        payload: Payload,
        *,
        phases: Phases,
        stay_paused: bool,
        thread: ThreadPoolExecutor,
    ) -> None:
        self._context = context
        self._instance = instance
        self._machine = live.machine
        self._live = live
        self._paths: InstancePaths = context.data.instance(instance.id)
        self._payload = payload
        self._phases = phases
        self._stay_paused = stay_paused
        self._thread = thread
        self._budget = context.capture_budget
        self._held = ExitStack()
        self._memory: MemoryCapture | None = None
        self._below: Moment | None = None
        self._difference: MemoryDifference | None = None
        self.moment: Moment | None = None
        self._copying = False
        self._image_below: FileReader | None = None  # where its table has been cloned too
        self._table_digest: str | None = None  # of the table below, where a manifest has it
        self._snapshot_below = ""

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run blocking ``work`` in the capture's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def disk_ahead(self) -> None:
        """While the guest runs: copy its disk, where that cannot be done in no time by reflink."""
        overlay, copy = self._paths.overlay, self._payload.overlay
        if not self._stay_paused and not self._context.shares_blocks:
            create_sparse(copy, overlay.stat().st_size)
            self._copying = True  # half of it may be begun even if it fails
            self._copying = await self._machine.begin_disk_copy(OVERLAY, copy)
            if self._copying:
                await self.in_thread(lambda: copy_into(overlay, copy))
            else:
                copy.unlink()

    def memory_ahead(self) -> None:
        """While the guest runs: the clone of the image below, and what can be copied ahead."""
        if self._machine.writes_memory:
            self._clone_moment()
            return
        incremental = self._clone_below()
        if not self._context.shares_blocks:  # the clone was a copy: see MemoryCapture on flushing
            fsync_data(self._payload.memory)
        memory = self._held.enter_context(
            GuestMemory(self._machine.process.pid, self._paths.memory)
        )
        fd = self._held.enter_context(open_private(self._payload.memory))
        self._memory = MemoryCapture(memory, fd, incremental=incremental, budget=self._budget)
        self._held.callback(self._memory.close)
        self._memory.ahead()
        # Stopping a guest flushes its disks: what is flushed now need not be flushed then.
        fsync_data(self._paths.overlay)
        self._memory.again()  # the guest has had time to write meanwhile

    def _clone_moment(self) -> None:
        """Clone the image since which the VMM has noted writes; an empty one where that is gone."""
        moment, memory = self._machine.moment, self._payload.memory
        image = None if moment is None else moment.image
        if moment is not None and image is not None and not self._known_damaged(image):
            with contextlib.suppress(FileNotFoundError):
                self._clone_image(image, image.with_name(f"{image.name}.blake3"))
                if moment.image == image:  # still: nothing took its place
                    self._below = moment
                    return
            self._forget_clone()
        create_sparse(memory, self._paths.memory.stat().st_size)

    def _clone_below(self) -> bool:
        """Clone the last capture's image (true), or, if that is gone, the one that is mapped."""
        # Until this capture has succeeded, no image says what the pages written since belong to.
        last, self._live.captured = self._live.captured, None
        if last is not None and not self._known_damaged(last.memory):
            with contextlib.suppress(FileNotFoundError):  # that snapshot was deleted
                self._clone_image(last.memory, last.table(last.memory.name))
                if self._image_below is not None:
                    return True
            self._forget_clone()
        self._clone_image(self._paths.memory, self._paths.memory_table)
        return False

    def _known_damaged(self, image: Path) -> bool:
        snapshot = self._context.records.snapshots.get(image.parent.name)
        return snapshot is not None and snapshot.damaged is not None

    def _clone_image(self, image: Path, table: Path) -> None:
        """Clone an image and its digest table; it can still be read when its names are gone."""
        self._snapshot_below = image.parent.name
        below = self._held.enter_context(FileReader(image))
        clone(image, self._payload.memory)
        with contextlib.suppress(FileNotFoundError):  # what was booted cold has no table
            clone(table, self._payload.table(self._payload.memory.name))
            self._image_below = below
            self._table_digest = _digest_in(image.with_name("manifest.json"), image.name)

    def _forget_clone(self) -> None:
        memory = self._payload.memory
        for path in (memory, self._payload.table(memory.name)):
            path.unlink(missing_ok=True)
        self._image_below = self._table_digest = None

    async def pause(self) -> float:
        """Pause, take what is left, resume; the milliseconds the guest stood still."""
        try:
            return await finish(self._pause())
        except asyncio.CancelledError:
            if self._stay_paused:  # nobody will take it from here
                await finish(self._machine.resume())
            raise

    async def _pause(self) -> float:
        if not self._machine.saving_hangs_up:
            return await self._stand_still()
        if self._live.greeting is not None:  # or a fork would never get its identity
            await asyncio.wait([self._live.greeting])
        try:
            return await self._stand_still()
        finally:
            await self._live.hang_up("this hypervisor does so when memory is captured")

    async def _stand_still(self) -> float:
        began = time.perf_counter()
        complete = False
        with self._phases.measure("stop"):
            await self._stop()
        try:
            await self._take()
            complete = True
        finally:
            if not (complete and self._stay_paused):
                with self._phases.measure("resume"):
                    await self._machine.resume()
        return round((time.perf_counter() - began) * 1000, 3)

    async def _stop(self) -> None:
        """Have the guest stand still. Raises VmmFailure; it runs then, or will."""
        try:
            await self._machine.pause()
        except VmmFailure:
            # A VMM that hangs hears both when it wakes. Its guest would stand still for good.
            with contextlib.suppress(VmmFailure):
                await self._machine.resume()
            raise

    async def _take(self) -> None:
        parts = await asyncio.gather(self._take_memory(), self._take_disk(), return_exceptions=True)
        for failure in (part for part in parts if part is not None):
            raise failure  # only now: nothing of the other part may go on when the guest does

    async def _take_memory(self) -> None:
        with self._phases.measure("devices"):
            if self._machine.writes_memory:
                self._difference = await self._machine.save_devices(
                    self._payload.devices, self._payload.memory, self._below
                )
                self.moment = self._machine.moment
                return
            await self._machine.save_devices(self._payload.devices)
        # Only now: saving may still move data between devices and guest memory.
        if self._memory is not None:
            with self._phases.measure("read_memory"):
                await self.in_thread(self._memory.still)

    async def _take_disk(self) -> None:
        if self._stay_paused:
            return
        with self._phases.measure("disk"):
            if self._copying:
                await self._machine.finish_disk_copy(OVERLAY)
            else:
                await self.in_thread(lambda: clone(self._paths.overlay, self._payload.overlay))

    def after(self) -> None:
        """When the guest runs again (or will not): write what was taken."""
        if self._memory is not None:
            self._memory.after()
        elif self._difference is not None:
            with open_private(self._payload.memory) as fd:
                merge_pages(self._difference.fd, self._difference.runs, fd)
        else:  # the VMM has written into it, zeros too
            with open_private(self._payload.memory) as fd:
                drop_zeros(fd)
        if self._stay_paused:  # its own disk is part of the capture, and no copy is made of it
            fsync_data(self._paths.overlay)

    def digest(self) -> dict[str, str]:
        """Make the image's digest table, from the one below where there is one: see ``seal``."""
        memory = self._payload.memory
        table, below, runs = self._payload.table(memory.name), self._image_below, self._changed()
        with FileReader(memory) as image:
            if below is None or runs is None:
                table.unlink(missing_ok=True)
                return {memory.name: write_table(image, table)}
            changed = ((start, end - start) for some in runs for start, end in some)
            return {
                memory.name: update_table(image, table, below, changed, known=self._table_digest)
            }

    def of_below(self, error: DamagedData) -> DamagedData:
        """What a damaged image below means for this capture; its snapshot is marked."""
        records, facts = self._context.records, error.facts
        found = f"{error.message} ({facts.get('length', 0)} bytes at {facts.get('offset', 0)})"
        snapshot = records.snapshots.get(self._snapshot_below)
        if snapshot is None:
            what = f"the memory image that {self._instance.name} runs on is damaged"
            hint = "its memory there cannot be told from damage: go back to an older snapshot"
        else:
            what = f"snapshot {snapshot.name or snapshot.id}, on which this one built, is damaged"
            hint = "ask again: the next one is built without it"
            records.update_snapshot(replace(snapshot, damaged=found), can_wait=True)
        refused = DamagedData(f"{what}: {found}", hint=hint)
        refused.facts.update(facts)
        return refused

    def _changed(self) -> list[Runs] | None:
        """What differs from the image below; None if that is not known."""
        if self._memory is not None:
            return self._memory.changed
        return None if self._difference is None else [self._difference.runs]

    async def close(self) -> None:
        """Close what was opened."""
        if self._difference is not None:
            self._held.callback(self._difference.close)
        await self.in_thread(self._held.close)
        if self._copying:
            with contextlib.suppress(VmmFailure):  # a VMM that is gone holds nothing open
                await self._machine.end_disk_copy(OVERLAY)


def _digest_in(manifest: Path, name: str) -> str | None:
    """The digest of a file's table as a manifest has it. Raises DamagedData.

    None without a manifest: what an instance maps has none, and a snapshot may be deleted just now.
    """
    try:
        entry = file_entries(read_manifest(manifest)).get(name)
    except DamagedData:
        if manifest.exists():
            raise
        return None
    return None if entry is None else entry.table_blake3


def manifest_facts(instance: Instance) -> dict[str, Any]:
    """What the manifest says about where the memory came from."""
    return {
        "hypervisor": instance.hypervisor.value,
        "hypervisor_version": instance.hypervisor_version,
        "accelerator": instance.accelerator,
        "processor": instance.processor,
        "memory_bytes": instance.memory_bytes,
        "vcpus": instance.vcpus,
        "image_digest": instance.image_digest,
        "parent_snapshot_id": instance.parent_snapshot_id,
    }
