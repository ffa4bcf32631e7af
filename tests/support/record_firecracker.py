"""Record the conversations in ``conversations/firecracker-VERSION.json`` from a real Firecracker.

    PYTHONPATH=src:tests .venv/bin/python -m support.record_firecracker FIRECRACKER

It boots tests/guest/tiny.S; see tests/vm/test_tiny_guest.py for what that needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

from stillframe.host.files import clone, create_sparse
from stillframe.model.errors import VmmFailure
from stillframe.model.values import DeviceLimits
from stillframe.vmm.driver import Disk, MachineResources, MachineSpec
from stillframe.vmm.firecracker import api
from stillframe.vmm.firecracker.driver import FirecrackerDriver
from support.conversations import DIRECTORY, Exchange, recording

SOURCE = Path(__file__).resolve().parents[1] / "guest" / "tiny.S"
SPEC = MachineSpec(memory_bytes=16 << 20, vcpus=1, accelerator="kvm", network=False)
NETWORKED = replace(SPEC, network=True)


UNLIMITED = DeviceLimits()
LIMITED = DeviceLimits(disk=50_000_000, download=1_000_000, upload=2_000_000)


def files(home: Path, limits: DeviceLimits = UNLIMITED) -> MachineResources:
    """A cold VM's files, with the guest assembled."""
    flags = ["-nostdlib", "-static", "-no-pie", "-Wl,-N,-Ttext-segment=0x100000,--build-id=none"]
    subprocess.run(["gcc", *flags, "-o", home / "tiny", SOURCE], check=True, timeout=60)
    create_sparse(home / "image", SPEC.memory_bytes)
    create_sparse(home / "root", 1 << 20)
    create_sparse(home / "overlay", 1 << 20)
    return MachineResources(
        directory=home, memory_image=home / "image",
        disks=(Disk(home / "root", readonly=True), Disk(home / "overlay", readonly=False)),
        kernel=home / "tiny", initrd=Path("/dev/null"), kernel_arguments="quiet",
        generation_id=uuid.uuid4(), console_log=home / "console", vmm_log=home / "log",
        limits=limits,
    )  # fmt: skip


async def record(binary: str, home: Path) -> dict[str, list[Exchange]]:
    """Boot and capture; load and capture; be refused; the same with a network."""
    driver = FirecrackerDriver(binary, accelerator="kvm")
    cold = files(home, LIMITED)
    heard: dict[str, list[Exchange]] = {}
    with recording() as heard["boot"]:
        machine = await driver.start(SPEC, cold)
    with recording() as heard["capture"]:
        await machine.status()
        await machine.pause()
        clone(cold.memory_image, home / "captured")
        await machine.save_devices(home / "devices", home / "captured")
        await machine.resume()
    with recording() as heard["refusals"]:
        with contextlib.suppress(VmmFailure):
            await machine.call(api.machine_config(SPEC))
        with contextlib.suppress(VmmFailure):  # it runs
            await machine.save_devices(home / "again", home / "captured")
    await machine.kill()
    warm = replace(cold, device_state=home / "devices", memory_image=home / "captured")
    with recording() as heard["load"]:
        machine = await driver.start(SPEC, warm)
    with recording() as heard["capture loaded"]:
        await machine.resume()
        await machine.pause()
        await machine.save_devices(home / "more")
        await machine.status()
    await machine.kill()
    (home / "devices").write_bytes(b"\xa5" * 4096)
    with recording() as heard["load damaged"], contextlib.suppress(VmmFailure):
        await driver.start(SPEC, warm)
    with recording() as heard["boot with network"]:
        machine = await driver.start(NETWORKED, cold)
    await machine.pause()
    (home / "devices").unlink()
    await machine.save_devices(home / "devices", home / "captured")
    await machine.kill()
    with recording() as heard["load with network"]:
        machine = await driver.start(NETWORKED, warm)
    await machine.kill()
    return heard


def main() -> None:
    """Write the file."""
    binary = sys.argv[1]
    with tempfile.TemporaryDirectory() as home:
        heard = asyncio.run(record(binary, Path(home)))
    version = heard["capture"][0]["answer"]["body"]["vmm_version"]
    DIRECTORY.mkdir(exist_ok=True)
    text = json.dumps(heard, indent=1) + "\n"
    (DIRECTORY / f"firecracker-{version}.json").write_text(text)


if __name__ == "__main__":
    main()
