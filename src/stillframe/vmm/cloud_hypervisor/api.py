"""The requests Cloud Hypervisor is sent, as data (its openapi/cloud-hypervisor.yaml).

Paths are relative to the VM's directory, which is the VMM's working directory: a snapshot therefore
names no file of another VM, and a fork finds its own disks and sockets under the same names.

Guest memory is one zone, mapped privately from our image, when it boots and when it is restored.
A restore that copies memory, or fetches it on demand while the mapping is shared (which corrupts
the next snapshot, cloud-hypervisor issue 8525), cannot be expressed here.
"""

from __future__ import annotations

from typing import Any

from stillframe.vmm.driver import MachineSpec
from stillframe.vmm.unix_http import Call
from stillframe.vmm.vsock import GUEST_CID

_PREFIX = "/api/v1"


def create(
    spec: MachineSpec,
    *,
    memory: str,
    kernel: str,
    initrd: str | None,
    arguments: str,
    disks: list[tuple[str, bool]],
    console: str,
    vsock: str,
) -> Call:
    """Describe a VM (``VmConfig``); ``disks`` are paths, and whether each is read-only."""
    payload = {"kernel": kernel, "cmdline": arguments}
    if initrd is not None:
        payload["initramfs"] = initrd
    body: dict[str, Any] = {
        "cpus": {"boot_vcpus": spec.vcpus, "max_vcpus": spec.vcpus},
        "memory": {"size": 0, "zones": [_zone(spec, memory)]},
        "payload": payload,
        "disks": [
            # Without a stated type the image is asked for its format, which a guest may have faked.
            {"id": f"disk{index}", "path": path, "readonly": readonly, "image_type": "Raw"}
            for index, (path, readonly) in enumerate(disks)
        ],
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "File", "file": console},
        "console": {"mode": "Off"},
        "vsock": {"cid": GUEST_CID, "socket": vsock},
    }
    return Call("PUT", f"{_PREFIX}/vm.create", body)


def _zone(spec: MachineSpec, memory: str) -> dict[str, Any]:
    return {"id": "memory", "size": spec.memory_bytes, "file": memory, "shared": False}


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
