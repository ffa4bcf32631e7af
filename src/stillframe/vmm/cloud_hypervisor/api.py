"""The requests Cloud Hypervisor is sent, as data (its openapi/cloud-hypervisor.yaml).

Paths are relative to the VM's directory, which is the VMM's working directory: the same names in
every VM, so a fork finds its own disks and sockets.

Guest memory is one zone, mapped privately from our image, when it boots and when it is restored.
A restore that copies memory, or fetches it on demand while the mapping is shared (which corrupts
the next snapshot, cloud-hypervisor issue 8525), cannot be expressed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillframe.vmm.driver import GUEST_MAC, MachineSpec
from stillframe.vmm.unix_http import Call
from stillframe.vmm.vsock import GUEST_CID

KERNEL, INITRD, MEMORY = "kernel.link", "initrd.link", "memory.link"
VSOCK = "vsock.sock"
_PREFIX = "/api/v1"


def configuration(
    spec: MachineSpec,
    *,
    arguments: str,
    disks: Sequence[tuple[str, bool]],
    initrd: bool,
    tap: str | None = None,
    mac: str = GUEST_MAC,
    confined: bool = False,
    disk_rate: int = 0,
    network_rate: int = 0,
) -> dict[str, Any]:
    """A VM as ``VmConfig``, which is what it is booted with and what it is restored with.

    ``disks`` are paths, and whether each is read-only; ``tap`` is a network device of the host,
    ``mac`` the guest's address on it; ``confined`` has it give up all other files, by Landlock.
    ``disk_rate`` limits each disk, ``network_rate`` either direction, in bytes a second; 0 is no
    limit.
    """
    payload = {"kernel": KERNEL, "cmdline": arguments}
    if initrd:
        payload["initramfs"] = INITRD
    config: dict[str, Any] = {
        "cpus": {"boot_vcpus": spec.vcpus, "max_vcpus": spec.vcpus},
        "memory": {"size": 0, "zones": [_zone(spec)]},
        "payload": payload,
        "disks": [
            _disk(index, path, readonly) | _limiter(disk_rate)
            for index, (path, readonly) in enumerate(disks)
        ],
        "rng": {"src": "/dev/urandom"},
        # Not a file: that would be emptied at every restore. The standard output appends.
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "vsock": {"id": "vsock", "cid": GUEST_CID, "socket": VSOCK},
    }
    if tap is not None:
        config["net"] = [{"id": "net", "tap": tap, "mac": mac} | _limiter(network_rate)]
    if confined:
        # What may be opened that the configuration does not name.
        config |= {"landlock_enable": True, "landlock_rules": [{"path": ".", "access": "rw"}]}
    return config


def _zone(spec: MachineSpec) -> dict[str, Any]:
    return {"id": "memory", "size": spec.memory_bytes, "file": MEMORY, "shared": False}


def _disk(index: int, path: str, readonly: bool) -> dict[str, Any]:
    return {
        "id": f"disk{index}",
        "path": path,
        "readonly": readonly,
        # Unstated, the format is guessed from what a guest may have written.
        "image_type": "Raw",
        # Unstated, it tells of the host's file, which is another in every fork.
        "serial": f"stillframe{index}",
    }


def _limiter(rate: int) -> dict[str, Any]:
    """What limits a device: so many bytes every 1000 ms."""
    bucket = {"size": rate, "refill_time": 1000}
    return {"rate_limiter_config": {"bandwidth": bucket}} if rate else {}


def create(config: Mapping[str, Any]) -> Call:
    """Describe a VM: see ``configuration``."""
    return Call("PUT", f"{_PREFIX}/vm.create", config)


def boot() -> Call:
    """Boot the VM that was created."""
    return Call("PUT", f"{_PREFIX}/vm.boot")


def pause() -> Call:
    """Stop the vCPUs."""
    return Call("PUT", f"{_PREFIX}/vm.pause")


def resume() -> Call:
    """Let the vCPUs run."""
    return Call("PUT", f"{_PREFIX}/vm.resume")


def power_button() -> Call:
    """Press the ACPI power button."""
    return Call("PUT", f"{_PREFIX}/vm.power-button")


def describe() -> Call:
    """What the VM is doing: ``state`` is Created, Running, Paused or Shutdown."""
    return Call("GET", f"{_PREFIX}/vm.info")


def snapshot(directory: str) -> Call:
    """Write config, device state and memory of a paused VM into an existing directory."""
    return Call("PUT", f"{_PREFIX}/vm.snapshot", {"destination_url": f"file://{directory}"})


def restore(directory: str) -> Call:
    """Restore a paused VM from a directory whose state names no memory: see ``state.py``."""
    return Call(
        "PUT", f"{_PREFIX}/vm.restore", {"source_url": f"file://{directory}", "prefault": False}
    )
