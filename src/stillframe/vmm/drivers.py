"""The drivers there are, made ready for one server."""

from __future__ import annotations

from pathlib import Path

from stillframe.vmm.driver import Driver
from stillframe.vmm.qemu import QemuDriver


def make_drivers(qemu_binary: str, accelerator: str, cache_dir: Path) -> list[Driver]:
    """One driver for each hypervisor; what works here is found out by their probes."""
    return [QemuDriver(qemu_binary, accelerator, cache_dir)]
