"""The requests Firecracker is sent, as data (its swagger/firecracker.yaml; names are its own).

Paths are those of the VMM's private file tree (``isolation.py``), the same in every VM: a snapshot
therefore names no file of another VM, and a fork finds its own disks and sockets there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillframe.vmm.driver import GUEST_MAC, MachineSpec
from stillframe.vmm.unix_http import Call
from stillframe.vmm.vsock import GUEST_CID

Version = tuple[int, int, int]

VSOCK_OVERRIDE: Version = (1, 16, 0)
CLOCK_REALTIME: Version = (1, 16, 0)
TRACK_DIRTY_PAGES: Version = (1, 13, 0)  # before: enable_diff_snapshots
RESIDENT_PAGES: Version = (1, 13, 0)  # a diff without dirty tracking: see ``create_snapshot``
NETWORK_INTERFACE = "eth0"


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most ``size`` tokens (bytes, or operations) every ``refill_ms`` milliseconds."""

    size: int
    refill_ms: int = 1000

    @classmethod
    def per_second(cls, tokens: int) -> RateLimit | None:
        """So many a second; None for 0, which is no limit."""
        return cls(tokens) if tokens > 0 else None

    def body(self) -> dict[str, int]:
        """A ``TokenBucket``."""
        return {"size": self.size, "refill_time": self.refill_ms}


def machine_config(spec: MachineSpec) -> Call:
    """vCPUs and memory (MiB); memory is ordinary, not huge pages, so that forks can share it."""
    body = {
        "vcpu_count": spec.vcpus,
        "mem_size_mib": spec.memory_bytes >> 20,
        "smt": False,
        "track_dirty_pages": False,
    }
    return Call("PUT", "/machine-config", body)


def boot_source(kernel: str, initrd: str | None, arguments: str) -> Call:
    """The uncompressed kernel, its initrd and its command line."""
    body = {"kernel_image_path": kernel, "boot_args": arguments}
    if initrd is not None:
        body["initrd_path"] = initrd
    return Call("PUT", "/boot-source", body)


def drive(
    index: int,
    path: str,
    *,
    readonly: bool,
    bandwidth: RateLimit | None = None,
    operations: RateLimit | None = None,
) -> Call:
    """A raw disk; ``Writeback`` has the guest's flushes reach the device."""
    body: dict[str, Any] = {
        "drive_id": f"disk{index}",
        "path_on_host": path,
        "is_root_device": False,
        "is_read_only": readonly,
        "cache_type": "Unsafe" if readonly else "Writeback",
    }
    limits = {"bandwidth": bandwidth, "ops": operations}
    limiter = {name: limit.body() for name, limit in limits.items() if limit is not None}
    if limiter:
        body["rate_limiter"] = limiter
    return Call("PUT", f"/drives/disk{index}", body)


def vsock(path: str) -> Call:
    """The vsock device; the host's side is a Unix socket."""
    return Call("PUT", "/vsock", {"guest_cid": GUEST_CID, "uds_path": path})


def entropy() -> Call:
    """A virtio-rng device."""
    return Call("PUT", "/entropy", {})


def network(tap: str, *, download: RateLimit | None, upload: RateLimit | None) -> Call:
    """The network device, by a tap device of the host. ``download`` is what the guest receives."""
    body = {
        "iface_id": NETWORK_INTERFACE,
        "host_dev_name": tap,
        "guest_mac": GUEST_MAC,
        **_limiters(download, upload),
    }
    return Call("PUT", f"/network-interfaces/{NETWORK_INTERFACE}", body)


def limit_drive(index: int, bandwidth: RateLimit) -> Call:
    """Another limit for a disk of a VM that was loaded."""
    name = f"disk{index}"
    body = {"drive_id": name, "rate_limiter": {"bandwidth": bandwidth.body()}}
    return Call("PATCH", f"/drives/{name}", body)


def limit_network(*, download: RateLimit | None, upload: RateLimit | None) -> Call:
    """Other limits for the network device of a VM that was loaded; None leaves one as it is."""
    body = {"iface_id": NETWORK_INTERFACE, **_limiters(download, upload)}
    return Call("PATCH", f"/network-interfaces/{NETWORK_INTERFACE}", body)


def _limiters(download: RateLimit | None, upload: RateLimit | None) -> dict[str, Any]:
    limits = {"rx_rate_limiter": download, "tx_rate_limiter": upload}
    return {
        name: {"bandwidth": limit.body()} for name, limit in limits.items() if limit is not None
    }


def start() -> Call:
    """Boot."""
    return Call("PUT", "/actions", {"action_type": "InstanceStart"})


def power_button() -> Call:
    """Ctrl-Alt-Del: the only way to ask an x86 guest to shut down."""
    return Call("PUT", "/actions", {"action_type": "SendCtrlAltDel"})


def pause() -> Call:
    """Stop the vCPUs."""
    return Call("PATCH", "/vm", {"state": "Paused"})


def resume() -> Call:
    """Let the vCPUs run."""
    return Call("PATCH", "/vm", {"state": "Resumed"})


def describe() -> Call:
    """What the VM is doing: ``state`` is ``Not started``, ``Running`` or ``Paused``."""
    return Call("GET", "/")


def shape() -> Call:
    """What the VM has: ``vcpu_count``, ``mem_size_mib``."""
    return Call("GET", "/machine-config")


def create_snapshot(state: str, memory: str, *, diff: bool) -> Call:
    """Write device state and memory.

    ``diff`` leaves out the pages that were not dirtied since that is tracked. Where it is not
    tracked, those that are not in memory (mincore(2)), which of anonymous memory without swap are
    those that nobody ever wrote.
    """
    body = {
        "snapshot_type": "Diff" if diff else "Full",
        "snapshot_path": state,
        "mem_file_path": memory,
    }
    return Call("PUT", "/snapshot/create", body)


def load_snapshot(
    version: Version,
    state: str,
    memory: str,
    *,
    vsock_path: str,
    taps: Mapping[str, str] | None = None,
) -> Call:
    """Load a snapshot and stand still; ``memory`` is mapped privately, so that forks share it.

    ``taps`` are host devices by interface, whatever names the snapshot has. Dirty pages are
    tracked, so that a later ``diff`` is small. What a version cannot do is not asked of it.
    """
    body: dict[str, Any] = {
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": memory},
        "resume_vm": False,
    }
    body["track_dirty_pages" if version >= TRACK_DIRTY_PAGES else "enable_diff_snapshots"] = True
    if taps:
        body["network_overrides"] = [
            {"iface_id": name, "host_dev_name": tap} for name, tap in taps.items()
        ]
    if version >= VSOCK_OVERRIDE:
        body["vsock_override"] = {"uds_path": vsock_path}
    if version >= CLOCK_REALTIME:
        body["clock_realtime"] = True
    return Call("PUT", "/snapshot/load", body)
