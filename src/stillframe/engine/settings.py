"""What the engine must be told. Sizes are bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillframe.model.units import GIB, MIB
from stillframe.model.values import CompressionConfig, Hypervisor


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of an engine, complete and checked.

    ``accelerator`` is ``auto``, ``kvm`` or ``tcg``; ``kernel_dir`` an unpacked kernel package;
    ``programs_dir`` is where hypervisors are looked for after PATH;
    ``max_concurrent_starts`` bounds how many VMMs are being started at once;
    ``capture_buffer_bytes`` the host memory that captures together use while guests stand still
    (each has 16 MiB in any case);
    ``warm_memory_bytes`` what all warm forks together may hold;
    ``tracker_library`` is preloaded into VMMs so that writes can be tracked (None: they are not).
    ``max_snapshots`` and ``max_snapshot_bytes`` (on disk) are quotas, 0 for none;
    ``min_free_bytes`` is the space of the data directory's file system that no snapshot may take;
    ``max_archive_bytes`` bounds the files of a snapshot that is imported, holes included.
    ``default_compression`` is for snapshots and standby images whose request and instance say
    nothing (None: they stay raw); ``max_concurrent_compressions`` bounds how many are at work.
    """

    data_dir: Path
    kernel_dir: Path
    agent_binary: Path
    tracker_library: Path | None = None
    default_hypervisor: Hypervisor = Hypervisor.QEMU
    qemu_binary: str = "qemu-system-x86_64"
    firecracker_binary: str = "firecracker"
    cloud_hypervisor_binary: str = "cloud-hypervisor"
    programs_dir: Path | None = None
    accelerator: str = "auto"
    max_vcpus: int = 16
    max_memory_bytes: int = 32 * GIB
    max_overlay_bytes: int = 100 * GIB
    default_memory_bytes: int = 1 * GIB
    default_vcpus: int = 2
    default_overlay_bytes: int = 10 * GIB
    default_compression: CompressionConfig | None = None
    max_concurrent_compressions: int = 1
    max_concurrent_starts: int = 8
    capture_buffer_bytes: int = 512 * MIB
    warm_memory_bytes: int = 2 * GIB
    max_snapshots: int = 0
    max_snapshot_bytes: int = 0
    min_free_bytes: int = 256 * MIB
    max_archive_bytes: int = 256 * GIB
    boot_timeout: float = 120.0
    agent_timeout: float = 30.0
