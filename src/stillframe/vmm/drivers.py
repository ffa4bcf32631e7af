"""Which drivers this host's server has."""

from __future__ import annotations

from pathlib import Path

from stillframe.model.units import MIB
from stillframe.vmm.cloud_hypervisor.driver import CloudHypervisorDriver
from stillframe.vmm.driver import Driver
from stillframe.vmm.firecracker.driver import FirecrackerDriver
from stillframe.vmm.qemu.boards import BOARDS
from stillframe.vmm.qemu.driver import QemuDriver
from stillframe.vmm.vz.driver import VzDriver


def make_drivers(
    qemu_binary: str,
    accelerator: str,
    cache_dir: Path | None,
    *,
    firecracker_binary: str = "firecracker",
    cloud_hypervisor_binary: str = "cloud-hypervisor",
    programs_dir: Path | None = None,
    tracker: Path | None = None,
    capture_buffer_bytes: int = 512 * MIB,
    fake: bool = False,
) -> list[Driver]:
    """All drivers, each of which finds out for itself whether it can work here.

    ``accelerator`` is auto, kvm or tcg; ``cache_dir`` keeps slow findings for the next start, if it
    is given; ``programs_dir`` is where ``stillframe setup`` installs hypervisors;
    ``tracker`` is the library that has writes to guest memory tracked; ``capture_buffer_bytes``
    bounds the host memory that each VMM which writes its guest's memory takes for that.
    The fake hypervisor runs no guest kernel and is only there when asked for by name.
    """
    drivers: list[Driver] = [
        QemuDriver(
            qemu_binary,
            accelerator=accelerator,
            cache_dir=cache_dir,
            tracker=tracker,
            hypervisor=hypervisor,
        )
        for hypervisor in BOARDS
    ]
    drivers.append(
        FirecrackerDriver(
            firecracker_binary, installed=programs_dir, scratch_bytes=capture_buffer_bytes
        )
    )
    drivers.append(
        CloudHypervisorDriver(
            cloud_hypervisor_binary, installed=programs_dir, qemu_binary=qemu_binary
        )
    )
    drivers.append(VzDriver())
    if fake:
        from stillframe.vmm.fake.driver import FakeDriver

        drivers.append(FakeDriver(tracker=tracker))
    return drivers
