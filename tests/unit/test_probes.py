"""The KVM probe can succeed (shown under software emulation), and fails with a reason."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from stillframe.host import probes
from stillframe.host.capacity import processor
from stillframe.vmm.driver import DriverProbe
from stillframe.vmm.qemu import driver as qemu

QEMU = shutil.which("qemu-system-x86_64")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64")


def test_the_sector_is_bootable() -> None:
    assert len(probes.SECTOR) == 512
    assert probes.SECTOR.endswith(b"\x55\xaa")


@needs_qemu
def test_the_sector_passes_under_software_emulation() -> None:
    assert probes.accelerator_works(str(QEMU), "tcg") == (
        True,
        "tcg ran a 64-bit guest with interrupts",
    )


@needs_qemu
def test_an_accelerator_that_does_not_exist_is_refused_with_qemus_words() -> None:
    works, reason = probes.accelerator_works(str(QEMU), "nonesuch")
    assert not works
    assert "nonesuch" in reason


@needs_qemu
def test_a_guest_that_never_answers_counts_as_not_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SECTOR", b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa")
    monkeypatch.setattr(probes, "_DEADLINE", 1.0)
    works, reason = probes.accelerator_works(str(QEMU), "tcg")
    assert not works
    assert "does not run a 64-bit guest" in reason


def test_a_missing_emulator_is_no_exception() -> None:
    works, reason = probes.accelerator_works("/nonexistent/qemu", "tcg")
    assert not works
    assert "not installed" in reason


def test_a_host_without_kvm_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """F37."""
    monkeypatch.setattr(probes, "_KVM", tmp_path / "kvm")
    works, reason = probes.kvm_works("qemu-system-x86_64")
    assert not works
    assert "kvm_intel" in reason


CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) CPU @ 2.00GHz
cpu MHz\t\t: {mhz}
flags\t\t: {flags}

processor\t: 1
vendor_id\t: GenuineIntel
"""


def test_a_processor_is_told_by_what_a_guest_can_notice(tmp_path: Path) -> None:
    def told(mhz: str, flags: str) -> str:
        file = tmp_path / "cpuinfo"
        file.write_text(CPUINFO.format(mhz=mhz, flags=flags))
        return processor(file)

    first = told("2000.1", "fpu sse2 avx")
    assert first.startswith("GenuineIntel family 6 model 85 flags ")
    assert told("3100.7", "avx fpu sse2") == first
    assert told("2000.1", "fpu sse2") != first
    assert processor(tmp_path / "nowhere") == ""


async def test_kvm_that_begins_to_work_is_used_by_a_later_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """F37: refused, then failing, then working; what failed is tried again after a while."""
    tried: list[str] = []

    def kvm(hindrance: str | None, refusal: str | None) -> None:
        def works(binary: str) -> tuple[bool, str]:
            tried.append(binary)
            return refusal is None, refusal or "kvm ran a guest"

        monkeypatch.setattr(qemu, "kvm_hindrance", lambda: hindrance)
        monkeypatch.setattr(qemu, "kvm_works", works)

    async def server() -> DriverProbe:
        return await qemu.QemuDriver(cache_dir=tmp_path / "cache").probe()

    kvm("no permission for /dev/kvm", None)
    found = await server()
    assert (found.available, found.accelerator) == (True, "tcg")
    assert found.reason == "no permission for /dev/kvm"
    kvm(None, "the guest hung")
    assert [(await server()).reason for _ in range(2)] == ["the guest hung"] * 2
    assert len(tried) == 1
    kvm(None, None)
    assert (await server()).accelerator == "tcg"
    (kept,) = (tmp_path / "cache").iterdir()
    os.utime(kept, (time.time() - 7200,) * 2)
    assert [(await server()).accelerator for _ in range(2)] == ["kvm"] * 2
    assert len(tried) == 2
    assert (await server()).reason is None
