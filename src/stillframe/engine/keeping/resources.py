"""What the host has and who has it: figures of the kernel, the file system and the records."""

from __future__ import annotations

import asyncio

from stillframe.engine.context import Context
from stillframe.engine.keeping.interface import (
    Allotment,
    DiskUse,
    HostResources,
    InstanceShare,
    InstanceUse,
    SnapshotUse,
)
from stillframe.engine.keeping.quota import stored_bytes
from stillframe.host import capacity
from stillframe.host.extents import allocated_in
from stillframe.host.files import available_bytes, storage_errors, total_bytes
from stillframe.host.process import process_use
from stillframe.model.errors import HostFailure
from stillframe.model.values import Instance
from stillframe.store.paths import DataDirectory
from stillframe.vmm.isolation.command import TAP


async def resources(context: Context) -> HostResources:
    """The host's resources, and what instances and snapshots take of them.

    Nothing is refused for lack of processors or memory, so what is allocated may exceed them.
    """
    settings, data = context.settings, context.data
    instances = list(context.records.instances.values())
    shares = tuple(_share(instance) for instance in instances)
    with storage_errors("measure the data directory"):
        # Of snapshots as the quota counts them: a walk would count shared extents many times.
        use = await asyncio.to_thread(_disk_use, data, stored_bytes(context))
        free, total = available_bytes(data.root), total_bytes(data.root)
    spare = max(0, free - settings.min_free_bytes)
    taken = use.images + use.instances + use.snapshots
    return HostResources(
        cpu=_allotment(capacity.processors(), sum(share.cpu for share in shares)),
        memory=_allotment(capacity.memory_bytes(), sum(share.memory_bytes for share in shares)),
        disk=Allotment(total, taken + spare, taken, spare),
        # Guests share the host's own connection; none of it is set aside for anyone.
        network=_allotment(capacity.network_bytes_per_second(), 0),
        disk_use=use,
        snapshots=SnapshotUse(
            count=len(context.records.snapshots),
            stored_bytes=stored_bytes(context),
            max_snapshots=settings.max_snapshots,
            max_snapshot_bytes=settings.max_snapshot_bytes,
            min_free_bytes=settings.min_free_bytes,
        ),
        shares=shares,
    )


def instance_use(context: Context, instance_id: str) -> InstanceUse:
    """What the VMM of an instance takes, as the kernel counts it. Raises NotFound, NotSupported."""
    instance = context.instance(instance_id)
    live = context.live.get(instance_id)
    if live is None:
        return InstanceUse(instance)
    try:
        use = process_use(live.machine.process)
    except HostFailure:  # it ended just now
        return InstanceUse(instance)
    received, sent = _traffic(instance, live.machine.process.pid)
    return InstanceUse(
        instance,
        cpu_seconds=use.cpu_seconds,
        memory_resident_bytes=use.resident_bytes,
        memory_virtual_bytes=use.virtual_bytes,
        network_received_bytes=received,
        network_sent_bytes=sent,
    )


def _traffic(instance: Instance, pid: int) -> tuple[int | None, int | None]:
    """Bytes that a guest got and sent; None where nothing counts them.

    A tap device does. The network that QEMU has by itself does not: no command of QMP tells of it.
    """
    if not instance.network_enabled:
        return 0, 0
    traffic = capacity.device_traffic(pid, TAP)
    # What a device sends is what its VMM, and so the guest, gets.
    return (None, None) if traffic is None else (traffic.sent, traffic.received)


def _allotment(there_is: int, allocated: int) -> Allotment:
    return Allotment(there_is, there_is, allocated, max(0, there_is - allocated))


def _share(instance: Instance) -> InstanceShare:
    runs = instance.state.has_vmm
    return InstanceShare(
        instance.id,
        instance.name,
        cpu=instance.vcpus if runs else 0,
        memory_bytes=instance.memory_bytes if runs else 0,
        disk_bytes=instance.overlay_bytes,
        network_download_bps=instance.limits.download if runs else 0,
        network_upload_bps=instance.limits.upload if runs else 0,
        disk_io_bps=instance.limits.disk if runs else 0,
    )


def _disk_use(data: DataDirectory, snapshots: int) -> DiskUse:
    seen: set[tuple[int, int]] = set()
    # In this order: an image that a snapshot and its forks share is the snapshot's.
    allocated_in(data.snapshots, seen)
    instances = allocated_in(data.instances, seen)
    images = sum(allocated_in(place, seen) for place in (data.images, data.system, data.templates))
    return DiskUse(images, instances, snapshots)
