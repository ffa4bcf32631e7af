"""Capturing a running VM: the heart of snapshot, standby and live fork.

1. clone the image below (reflink, or its data) beside: it never changes, so the guest runs on;
2. back a buffer with host memory, enough for the pages that are dirty by now;
3. pause; device state; dirty pages into the buffer; the disk; resume - nothing else;
4. write the pages into the clone, zero pages as holes; make all durable.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from mmap import mmap
from typing import Any

from stillframe.engine.context import Context, LiveInstance, Phases, finish
from stillframe.host.files import clone, storage_errors
from stillframe.host.memory import (
    DirtyPages,
    prepare_buffer,
    read_dirty_pages,
    write_dirty_pages,
)
from stillframe.model.values import Instance
from stillframe.store.paths import InstancePaths, Payload
from stillframe.store.payloads import PayloadSize, seal
from stillframe.vmm.driver import Machine


@dataclass(frozen=True, slots=True)
class Captured:
    """A sealed payload: its size, how long the guest stood still (ms), pages written (bytes)."""

    size: PayloadSize
    pause_ms: float
    dirty_bytes: int


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
    Raises VmmFailure, StorageFull, HostFailure; the caller removes the payload then.
    """
    paths = context.data.instance(instance.id)
    pid = live.machine.process.pid
    with storage_errors("capture guest memory"):
        with phases.measure("clone_memory"):
            await asyncio.to_thread(clone, paths.memory, payload.memory)
        with phases.measure("prepare"):
            buffer = await asyncio.to_thread(prepare_buffer, pid, paths.memory)
        still = _Still(live.machine, paths, payload, phases, buffer, stay_paused)
        try:
            pages, pause_ms = await finish(still.run())
        except asyncio.CancelledError:
            if stay_paused:  # nobody will take it from here: the guest must not stand still
                await finish(live.machine.resume())
            raise
        try:
            with phases.measure("write_memory"):
                report = await asyncio.to_thread(write_dirty_pages, pages, payload.memory)
            with phases.measure("durable"):
                size = await asyncio.to_thread(seal, payload, manifest_facts(instance))
        except BaseException:
            if stay_paused:
                await finish(live.machine.resume())
            raise
        finally:
            pages.close()
    return Captured(size, pause_ms, report.written)


@dataclass(frozen=True, slots=True)
class _Still:
    """What happens while the guest stands still, and nothing else."""

    machine: Machine
    paths: InstancePaths
    payload: Payload
    phases: Phases
    buffer: mmap
    stay_paused: bool

    async def run(self) -> tuple[DirtyPages, float]:
        """Pause, capture, resume; the pages and the pause in milliseconds."""
        began = time.perf_counter()
        complete = False
        await self.machine.pause()
        try:
            pages = await self._capture()
            complete = True
        finally:
            if not (complete and self.stay_paused):
                await self.machine.resume()
        return pages, round((time.perf_counter() - began) * 1000, 3)

    async def _capture(self) -> DirtyPages:
        with self.phases.measure("devices"):
            await self.machine.save_devices(self.payload.devices)
        # Only now: saving may still move data between devices and guest memory.
        with self.phases.measure("read_memory"):
            pid = self.machine.process.pid
            pages = await asyncio.to_thread(read_dirty_pages, pid, self.paths.memory, self.buffer)
        if not self.stay_paused:
            with self.phases.measure("disk"):
                await asyncio.to_thread(clone, self.paths.overlay, self.payload.overlay)
        return pages


def manifest_facts(instance: Instance) -> dict[str, Any]:
    """What the manifest says about where the memory came from."""
    return {
        "hypervisor": instance.hypervisor.value,
        "hypervisor_version": instance.hypervisor_version,
        "accelerator": instance.accelerator,
        "memory_bytes": instance.memory_bytes,
        "vcpus": instance.vcpus,
        "image_digest": instance.image_digest,
        "parent_snapshot_id": instance.parent_snapshot_id,
    }
