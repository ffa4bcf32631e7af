"""A disk that pretends to be of a format with references is what its bytes are (S25)."""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.machines import resources_of, spec_of
from stillframe.model.states import InstanceState
from stillframe.vmm.qemu.command import QemuBuild, command_line
from support.engine import open_engine, running
from support.moving import DISK, archive_of, take

_VMDK = (
    b'# Disk DescriptorFile\nversion=1\nCID=1\ncreateType="monolithicFlat"\n'
    b'RW 9 FLAT "/etc/passwd" 0\n'
)
_HUGE = (2, 0, 0, 9, 1 << 62, 0, 1 << 31)


def qcow2(backing: bytes) -> bytes:
    """The header of a qcow2 disk (version 2) whose contents are those of another file."""
    size, cluster_bits, table_entries = 1 << 30, 16, 2
    fields = (2, 72, len(backing), cluster_bits, size, 0, table_entries, 1 << 17, 1 << 16, 1, 0, 0)
    return struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", *fields) + backing


HOSTILE = {
    "qcow2 with a backing file": qcow2(b"/etc/passwd"),
    "qcow2 with a protocol": qcow2(b"json:{'driver':'host_device','filename':'/dev/sda'}"),
    "qcow2 with a huge table": struct.pack(
        ">4sIQIIQII", b"QFI\xfb", 2, 0, 0, 9, 1 << 62, 0, 1 << 31
    ),
    "vmdk": _VMDK,
    "luks": b"LUKS\xba\xbe\x00\x01" + bytes(504),
}


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Engine]:
    async with open_engine(tmp_path / "there") as engine:
        await engine.context.images.ensure("stillframe/base")
        yield engine


async def archive_with(directory: Path, content: bytes) -> tuple[bytes, bytes]:
    """The archive of a snapshot whose disk begins so, made elsewhere; and that disk."""
    async with open_engine(directory) as engine:
        source = await running(engine)
        await engine.stop(source.id)
        overlay = engine.context.data.instance(source.id).overlay
        with overlay.open("r+b") as file:
            file.write(content)
        data = await archive_of(engine, await engine.snapshot(source.id, kind=DISK))
        return data, overlay.read_bytes()


@pytest.mark.parametrize("name", HOSTILE)
async def test_s25_a_fork_of_an_imported_disk_has_its_bytes_and_no_others(
    there: Engine, tmp_path: Path, name: str
) -> None:
    data, wanted = await archive_with(tmp_path / "here", HOSTILE[name])
    arrived = await take(there, data)
    fork = await there.fork_snapshot(
        arrived.id, ForkRequest("fork", target_state=InstanceState.RUNNING)
    )
    disk = there.context.data.instance(fork.id).overlay
    assert disk.read_bytes() == wanted
    assert disk.stat().st_size == fork.overlay_bytes
    resources = await resources_of(there.context, fork)
    build = QemuBuild("qemu", (8, 2, 0), "tcg")
    line = command_line(build, spec_of(fork), resources, monitor_fd=3, agent_fd=4)
    disks = [line[n + 1] for n, argument in enumerate(line) if argument == "-blockdev"]
    assert any(f"file.filename={disk}" in one for one in disks)
    assert all(one.startswith("driver=raw,") for one in disks)
    assert "-drive" not in line  # whose format would be guessed


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
async def test_s25_these_disks_would_be_taken_for_something_else(tmp_path: Path) -> None:
    found = {}
    for name, content in HOSTILE.items():
        path = tmp_path / "disk"
        path.write_bytes(content + bytes(1 << 20))
        done = await asyncio.to_thread(probed, path)
        found[name] = done.get("format", "refused")
    assert "raw" not in found.values()
    assert found["qcow2 with a backing file"] == "qcow2"


def probed(path: Path) -> dict[str, str]:
    """What QEMU makes of a disk when it is not told the format."""
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", str(path)],
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    answer: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return answer
