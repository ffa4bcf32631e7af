"""What every driver must keep, whatever hypervisor is below it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import pytest

from conformance.conftest import Bench
from stillframe.guest.connection import AgentConnection
from stillframe.guest.exec import start_exec
from stillframe.guest.identity import identify, shutdown
from stillframe.host.capture import BufferBudget, MemoryCapture
from stillframe.host.files import clone, copy_into, create_sparse
from stillframe.host.image import open_private
from stillframe.host.memory import GuestMemory
from stillframe.model.errors import GuestFailure, StillframeError, VmmFailure
from stillframe.model.values import DeviceLimits
from stillframe.vmm.driver import Limit, Machine, MachineResources, MachineStatus
from support.descriptors import descriptors

pytestmark = pytest.mark.timeout(240)


WRITE = "dd if=/dev/zero of=/much bs=1M count={count} oflag=direct 2>&1"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        hasher = blake2b()
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


async def counts_on(bench: Bench, connection: AgentConnection, seen: int) -> None:
    """The counter goes on from ``seen``: never back, and further in the end."""
    async with asyncio.timeout(60):
        while (now := await bench.counter(connection)) == seen:
            pass
    assert now > seen


async def test_a_guest_boots_and_greets(bench: Bench) -> None:
    async with bench.booted("one") as (machine, resources), bench.agent(machine) as connection:
        assert connection.hello.workload in ("starting", "running")
        assert await machine.status() is MachineStatus.RUNNING
        assert "STILLFRAME-AGENT-READY nonce=n1" in resources.console_log.read_text()
        with pytest.raises(GuestFailure) as refused:
            await (await start_exec(connection, ["/no/such/program"])).wait()
        assert refused.value.facts["errno"] == "ENOENT"


@pytest.mark.parametrize("vcpus", [1, 4])
async def test_memory_goes_on_in_a_new_process(bench: Bench, vcpus: int) -> None:
    """F28: what was loaded stands still until it is resumed."""
    async with bench.booted("one", vcpus) as (machine, resources):
        async with bench.agent(machine) as connection:
            boot = connection.hello.boot_id
            seen = await bench.counter(connection) if vcpus == 1 else 0
            await bench.keep(connection, "before")
            if bench.real:
                assert await bench.run(connection, "nproc") == str(vcpus)
        await machine.pause()
        captured = await bench.capture(machine, resources)
    fork = bench.fork_of(captured, "fork")
    async with bench.running(await bench.spec(vcpus), fork) as machine:
        assert await machine.status() is MachineStatus.PAUSED
        await machine.resume()
        async with bench.agent(machine) as connection:
            assert connection.hello.boot_id == boot
            assert await bench.kept(connection) == "before"
            await counts_on(bench, connection, seen)


async def test_pause_really_stops_the_guest(bench: Bench) -> None:
    async with bench.booted("one") as (machine, resources), bench.agent(machine) as connection:
        await bench.counter(connection)
        await machine.pause()
        assert await machine.status() is MachineStatus.PAUSED
        first = await bench.capture(machine, resources)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(bench.counter(connection), 0.5)
        second = await bench.capture(machine, resources)
        assert digest(first.memory_image) == digest(second.memory_image)
        await machine.resume()
        assert await machine.status() is MachineStatus.RUNNING
        await counts_on(bench, connection, await bench.counter(connection))


async def test_memory_copied_while_the_guest_runs_is_whole(bench: Bench) -> None:
    async with bench.booted("one") as (machine, resources):
        async with bench.agent(machine) as connection:
            await bench.keep(connection, "before")
            image = bench.directory / "copied"
            clone(resources.memory_image, image)
            with (
                GuestMemory(machine.process.pid, resources.memory_image) as memory,
                open_private(image) as fd,
            ):
                assert memory.tracked == bench.tracks_writes
                copy = MemoryCapture(memory, fd, incremental=False, budget=BufferBudget(1 << 28))
                await asyncio.to_thread(copy.ahead)
                await bench.keep(connection, "meanwhile")
                await machine.pause()
                copy.still()
                copy.after()
        plain = await bench.capture(machine, resources)
    assert digest(image) == digest(plain.memory_image)


async def test_a_disk_copied_while_the_guest_runs_is_whole(bench: Bench) -> None:
    async with bench.booted("one") as (machine, resources):
        disk = resources.disks[1].path
        copy = bench.directory / "copy"
        create_sparse(copy, disk.stat().st_size)
        if not await machine.begin_disk_copy(1, copy):
            assert not bench.name.startswith("qemu")
            await machine.end_disk_copy(1)
            return
        copy_into(disk, copy)
        async with bench.agent(machine) as connection:
            await bench.run(connection, "/bin/sh", "-c", "echo meanwhile > /kept; sync")
        await machine.pause()
        assert digest(copy) != digest(disk)
        await machine.finish_disk_copy(1)
        assert digest(copy) == digest(disk)
        await machine.resume()
        await machine.end_disk_copy(1)
        # What a server that died would leave behind is removed by the one that adopts.
        left = bench.directory / "left"
        create_sparse(left, disk.stat().st_size)
        assert await machine.begin_disk_copy(1, left)
        await machine.close()
        adopted = await bench.driver.adopt(machine.process, resources)
        try:
            held = Path(f"/proc/{machine.process.pid}/fd").iterdir()
            assert str(left) not in [str(fd.readlink()) for fd in held]
        finally:
            await adopted.kill()


async def test_a_limited_disk_is_slow_for_its_guest_and_no_slower_to_copy(bench: Bench) -> None:
    if not bench.real:
        pytest.skip("its disk is a directory of files, which nothing slows")
    if Limit.DISK not in bench.driver.limits:
        pytest.skip("it cannot limit disks")
    rate, size = 2 << 20, 6 << 20
    # Some let the first second's worth pass at once.
    least = (size - rate) / rate

    async def written(machine: Machine) -> float:
        """Seconds that the guest needs to write ``size`` bytes."""
        async with bench.agent(machine) as connection:
            began = time.monotonic()
            await bench.run(connection, "/bin/sh", "-c", WRITE.format(count=size >> 20))
            return time.monotonic() - began

    async with bench.booted("one", limits=DeviceLimits(disk=rate)) as (machine, resources):
        disk = resources.disks[1].path
        copy = bench.directory / "copy"
        create_sparse(copy, disk.stat().st_size)
        noted = await machine.begin_disk_copy(1, copy)
        copy_into(disk, copy)
        spent = await written(machine)
        assert spent >= least
        await machine.pause()
        if noted:
            began = time.monotonic()
            await machine.finish_disk_copy(1)
            assert time.monotonic() - began < spent / 2
            assert digest(copy) == digest(disk)
        await machine.end_disk_copy(1)
        captured = await bench.capture(machine, resources)
    fork = bench.fork_of(captured, "fork")
    async with bench.running(await bench.spec(), fork) as machine:
        await machine.resume()
        assert await written(machine) >= least


async def test_two_forks_diverge_and_their_image_does_not_change(bench: Bench) -> None:
    captured = await bench.captured_guest()
    before = digest(captured.memory_image)
    spec = await bench.spec()
    one, two = bench.fork_of(captured, "left"), bench.fork_of(captured, "right")
    async with bench.running(spec, one) as left, bench.running(spec, two) as right:
        for machine, name in ((left, "left"), (right, "right")):
            await machine.resume()
            async with bench.agent(machine) as connection:
                assert await bench.kept(connection) == "before"
                await bench.keep(connection, name)
                await identify(
                    connection, seed=secrets.token_bytes(64), time_ns=time.time_ns,
                    hostname=name, machine_id=secrets.token_hex(16), instance_id=name,
                )  # fmt: skip
        for machine, name in ((left, "left"), (right, "right")):
            async with bench.agent(machine) as connection:
                assert await bench.kept(connection) == name
    assert digest(captured.memory_image) == before


async def test_a_vmm_outlives_us_and_is_adopted(bench: Bench) -> None:
    async with bench.booted("one") as (machine, resources):
        async with bench.agent(machine) as connection:
            seen = await bench.counter(connection)
        await machine.close()
        adopted = await bench.driver.adopt(machine.process, resources)
        try:
            assert adopted.process == machine.process
            assert await adopted.status() is MachineStatus.RUNNING
            async with bench.agent(adopted) as connection:
                await counts_on(bench, connection, seen)
        finally:
            await adopted.kill()
        with pytest.raises(VmmFailure):
            await bench.driver.adopt(machine.process, resources)


async def test_vms_that_were_ended_leave_nothing_open(bench: Bench) -> None:
    """Neither by us nor by themselves: a server would run out of descriptors some day."""
    captured = await bench.captured_guest()
    before: Counter[str] | None = None
    for name in ("first", "killed", "died"):
        fork = bench.fork_of(captured, name)
        async with bench.running(await bench.spec(), fork) as machine:
            await machine.resume()
            async with bench.agent(machine):
                pass
            if name == "died":
                os.kill(machine.process.pid, signal.SIGKILL)
                await machine.wait_exit()
                await machine.close()
        before = before or descriptors()  # the first one may make what stays for others
    assert descriptors() == before


async def test_kill_leaves_nothing(bench: Bench) -> None:
    async with bench.booted("one") as (machine, _):
        await machine.kill()
        assert bench.processes() == []
        with pytest.raises(VmmFailure):
            await machine.dial_agent()
        with pytest.raises(VmmFailure):
            await machine.status()
        await machine.kill()  # no error if it is dead already


async def test_the_death_of_a_vmm_is_noticed(bench: Bench) -> None:
    async with bench.booted("one") as (machine, _):
        waiting = asyncio.create_task(machine.wait_exit())
        os.kill(machine.process.pid, signal.SIGKILL)
        await asyncio.wait_for(waiting, 30)
        with pytest.raises(VmmFailure):
            await machine.pause()


@pytest.mark.parametrize("damage", ["garbage", "cut off", "absent"])
async def test_bad_device_state_is_refused_and_nothing_left(bench: Bench, damage: str) -> None:
    captured = await bench.captured_guest()
    assert captured.device_state is not None
    own = bench.directory / "damaged"
    own.write_bytes(captured.device_state.read_bytes())
    captured = replace(captured, device_state=own)
    if damage == "garbage":
        own.write_bytes(b"\xa5" * 4096)
    elif damage == "cut off":
        whole = own.read_bytes()
        own.write_bytes(whole[: len(whole) // 2])
    else:
        own.unlink()
    fork = bench.fork_of(captured, "fork")
    with pytest.raises(StillframeError):
        await bench.driver.start(await bench.spec(), fork)
    assert bench.processes() == []
    assert [path for path in fork.directory.iterdir() if path.is_socket()] == []


@pytest.mark.parametrize("other", ["vCPUs", "bytes"])
async def test_memory_of_another_shape_is_refused(bench: Bench, other: str) -> None:
    if other == "vCPUs" and bench.name == "qemu-microvm":
        pytest.skip("QEMU itself does not tell on this machine; the engine keeps the number")
    captured = await bench.captured_guest()
    spec = await bench.spec()
    wrong = replace(spec, vcpus=2)
    if other == "bytes":
        wrong = replace(spec, memory_bytes=spec.memory_bytes * 2)
    with pytest.raises(VmmFailure):
        await bench.driver.start(wrong, bench.fork_of(captured, "fork"))
    assert bench.processes() == []


async def test_a_shutdown_is_told_from_a_reset(bench: Bench) -> None:
    async with bench.booted("one") as (machine, _):
        async with bench.agent(machine) as connection:
            await shutdown(connection, grace_ms=100)
            await asyncio.wait_for(machine.wait_exit(), 60)
        assert machine.shutdown_reason == "guest-shutdown"
    async with bench.booted("two") as (machine, resources):
        adopted = None
        await machine.close()
        adopted = await bench.driver.adopt(machine.process, resources)
        try:
            async with bench.agent(adopted) as connection:
                command = ["/bin/reboot", "-f"] if bench.real else ["reboot"]
                await start_exec(connection, command)
                await asyncio.wait_for(adopted.wait_exit(), 60)
            assert adopted.shutdown_reason == "guest-reset"
        finally:
            await adopted.kill()


async def test_the_agent_takes_a_new_host_after_half_a_frame(bench: Bench) -> None:
    async with bench.booted("one") as (machine, _):
        async with bench.agent(machine) as connection:
            await bench.keep(connection, "kept")
        _, writer = await machine.dial_agent()
        writer.write(b"SFA1\x10\0\0\0")
        writer.close()
        await writer.wait_closed()
        async with bench.agent(machine) as connection:
            assert await bench.kept(connection) == "kept"


async def test_forks_of_forks_keep_their_memory(bench: Bench) -> None:
    """Checksums are taken in the guest; a page that a capture missed would change them."""
    async with bench.booted("one") as (machine, resources):
        async with bench.agent(machine) as connection:
            first = await bench.fill(connection)
            await bench.keep(connection, "generation 0")
        await machine.pause()
        captured = await bench.capture(machine, resources)
    for generation in range(1, 4):
        fork = bench.fork_of(captured, f"generation-{generation}")
        async with bench.running(await bench.spec(), fork) as machine:
            await machine.resume()
            async with bench.agent(machine) as connection:
                assert await bench.kept(connection) == f"generation {generation - 1}"
                assert await bench.filled(connection) == first
                await bench.keep(connection, f"generation {generation}")
            await machine.pause()
            captured = await bench.capture(machine, fork)


async def test_forks_write_to_disks_of_their_own(bench: Bench) -> None:
    if not bench.real:
        pytest.skip("its disk is a directory of files; tests/unit/test_engine.py has them")
    captured = await bench.captured_guest()
    before = digest(captured.disks[1].path)
    spec = await bench.spec()
    one, two = bench.fork_of(captured, "left"), bench.fork_of(captured, "right")
    async with bench.running(spec, one) as left, bench.running(spec, two) as right:
        for machine, name in ((left, "left"), (right, "right")):
            await machine.resume()
            async with bench.agent(machine) as connection:
                await bench.run(connection, "/bin/sh", "-c", f"echo {name} > /mine; sync")
        for machine, name in ((left, "left"), (right, "right")):
            async with bench.agent(machine) as connection:
                assert (await bench.run(connection, "cat", "/both", "/mine")).split() == [
                    "both", name,
                ]  # fmt: skip
    assert digest(captured.disks[1].path) == before
    assert digest(one.disks[1].path) != digest(two.disks[1].path) != before


async def test_forks_are_told_who_they_are(bench: Bench) -> None:
    if not bench.real:
        pytest.skip("it has no kernel with a pool of random numbers")
    captured = await bench.captured_guest()
    told: list[list[str]] = []
    for name in ("left", "right"):
        fork = bench.fork_of(captured, name)
        async with bench.running(await bench.spec(), fork) as machine:
            await machine.resume()
            async with bench.agent(machine) as connection:
                await identify(
                    connection, seed=secrets.token_bytes(64), time_ns=time.time_ns,
                    hostname=name, machine_id=secrets.token_hex(16), instance_id=name,
                )  # fmt: skip
                draw = "hostname; cat /etc/machine-id; head -c 32 /dev/urandom | sha256sum"
                told.append((await bench.run(connection, "/bin/sh", "-c", draw)).split("\n"))
    assert [one[0] for one in told] == ["left", "right"]
    assert all(len(set(same)) == 2 for same in zip(*told, strict=True))


async def test_a_vmm_killed_during_a_step_is_a_clear_error(bench: Bench) -> None:
    """For each step a fork, which is killed when it has the request and has not answered."""
    captured = await bench.captured_guest()
    for step in ("pause", "save", "resume"):
        fork = bench.fork_of(captured, step)
        async with bench.running(await bench.spec(), fork) as machine:
            if step == "pause":
                await machine.resume()
            os.kill(machine.process.pid, signal.SIGSTOP)
            request = asyncio.ensure_future(asked(bench, machine, fork, step))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(request), 0.2)
            os.kill(machine.process.pid, signal.SIGKILL)
            with pytest.raises(VmmFailure) as failed:
                await asyncio.wait_for(request, 60)
            assert failed.value.message, step
            await asyncio.wait_for(machine.wait_exit(), 30)
        nothing_of(bench, fork)


def asked(bench: Bench, machine: Machine, fork: MachineResources, step: str) -> Awaitable[None]:
    """The step, asked of the VMM."""
    if step == "pause":
        return machine.pause()
    if step == "resume":
        return machine.resume()
    memory = bench.directory / "saved"
    if machine.writes_memory:
        clone(fork.memory_image, memory)
    return machine.save_devices(
        bench.directory / "saved-devices", memory if machine.writes_memory else None
    )


def nothing_of(bench: Bench, fork: MachineResources) -> None:
    """No process and no socket of a VM that failed."""
    assert bench.processes() == []
    assert [path for path in fork.directory.iterdir() if path.is_socket()] == []


async def test_a_vmm_killed_during_a_load_is_a_clear_error(bench: Bench) -> None:
    captured = await bench.captured_guest()
    fork = bench.fork_of(captured, "fork")
    start = asyncio.ensure_future(bench.driver.start(await bench.spec(), fork))
    # It is killed at its first sign of life, long before it can have loaded.
    while not (started := bench.processes()) and not start.done():  # noqa: ASYNC110 - not announced
        await asyncio.sleep(0)
    for pid in started:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(VmmFailure) as failed:
        await asyncio.wait_for(start, 60)
    assert failed.value.message
    nothing_of(bench, fork)
    # What it was to be loaded from is as it was.
    async with bench.running(await bench.spec(), bench.fork_of(captured, "again")) as machine:
        await machine.resume()
        async with bench.agent(machine):
            pass


async def test_memory_of_an_older_device_layout_still_loads(bench: Bench) -> None:
    if bench.name != "qemu":
        pytest.skip("it has had one layout only")
    spec = replace(await bench.spec(), layout=1)
    resources = bench.resources("one")
    async with bench.running(spec, resources) as machine:
        async with bench.agent(machine) as connection:
            await bench.keep(connection, "before")
        await machine.pause()
        captured = await bench.capture(machine, resources)
    fork = bench.fork_of(captured, "fork")
    with pytest.raises(VmmFailure):
        await bench.driver.start(await bench.spec(), fork)
    async with bench.running(spec, fork) as machine:
        await machine.resume()
        async with bench.agent(machine) as connection:
            assert await bench.kept(connection) == "before"
