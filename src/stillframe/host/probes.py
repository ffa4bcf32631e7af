"""Does an accelerator really run guests? Found by running one, of 512 bytes.

``/dev/kvm`` may open, create VMs and even run 32-bit code where a stock 64-bit kernel never gets
past early boot (seen with a KVM that emulates every instruction: it gives up at the first SSE
one). So the probe boots a sector that does what such a kernel does first: long mode by EFER, a
switch of page tables, cpuid, SSE, and timer interrupts out of ``hlt``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from stillframe.host.process import run_blocking
from stillframe.model.errors import StillframeError, Timeout

# isa-debug-exit ends QEMU with (value << 1) | 1 (hw/misc/debugexit.c); the sector writes 0x2a.
_PASSED = 0x2A << 1 | 1
_DEADLINE = 5.0  # seconds; the sector takes 0.2 under software emulation
_KVM = Path("/dev/kvm")
# Assembled from probe_sector.S beside this file; the command is in its head.
_CODE = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007cfcbf0010b900146631c066f3abc70600100320c7"
    "0600400320c70600200330c7060030830166b8a00200000f22e066b800100000"
    "0f22d866b9800000c00f32660d010100000f300f0116187d66b8010001800f22"
    "c0ea667c080031c08ed0bc007c0000b9800000c00f32a900040000747931c00f"
    "a2b8004000000f22d80f013c25007c000066480f6ec066480f7ec34839c37556"
    "b8fd7c0000bf00520000668907c747020800008e66c747060000c647058e0f01"
    "1c251e7d0000b811000000e620b020e621b004e621b001e621b0fee621b034e6"
    "43b0a9e640b004e64031edfbf483fd1472f9b02aeb02b001e6f4f4ebfdffc550"
    "b020e6205848cf90000000000000000000000000009a20000f00087d0000ff0f"
    "0050000000000000000000000000000000000000000000000000000000000000"
)
SECTOR = _CODE.ljust(510, b"\0") + b"\x55\xaa"


def kvm_works(qemu_binary: str) -> tuple[bool, str]:
    """Whether KVM runs 64-bit guests here, and a sentence saying why (not).

    Blocks for up to five seconds; call it from a thread, and keep the answer.
    """
    if not _KVM.exists():
        return False, "/dev/kvm does not exist (load kvm_intel or kvm_amd, or enable nested KVM)"
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return False, "no permission for /dev/kvm (add the user to the group kvm)"
    return accelerator_works(qemu_binary, "kvm")


def accelerator_works(qemu_binary: str, accelerator: str) -> tuple[bool, str]:
    """Whether ``accelerator`` (kvm or tcg) runs the boot sector, and why. Blocks likewise."""
    with tempfile.TemporaryDirectory(prefix="stillframe-probe-") as directory:
        sector = Path(directory) / "sector"
        sector.write_bytes(SECTOR)
        try:
            done = run_blocking(
                [
                    qemu_binary, "-M", "pc", "-accel", accelerator, "-m", "16M",
                    "-cpu", "host" if accelerator == "kvm" else "qemu64",
                    "-display", "none", "-nodefaults", "-no-user-config", "-no-reboot",
                    "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
                    "-drive", f"file={str(sector).replace(',', ',,')},format=raw,if=ide",
                ],
                cwd=Path(directory), timeout=_DEADLINE, check=False,
            )  # fmt: skip
        except Timeout:
            return False, f"{accelerator} starts but does not run a 64-bit guest to its end"
        except StillframeError as error:
            return False, error.message
    if done.returncode == _PASSED:
        return True, f"{accelerator} ran a 64-bit guest with interrupts"
    words = done.stderr.decode(errors="replace").strip().splitlines()
    said = words[-1] if words else "no message"
    return False, f"{accelerator} does not run guests: QEMU ended with {done.returncode} ({said})"
