"""The agent over vsock, as Firecracker and Cloud Hypervisor reach it, on hosts that run neither.

The guest has no vsock device but the kernel's loopback, and a relay (tests/guest/relay.c) that puts
the agent's vsock port behind the serial port the host can reach. What the agent itself does is the
same: it listens, accepts, and takes the newest host for the real one.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.conftest import AGENT, KERNEL, ROOT, Bench, real_drivers
from stillframe.host.orphans import kill_orphans
from stillframe.images.boot import BootPair, find_kernel, write_config_disk
from stillframe.images.initrd import build_initrd, module_files, read_module, select_modules
from stillframe.vmm.driver import MachineResources
from stillframe.vmm.vsock import AGENT_ARGUMENT

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]


@pytest.fixture
def relayed(guest_files: tuple[BootPair, Path], tmp_path: Path) -> Iterator[Bench]:
    """QEMU with a root image that holds the relay."""
    driver = real_drivers()["qemu"]
    probe = asyncio.run(driver.probe())
    if not probe.available:
        pytest.skip(probe.reason or "not available")
    compiler = shutil.which("musl-gcc")
    if compiler is None:
        pytest.skip("needs musl-gcc")
    tree = tmp_path / "tree"
    shutil.copytree(guest_files[1].with_name("root"), tree, symlinks=True)
    source = ROOT / "tests/guest/relay.c"
    command = [compiler, "-std=gnu11", "-O2", "-static", "-o", str(tree / "bin/relay"), str(source)]
    subprocess.run(command, check=True, timeout=60)
    image = tmp_path / "root.img"
    command = ["mksquashfs", str(tree), str(image), "-quiet", "-no-progress"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    yield Bench(driver, tmp_path, guest_files[0], image)
    left = kill_orphans(tmp_path, ())
    assert left == [], f"processes left behind: {left}"


def with_relay(bench: Bench, name: str) -> MachineResources:
    """A guest whose agent listens on vsock, and whose workload is the relay."""
    resources = bench.resources(name)
    tree = find_kernel(KERNEL)
    modules = select_modules(tree.modules)
    modules["vsock_loopback"] = read_module(module_files(tree.modules)["vsock_loopback"])
    initrd = bench.directory / "initrd"
    initrd.write_bytes(build_initrd(AGENT.read_bytes(), modules))
    write_config_disk(
        resources.disks[2].path,
        [("arg", "/bin/relay"), ("hostname", name), ("nonce", "n1"), ("seed", "5a" * 64)],
    )
    arguments = f"{resources.kernel_arguments} {AGENT_ARGUMENT}"
    return replace(resources, initrd=initrd, kernel_arguments=arguments)


async def test_an_agent_on_vsock_serves_hosts_that_come_and_go(relayed: Bench) -> None:
    bench = relayed
    resources = with_relay(bench, "one")
    async with bench.running(await bench.spec(), resources) as machine:
        async with bench.agent(machine) as connection:
            boot = connection.hello.boot_id
            assert "vsock_loopback" in await bench.run(connection, "cat", "/proc/modules")
            checksum = await bench.fill(connection)
        _, writer = await machine.dial_agent()
        writer.write(b"SFA1\x10\0\0\0")  # half a frame, and gone
        writer.close()
        await writer.wait_closed()
        async with bench.agent(machine) as connection:
            assert await bench.filled(connection) == checksum
        await machine.pause()
        captured = await bench.capture(machine, resources)
    fork = bench.fork_of(captured, "fork")
    async with bench.running(await bench.spec(), fork) as machine:
        await machine.resume()
        async with bench.agent(machine) as connection:
            assert connection.hello.boot_id == boot
            assert await bench.filled(connection) == checksum


async def test_guests_without_vsock_do_not_load_its_modules(relayed: Bench) -> None:
    async with relayed.booted("one") as (machine, _), relayed.agent(machine) as connection:
        loaded = await relayed.run(connection, "cat", "/proc/modules")
        assert "virtio_blk" in loaded
        assert "vsock" not in loaded
