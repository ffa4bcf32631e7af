"""The network that every VM has, with a Linux guest in it.

Hosts without KVM run neither Firecracker nor Cloud Hypervisor, so QEMU takes their place once:
started by the same launcher, with the tap device that they would open.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.conftest import ROOT, Bench
from stillframe.guest.connection import AgentConnection
from stillframe.host import process
from stillframe.host.orphans import kill_orphans
from stillframe.images.boot import BootPair, write_config_disk
from stillframe.vmm.driver import MachineResources, MachineSpec
from stillframe.vmm.isolation.command import TAP, apart, find_uplink
from stillframe.vmm.qemu import driver as qemu
from support.uplinks import Watch, children, hindrance

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]
_USER_NETWORK = "user,id=net0,ipv6=off"
_TAP_NETWORK = f"tap,id=net0,ifname={TAP},script=no,downscript=no"


def spawn_apart(arguments: Sequence[process.Argument], **options: Any) -> process.Process:
    """QEMU as the launcher starts a VMM: with a tap device in the place of its own network."""
    words = [_TAP_NETWORK if word == _USER_NETWORK else str(word) for word in arguments]
    assert _TAP_NETWORK in words
    return process.spawn(apart(words[0], words[0], words[1:], uplink=find_uplink()), **options)


@pytest.fixture
def bench_apart(
    guest_files: tuple[BootPair, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    """QEMU on TCG in a network of its own."""
    if hindrance() is not None:
        pytest.skip(str(hindrance()))
    # Without the tracker, which would be loaded into the launcher too.
    driver = qemu.QemuDriver(
        os.environ.get("STILLFRAME_QEMU_BINARY", "qemu-system-x86_64"),
        os.environ.get("STILLFRAME_ACCELERATOR", "tcg"),
        ROOT / ".cache",
    )
    probe = asyncio.run(driver.probe())
    if not probe.available:
        pytest.skip(probe.reason or "not available")
    monkeypatch.setattr(qemu, "spawn", spawn_apart)
    pair, root = guest_files
    yield Bench(driver, tmp_path, pair, root)
    left = kill_orphans(tmp_path, ())
    assert left == [], f"processes left behind: {left}"


def networked(bench: Bench, name: str) -> MachineResources:
    """A guest whose network is that of the engine's instances."""
    resources = bench.resources(name)
    write_config_disk(
        resources.disks[2].path,
        [
            ("hostname", name), ("nonce", "n1"), ("seed", "5a" * 64), ("network", "1"),
            ("address", "10.0.2.15/24"), ("gateway", "10.0.2.2"), ("dns", "10.0.2.3"),
        ],
    )  # fmt: skip
    return resources


@contextlib.asynccontextmanager
async def web_server() -> AsyncIterator[tuple[int, list[str]]]:
    """A server on this host's loopback: its port, and the paths it was asked for."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(path := head.split()[1])
        body = f"you asked for {path}".encode() + bytes(64 << 10)
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


async def fetched(bench: Bench, connection: AgentConnection, port: int, path: str) -> str:
    """What the guest gets from that server, by the gateway's address."""
    url = f"http://10.0.2.2:{port}{path}"
    told = await bench.run(connection, "/bin/busybox", "wget", "-q", "-O", "-", url)
    assert len(told) > 64 << 10
    return told.rstrip("\0")


async def test_a_guest_and_its_fork_reach_this_host(bench: Bench) -> None:
    if not bench.real:
        pytest.skip("has no guest kernel, and so no network")
    if not bench.name.startswith("qemu") and hindrance() is not None:
        pytest.skip(str(hindrance()))
    spec = replace(await bench.spec(), network=True)
    source = networked(bench, "source")
    async with web_server() as (port, asked):
        async with bench.running(spec, source) as machine:
            async with bench.agent(machine) as connection:
                assert await fetched(bench, connection, port, "/one") == "you asked for /one"
            await machine.pause()
            captured = await bench.capture(machine, source)
        async with bench.running(spec, bench.fork_of(captured, "fork")) as machine:
            await machine.resume()
            async with bench.agent(machine) as connection:
                assert await fetched(bench, connection, port, "/two") == "you asked for /two"
        assert asked == ["/one", "/two"]


async def test_guests_of_one_address_reach_this_host_side_by_side(bench_apart: Bench) -> None:
    bench = bench_apart
    spec: MachineSpec = replace(await bench.spec(), network=True)
    source = networked(bench, "source")
    async with web_server() as (port, asked), bench.running(spec, source) as machine:
        async with bench.agent(machine) as connection:
            assert await fetched(bench, connection, port, "/first") == "you asked for /first"
        await machine.pause()
        captured = await bench.capture(machine, source)
        await machine.resume()
        fork = bench.fork_of(captured, "fork")
        async with bench.running(spec, fork) as other:
            await other.resume()
            async with bench.agent(machine) as one, bench.agent(other) as two:
                told = await asyncio.gather(
                    fetched(bench, one, port, "/source"), fetched(bench, two, port, "/fork")
                )
                assert tuple(told) == ("you asked for /source", "you asked for /fork")
                for connection in (one, two):
                    address = await bench.run(
                        connection, "/bin/busybox", "ip", "-4", "-o", "addr", "show", "dev", "eth0"
                    )
                    assert "10.0.2.15/24" in address
                watch = Watch(children(machine.process.pid))
                os.kill(machine.process.pid, 9)
                watch.wait_all()  # what served the killed one has ended, and it alone
                assert await fetched(bench, two, port, "/later") == "you asked for /later"
            watch = Watch(children(other.process.pid))
        watch.wait_all()
        assert sorted(asked) == ["/first", "/fork", "/later", "/source"]
