"""The nouns: instances, snapshots and images as frozen values.

Sizes are bytes, times are timezone-aware UTC datetimes, phases are milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from stillframe.model.states import InstanceState


class Hypervisor(StrEnum):
    """Hypervisor types of the contract, and ``fake``: a real process without a guest kernel."""

    CLOUD_HYPERVISOR = "cloud-hypervisor"
    FIRECRACKER = "firecracker"
    QEMU = "qemu"
    QEMU_MICROVM = "qemu-microvm"
    VZ = "vz"
    FAKE = "fake"

    @property
    def seals_memory(self) -> bool:
        """Whether it keeps guest memory to itself, and saves it within state that only it can read.

        Then it alone can tell which of its versions can load that, and each save is of everything.
        """
        return self is Hypervisor.VZ


CONTRACT_HYPERVISORS = tuple(one for one in Hypervisor if one is not Hypervisor.FAKE)


class SnapshotKind(StrEnum):
    """``Standby`` holds memory, devices and disks; ``Stopped`` holds disks."""

    STANDBY = "Standby"
    STOPPED = "Stopped"


class CompressionAlgorithm(StrEnum):
    """Compression algorithms of the contract."""

    ZSTD = "zstd"
    LZ4 = "lz4"


class CompressionState(StrEnum):
    """State of a snapshot's memory representation."""

    NONE = "none"
    COMPRESSING = "compressing"
    COMPRESSED = "compressed"
    ERROR = "error"


class ImageStatus(StrEnum):
    """Progress of an image on its way to being bootable."""

    PENDING = "pending"
    PULLING = "pulling"
    CONVERTING = "converting"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """A wish for compression; algorithm and level are meaningless while ``enabled`` is false."""

    enabled: bool
    algorithm: CompressionAlgorithm | None = None
    level: int | None = None


# Lowest, highest and default level of each algorithm, by the contract.
COMPRESSION_LEVELS = {CompressionAlgorithm.ZSTD: (1, 19, 1), CompressionAlgorithm.LZ4: (0, 9, 0)}


@dataclass(frozen=True, slots=True)
class SnapshotPolicy:
    """Per-instance defaults for its snapshots and standbys."""

    compression: CompressionConfig | None = None
    standby_compression_delay: timedelta | None = None


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, told apart from any later one with the same number.

    ``start_time`` is field 22 of /proc/PID/stat, in clock ticks since boot; ``boot_id`` is
    /proc/sys/kernel/random/boot_id, so that a host reboot is noticed.
    """

    pid: int
    start_time: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What the VMM lets devices do at most, in bytes a second; 0 is no limit."""

    disk: int = 0  # each disk, reads and writes together
    download: int = 0  # what the guest receives
    upload: int = 0


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an OCI image says about running it."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    working_dir: str = "/"
    user: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """A root file system that instances boot from, keyed by its digest."""

    name: str
    digest: str
    status: ImageStatus
    created_at: datetime
    platform: str = "linux/amd64"
    size_bytes: int | None = None
    error: str | None = None
    config: ImageConfig = field(default_factory=ImageConfig)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Instance:
    """A virtual machine and everything needed to run it again.

    ``image`` is the reference as requested, ``image_digest`` what it resolved to.
    ``accelerator`` is ``kvm``, ``tcg`` or ``none``: memory made under one cannot run under another.
    ``processor`` is the one its guest sees (``vmm/driver.py``), empty where that is not known.
    ``device_layout`` says which devices its VM has, and where (``vmm/driver.py``).
    ``boot`` names the kernel and initrd pair (a digest) the disks and memory belong to.
    ``boot_nonce`` marks the console lines of the boot its memory descends from.
    ``resumed_at`` is when its guest last ran on from captured memory, ``timings_ms`` where the
    time until then went.
    ``parent_snapshot_id`` / ``parent_instance_id`` say what it was forked from (or restored to).
    ``limits`` are those of its devices, in every life of its VM and its forks'.
    ``head_snapshot_id`` is the last snapshot taken of it since then: its next one descends from it.
    ``standby_compression`` is what its standby image is to be compressed with, from
    ``standby_compression_at`` on; it says nothing in other states than Standby.
    ``expires_at`` is when it is deleted by itself; forks and restores never inherit it.
    """

    id: str
    name: str
    image: str
    image_digest: str
    state: InstanceState
    created_at: datetime
    hypervisor: Hypervisor
    memory_bytes: int
    overlay_bytes: int
    vcpus: int
    hypervisor_version: str = ""
    accelerator: str = ""
    processor: str = ""
    device_layout: int = 1
    boot: str = ""
    platform: str = "linux/amd64"
    env: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    network_enabled: bool = True
    snapshot_policy: SnapshotPolicy | None = None
    process: ProcessIdentity | None = None
    state_error: str | None = None
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    exit_code: int | None = None
    exit_message: str | None = None
    phase_since: datetime | None = None
    phase_durations_ms: Mapping[str, int] = field(default_factory=dict)
    parent_snapshot_id: str | None = None
    parent_instance_id: str | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    resumed_at: datetime | None = None
    boot_nonce: str = ""
    head_snapshot_id: str | None = None
    standby_compression: CompressionConfig | None = None
    standby_compression_at: datetime | None = None
    expires_at: datetime | None = None
    limits: DeviceLimits = field(default_factory=DeviceLimits)

    @property
    def has_snapshot(self) -> bool:
        """Whether a standby image is on disk (the contract's word for it)."""
        return self.state is InstanceState.STANDBY


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A write-once capture of an instance.

    ``template`` is the source instance as it was at the capture: what a fork starts from.
    ``size_bytes`` is the apparent size of the payload, ``stored_bytes`` what it takes on disk, but
    for what it shares with the snapshot ``stored_beside``, where that is counted.
    ``pause_ms`` is how long the guest stood still; ``timings_ms`` says where the time went.
    ``warm_count`` is how many forks are to stand ready, loaded and waiting.
    ``parent_snapshot_id`` is the snapshot its state descends from: the one before it of the same
    instance, or the one that instance was forked from or restored to.
    ``compression`` is the effective configuration, None while the memory is not to be compressed;
    the compressed and uncompressed sizes are those of the memory, known once it is compressed.
    A ``pinned`` one is deleted by a person with force only, never because it expired.
    ``damaged`` says what the last verification found damaged (None: nothing, or it was none).
    """

    id: str
    kind: SnapshotKind
    source_instance_id: str
    source_instance_name: str
    source_hypervisor: Hypervisor
    created_at: datetime
    size_bytes: int
    template: Instance
    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    stored_bytes: int = 0
    pause_ms: float | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    compression: CompressionConfig | None = None
    compression_state: CompressionState = CompressionState.NONE
    compression_error: str | None = None
    compressed_size_bytes: int | None = None
    uncompressed_size_bytes: int | None = None
    parent_snapshot_id: str | None = None
    warm_count: int = 0
    description: str | None = None
    expires_at: datetime | None = None
    pinned: bool = False
    damaged: str | None = None
    stored_beside: str | None = None


@dataclass(frozen=True, slots=True)
class ClockReading:
    """What a server tells the next one about the time (UTC).

    ``believed`` is the time that deletions go by, ``wall`` what the wall clock said then, ``held``
    how long it had held to that, as far as servers have looked on.
    """

    believed: datetime
    wall: datetime
    held: timedelta


@dataclass(frozen=True, slots=True)
class PathInfo:
    """What the guest says about one path. ``mode`` is the permission bits, ``size`` bytes."""

    exists: bool
    is_dir: bool = False
    is_file: bool = False
    is_symlink: bool = False
    link_target: str | None = None
    mode: int = 0
    size: int = 0
    error: str | None = None
