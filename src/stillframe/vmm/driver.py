"""The driver protocol: what Stillframe asks of every hypervisor, and nothing more.

Two types are kept apart: ``MachineSpec`` is what a snapshot records about a VM (it must be equal
when memory is loaded again), ``MachineResources`` is what the restoring host supplies (paths,
identity), which differs for every fork.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol
from uuid import UUID

from stillframe.model.errors import VmmFailure
from stillframe.model.values import DeviceLimits, Hypervisor, ProcessIdentity


@dataclass(frozen=True, slots=True)
class DriverProbe:
    """What a hypervisor offers on this host, as found by trying.

    ``reason`` says in a sentence why it is unavailable, or emulated; ``hint`` how to mend it.
    ``processor`` is what its guests see as theirs: the host's under KVM, a model by name otherwise.
    ``features`` uses the contract's runtime feature ids (snapshots, standby, fork, pause, ...).
    """

    hypervisor: Hypervisor
    available: bool
    version: str = ""
    accelerator: str = ""
    processor: str = ""
    features: tuple[str, ...] = ()
    reason: str | None = None
    hint: str | None = None


def without_driver(hypervisor: Hypervisor) -> DriverProbe:
    """What is found of a hypervisor of the contract for which there is no driver."""
    return DriverProbe(
        hypervisor,
        False,
        reason=f"this version of Stillframe has no driver for {hypervisor.value}",
        hint="use another hypervisor",
    )


# The devices that a VM booted now gets. Memory loads only into the layout it was captured with, so
# an older one stays known: 1 had transitional virtio devices and SATA (QEMU).
DEVICE_LAYOUT = 2
# The address of a guest's network device: each has a network of its own, so all have the same one.
GUEST_MAC = "52:54:00:12:34:56"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """The part of a VM its memory image depends on. ``memory_bytes`` is a multiple of 2 MiB."""

    memory_bytes: int
    vcpus: int
    accelerator: str
    network: bool = True
    layout: int = DEVICE_LAYOUT


def check_shape(spec: MachineSpec, memory_image: Path) -> None:
    """Raises VmmFailure for an image that is not of exactly the size of the VM's memory."""
    try:
        size = memory_image.stat().st_size
    except OSError as error:
        raise VmmFailure(f"the memory image cannot be looked at: {error.strerror}") from error
    if size != spec.memory_bytes:
        raise VmmFailure(
            f"the memory image has {size} bytes, the VM {spec.memory_bytes}", size=size
        )


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw disk, in the order the guest sees them (first is /dev/vda)."""

    path: Path
    readonly: bool


class Limit(StrEnum):
    """What a hypervisor can limit."""

    DISK = "disk"
    BANDWIDTH = "bandwidth"  # either direction, each by a figure of its own
    BANDWIDTH_ALIKE = "bandwidth, both directions alike"  # both directions, by one figure


def unkept(limits: DeviceLimits, can: frozenset[Limit]) -> list[str]:
    """Which of ``limits`` cannot be kept where ``can`` is possible, by the contract's fields."""
    fields = ["disk_io_bps"] if limits.disk and Limit.DISK not in can else []
    alike = Limit.BANDWIDTH_ALIKE in can and limits.download == limits.upload
    if Limit.BANDWIDTH in can or alike:
        return fields
    fields += ["network.bandwidth_download"] if limits.download else []
    fields += ["network.bandwidth_upload"] if limits.upload else []
    return fields


@dataclass(frozen=True, slots=True)
class MachineResources:
    """What this host supplies to one VMM process.

    ``directory`` is private to the VM and receives the sockets; ``memory_image`` is an existing
    file of exactly ``memory_bytes``, mapped privately and never written; ``device_state`` is None
    for a cold boot; ``generation_id`` is fresh for every boot and fork (VMGenID). Those of
    ``limits`` that are set hold before the guest's first step, whatever device state says (see
    ``Driver.limits``).
    """

    directory: Path
    memory_image: Path
    disks: tuple[Disk, ...]
    kernel: Path
    initrd: Path
    kernel_arguments: str
    generation_id: UUID
    console_log: Path
    vmm_log: Path
    device_state: Path | None = None
    limits: DeviceLimits = field(default_factory=DeviceLimits)


class MachineStatus(StrEnum):
    """What the VMM says of its guest."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    UNKNOWN = "unknown"


AgentStream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
EventListener = Callable[[str], Awaitable[None] | None]


class Machine(Protocol):
    """One VMM process with one guest. Raises VmmFailure when the VMM refuses, dies or hangs."""

    process: ProcessIdentity
    # Why the guest ended, once it has: guest-shutdown, guest-reset, guest-panic or host-...
    shutdown_reason: str | None
    # Set while the VMM has the guest stand still because the file of a disk found no space; it goes
    # on with ``resume``. Never where guests are told of an error instead.
    lacks_space: asyncio.Event
    # Whether the VMM must write guest memory itself, because it is no private mapping of the
    # memory image that could be read from outside: see ``save_devices``.
    writes_memory: bool

    async def status(self) -> MachineStatus:
        """Ask the VMM what its guest is doing."""

    async def pause(self) -> None:
        """Stop all vCPUs; on return guest memory and flushed disks no longer change."""

    async def resume(self) -> None:
        """Let the vCPUs run (on)."""

    async def save_devices(self, destination: Path, memory: Path | None = None) -> None:
        """Write device state without RAM, of a paused guest, to a new file. Not fsynced.

        Where ``writes_memory``, ``memory`` is a clone of the image that the VMM was started with,
        and on return it is the guest's memory as it stands.
        """

    async def begin_disk_copy(self, index: int, copy: Path) -> bool:
        """Note from now on what changes on the writable disk ``index``, while the guest runs.

        ``copy`` is an existing file of the disk's size, into which the caller then copies what the
        disk holds. False where the VMM cannot: then the disk has to be copied during the pause.
        """

    async def finish_disk_copy(self, index: int) -> None:
        """Write what has changed since into the copy; the guest stands still. Not fsynced.

        Raises StorageFull too.
        """

    async def end_disk_copy(self, index: int) -> None:
        """Stop noting, and close the copy. No error when there is none."""

    async def dial_agent(self) -> AgentStream:
        """Open the byte stream to the guest agent's port (one connection at a time)."""

    async def power_button(self) -> None:
        """Ask the guest to shut down (ACPI power button)."""

    async def kill(self) -> None:
        """SIGKILL the VMM and wait for proof of death. No error if it is dead already."""

    async def wait_exit(self) -> None:
        """Return when the VMM process is gone."""

    async def close(self) -> None:
        """Drop our connections and leave the VMM running."""


class NoDiskCopies:
    """A base for machines whose VMM does not tell what changes on a disk."""

    async def begin_disk_copy(self, index: int, copy: Path) -> bool:
        """Refused: the disk has to be copied during the pause."""
        return False

    async def finish_disk_copy(self, index: int) -> None:
        """Nothing: no copy is ever under way."""

    async def end_disk_copy(self, index: int) -> None:
        """Nothing: no copy is ever under way."""


class Driver(Protocol):
    """One hypervisor on this host. ``limits`` is what it can limit, wherever it is available."""

    hypervisor: Hypervisor
    limits: frozenset[Limit]

    async def probe(self) -> DriverProbe:
        """Try what works here. Never raises for an absent hypervisor; caches its finding."""

    async def start(self, spec: MachineSpec, resources: MachineResources) -> Machine:
        """Spawn a VMM in its own session (it outlives us).

        Without ``resources.device_state`` the guest boots and runs. With it, devices are loaded,
        memory is the private mapping of the image, and the guest stands still until ``resume``.
        On failure nothing is left behind. Raises VmmFailure, MissingComponent.
        """

    async def adopt(self, process: ProcessIdentity, resources: MachineResources) -> Machine:
        """Take over a VMM that an earlier server started. Raises VmmFailure if it is not there."""
