"""Health, capabilities and resources on the wire."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from stillframe.api.schemas.base import Answer
from stillframe.engine.keeping.interface import Allotment, HostResources


class Health(Answer):
    """The server answers."""

    status: Literal["ok"] = "ok"


class ServerInfo(Answer):
    """Which server this is; ``api_version`` is that of the contract it speaks."""

    version: str
    api_version: str


class HostInfo(Answer):
    """Operating system and processor of the host, in Go's words (linux, amd64)."""

    os: str
    arch: str


class DefaultRuntime(Answer):
    """The hypervisor used when a request names none."""

    name: str
    available: bool


class Runtime(Answer):
    """One hypervisor on this host. Fields after ``features`` are Stillframe's own.

    ``reason`` says why it is unavailable, or emulated; ``hint`` how to mend it.
    """

    name: str
    available: bool
    features: list[str]
    version: str | None = None
    accelerator: str | None = None
    reason: str | None = None
    hint: str | None = None


class NetworkInfo(Answer):
    """What guests can reach."""

    model: Literal["bridge", "nat"]
    guest_to_guest: bool
    subnet: str | None = None
    gateway: str | None = None


class ImagesInfo(Answer):
    """Platforms whose images can run here."""

    default_platform: str
    platforms: list[str]


class Capabilities(Answer):
    """What this server can do on this host."""

    server: ServerInfo
    host: HostInfo
    default_runtime: DefaultRuntime
    runtimes: list[Runtime]
    network: NetworkInfo
    images: ImagesInfo
    features: list[str]


class ResourceStatus(Answer):
    """One resource: vCPUs, bytes, or bytes per second; a capacity of 0 is unknown.

    ``available`` is never below 0. ``source`` says how the capacity was found. ``enforced`` is
    Stillframe's own: whether anything is refused for lack of it. Of the disk snapshots are; nothing
    is for lack of vCPUs, memory or network, so more than there is may be allocated, and
    ``oversub_ratio`` says no more than that ``effective_limit`` is the capacity.
    """

    type: str
    capacity: int
    effective_limit: int
    allocated: int
    available: int
    oversub_ratio: float = 1.0
    source: str = "detected"
    enforced: bool = False

    @classmethod
    def of(cls, type: str, allotment: Allotment) -> ResourceStatus:
        """The wire form of a resource."""
        return cls(
            type=type,
            capacity=allotment.capacity,
            effective_limit=allotment.effective_limit,
            allocated=allotment.allocated,
            available=allotment.available,
            enforced=type == "disk",
        )


class DiskBreakdown(Answer):
    """Bytes on disk. ``snapshots_bytes`` is Stillframe's own.

    ``overlays_bytes`` is all that instances hold: writable disks, memory of their own, logs. An
    image that a snapshot shares with its forks counts once, for the snapshot.
    """

    images_bytes: int
    oci_cache_bytes: int = 0
    overlays_bytes: int
    volumes_bytes: int = 0
    snapshots_bytes: int


class ResourceAllocation(Answer):
    """What one instance has; without a VMM no vCPUs, no memory and no limits.

    The contract's ``bps`` are bytes a second; 0 is no limit.
    """

    instance_id: str
    instance_name: str
    cpu: int
    memory_bytes: int
    disk_bytes: int
    network_download_bps: int = 0
    network_upload_bps: int = 0
    disk_io_bps: int = 0


class SnapshotQuota(Answer):
    """How much the snapshots take, and their limits (0: none)."""

    count: int
    stored_bytes: int
    max_snapshots: int
    max_snapshot_bytes: int
    min_free_bytes: int


class Resources(Answer):
    """What the host has and who has it. ``snapshots`` is Stillframe's own."""

    cpu: ResourceStatus
    memory: ResourceStatus
    disk: ResourceStatus
    network: ResourceStatus
    disk_breakdown: DiskBreakdown
    allocations: list[ResourceAllocation]
    snapshots: SnapshotQuota

    @classmethod
    def of(cls, resources: HostResources) -> Resources:
        """The wire form of the host's resources."""
        return cls(
            cpu=ResourceStatus.of("cpu", resources.cpu),
            memory=ResourceStatus.of("memory", resources.memory),
            disk=ResourceStatus.of("disk", resources.disk),
            network=ResourceStatus.of("network", resources.network),
            disk_breakdown=DiskBreakdown(
                images_bytes=resources.disk_use.images,
                overlays_bytes=resources.disk_use.instances,
                snapshots_bytes=resources.disk_use.snapshots,
            ),
            allocations=[ResourceAllocation(**asdict(share)) for share in resources.shares],
            snapshots=SnapshotQuota(**asdict(resources.snapshots)),
        )
