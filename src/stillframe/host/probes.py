"""Does an accelerator really run guests? Found by running one, of 512 bytes.

``/dev/kvm`` may open, create VMs and even run 32-bit code where a stock 64-bit kernel never gets
past early boot (seen with a KVM that emulates every instruction: it gives up at the first SSE
one). So the probe boots a sector that does what such a kernel does first: long mode by EFER, a
switch of page tables, cpuid, SSE, and timer interrupts out of ``hlt``.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

from stillframe.host.process import run_blocking
from stillframe.model.errors import StillframeError, Timeout

# isa-debug-exit ends QEMU with (value << 1) | 1 (hw/misc/debugexit.c); the sector writes 0x2a.
_PASSED = 0x2A << 1 | 1
_DEADLINE = 5.0  # seconds; the sector takes 0.2 under software emulation
_KVM = Path("/dev/kvm")
# landlock_create_ruleset(2), which has the same number on every architecture, and its flag.
_LANDLOCK, _VERSION_ASKED = 444, 1
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

# The same for VMMs that boot ELF kernels and have no BIOS: assembled from probe_kernel.S, without
# its section headers. It says PROBE_ANSWER on the serial port, then resets the machine.
PROBE_KERNEL = bytes.fromhex(
    "7f454c4602010100000000000000000002003e000100000000011000000000004000000000000000"
    "0000000000000000000000004000380003000000000000000100000007000000e800000000000000"
    "e800100000000000e800100000000000580100000000000058010000000000000800000000000000"
    "0400000004000000e800000000000000e800100000000000e8001000000000001800000000000000"
    "1800000000000000040000000000000051e574640600000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000010000000000000000400000008000000"
    "1200000058656e000001100000000000fafcbf00002000b90018000031c0f3abc705000020000320"
    "2000c7050010200003202000c7050020200003302000c7050030200083010000c705083020008301"
    "2000b8a00200000f22e0b8000020000f22d8b9800000c00f320d010100000f300f011530021000b8"
    "010001800f22c0ea76011000080031c08ed0bc00602000b9800000c00f32a900040000747e31c00f"
    "a2b8001020000f22d866480f6ec066480f7ec34839c37563b812021000bf0042200066890766c747"
    "02080066c74704008ec1e810668947060f011c2536021000b811000000e620b020e621b004e621b0"
    "01e621b0fee621b034e643b0a9e640b004e64031edfbf4fa83fd1472f8baf8030000b04feeb04bee"
    "b00aeeb0fee664f4ebfdffc550b020e6205848cf0f1f4000000000000000000000000000009a2000"
    "0f0020021000ff0f0040200000000000"
)
PROBE_ANSWER = b"OK\n"


def kvm_works(qemu_binary: str) -> tuple[bool, str]:
    """Whether KVM runs 64-bit guests here, and a sentence saying why (not).

    Blocks for up to five seconds; call it from a thread, and keep the answer.
    """
    hindrance = kvm_hindrance()
    if hindrance is not None:
        return False, hindrance
    return accelerator_works(qemu_binary, "kvm")


def kvm_hindrance() -> str | None:
    """Why ``/dev/kvm`` cannot even be opened, in a sentence; None if it can."""
    if not _KVM.exists():
        return "/dev/kvm does not exist (load kvm_intel or kvm_amd, or enable nested KVM)"
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return "no permission for /dev/kvm (add the user to the group kvm)"
    return None


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


def landlock_version() -> int:
    """The version of Landlock (landlock(7)) that this kernel offers; 0 for none."""
    libc = ctypes.CDLL(None, use_errno=True)
    told: int = libc.syscall(ctypes.c_long(_LANDLOCK), None, ctypes.c_size_t(0), _VERSION_ASKED)
    return max(told, 0)
