"""Whether KVM runs guests on this host: for hypervisors that know no other accelerator."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from stillframe.host.probes import kvm_works

_DEVICE = Path("/dev/kvm")


def kvm_reason(qemu_binary: str, device: Path = _DEVICE) -> str | None:
    """Why KVM cannot be used here; None if it can. Blocks for seconds.

    That it opens says little (see ``host/probes.py``), so a guest is tried, by QEMU.
    """
    if not device.exists():
        return f"there is no {device}"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened: add your user to the group kvm"
    if shutil.which(qemu_binary) is None:
        return f"whether it runs guests is tried with {qemu_binary}, which is not installed"
    works, said = kvm_works(qemu_binary)
    return None if works else said
