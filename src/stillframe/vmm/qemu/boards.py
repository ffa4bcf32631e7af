"""The two machines that QEMU gives a guest: what differs in their command lines.

QEMU matches devices by their place when it loads state, so every device has a fixed one: a PCI
address on q35, a virtio-mmio transport on microvm.
"""

from __future__ import annotations

from typing import Protocol
from uuid import UUID

from stillframe.model.values import Hypervisor
from stillframe.vmm.driver import MachineSpec

AGENT_SLOT, RANDOM_SLOT, NETWORK_SLOT, FIRST_DISK_SLOT = range(4)


class Board(Protocol):
    """One kind of machine."""

    hypervisor: Hypervisor

    def machine(self, spec: MachineSpec) -> str:
        """The value of ``-M``; guest memory is the object ``mem``."""

    def virtio(self, spec: MachineSpec, kind: str, slot: int, properties: str) -> str:
        """The value of ``-device`` for a virtio device (blk, net, rng, serial) in its slot."""

    def generation(self, identity: UUID) -> list[str]:
        """The arguments that let the guest see its VMGenID, if the machine can show it."""

    def kernel_arguments(self, spec: MachineSpec) -> str:
        """What the guest's kernel must be told beside what every guest's is."""


class Q35:
    """A PC with PCI Express, ACPI and VMGenID: the default.

    Device layouts (``MachineSpec.layout``): 1 had transitional virtio devices, whose state lists
    all 1024 possible queues of each (45 KB a device, most of the time of a save or a load), and the
    chipset's SATA and SMBus controllers, which no guest of ours uses. Since 2 they are gone, and
    virtio devices are legacy ones: the state fell from 303 to 28 KB, the time to save it to less
    than half.
    """

    hypervisor = Hypervisor.QEMU
    _addresses = (0x3, 0x4, 0x5, 0x8)  # of the first device of each kind

    def machine(self, spec: MachineSpec) -> str:
        """q35 without what no guest of ours uses."""
        options = "q35,memory-backend=mem,suppress-vmdesc=on,smm=off,vmport=off"
        return options if spec.layout == 1 else f"{options},sata=off,smbus=off"

    def virtio(self, spec: MachineSpec, kind: str, slot: int, properties: str) -> str:
        """A PCI device at its address."""
        first = min(slot, FIRST_DISK_SLOT)
        address = self._addresses[first] + slot - first
        legacy = "" if spec.layout == 1 else "disable-modern=on,"
        no_rom = "romfile=," if kind == "net" else ""
        return f"virtio-{kind}-pci,{legacy}addr={address:#x},{no_rom}{properties}"

    def generation(self, identity: UUID) -> list[str]:
        """The ACPI device of VMGenID."""
        return ["-device", f"vmgenid,guid={identity}"]

    def kernel_arguments(self, spec: MachineSpec) -> str:
        """Nothing: the PC is what kernels expect."""
        return ""


class Microvm:
    """A machine of virtio-mmio devices and little else (QEMU's docs/system/i386/microvm.rst).

    Its devices are found through ACPI: distributions' kernels take none from the command line
    (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES). It has no VMGenID: forks are told who they are by their
    agent alone. virtio-mmio transports are legacy ones, QEMU's default: their state is small.
    """

    hypervisor = Hypervisor.QEMU_MICROVM

    def machine(self, spec: MachineSpec) -> str:
        """microvm with ACPI and a serial port."""
        return (
            "microvm,memory-backend=mem,suppress-vmdesc=on,acpi=on,isa-serial=on,"
            "auto-kernel-cmdline=off,ioapic2=off"
        )

    def virtio(self, spec: MachineSpec, kind: str, slot: int, properties: str) -> str:
        """A device on its virtio-mmio transport."""
        return f"virtio-{kind}-device,bus=virtio-mmio-bus.{slot},{properties}"

    def generation(self, identity: UUID) -> list[str]:
        """Nothing: microvm's ACPI tables do not describe it."""
        return []

    def kernel_arguments(self, spec: MachineSpec) -> str:
        """Clock figures under TCG: measuring them goes on for ever on a busy host now and then."""
        if spec.accelerator == "kvm":
            return ""
        return "tsc_early_khz=1000000 lpj=4000000 no_timer_check"


BOARDS: dict[Hypervisor, Board] = {board.hypervisor: board for board in (Q35(), Microvm())}
