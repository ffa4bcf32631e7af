"""What the server costs: a boot beside the same QEMU command line by hand, start, idle, per VM.

    make bench-boot            (or: python bench/boot.py --runs 5)

Both boots end at the same moment, the agent's line on the serial console; runs alternate, so that
the host's mood hits both alike. Prints a table and writes bench/results-boot.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest
from stillframe.engine.machines import resources_of, spec_of
from stillframe.engine.settings import EngineSettings
from stillframe.host.files import clone
from stillframe.host.orphans import kill_orphans
from stillframe.host.process import spawn
from stillframe.host.sockets import bind_unix
from stillframe.host.watch import file_changes
from stillframe.images.boot import write_config_disk
from stillframe.model.states import InstanceState
from stillframe.model.units import MIB
from stillframe.vmm.qemu.command import QemuBuild, command_line
from stillframe.vmm.qemu.driver import QemuDriver

ROOT = Path(__file__).resolve().parents[1]
READY = b"STILLFRAME-AGENT-READY"
TARGET = 1.2


async def main(runs: int) -> int:
    """Measure, print, write; 1 when the target is missed."""
    directory = Path(tempfile.mkdtemp(prefix="stillframe-bench-"))
    settings = EngineSettings(
        directory / "data", ROOT / ".cache/kernel", ROOT / "agent/build/stillframe-init"
    )
    driver = QemuDriver(cache_dir=directory / "data" / "cache")
    engine = Engine(settings, [driver])
    try:
        await engine.open()
        ours, by_hand = [], []
        await boot_ours(engine, "warm-up", keep=True)  # makes the image and the boot pair
        for number in range(runs):
            ours.append(await boot_ours(engine, f"run-{number}"))
            by_hand.append(await boot_by_hand(engine, driver))
        growth = await memory_per_vm(engine, 4)
    finally:
        await engine.close()
        kill_orphans(directory, ())
        shutil.rmtree(directory)
    return report(ours, by_hand, growth)


async def boot_ours(engine: Engine, name: str, *, keep: bool = False) -> float:
    """Milliseconds from the request to Running."""
    began = time.perf_counter()
    instance = await engine.create(
        CreateRequest(name, "stillframe/base", memory_bytes=256 * MIB, vcpus=1)
    )
    await engine.wait(instance.id, state=InstanceState.RUNNING, timeout=timedelta(minutes=2))
    took = (time.perf_counter() - began) * 1000
    if not keep:
        await engine.delete(instance.id, graceful=False)
    return took


async def boot_by_hand(engine: Engine, driver: QemuDriver) -> float:
    """Milliseconds from the spawn of the same command line to the agent's line."""
    template = engine.find_instance("warm-up")
    instance = replace(template, boot="")
    directory = Path(tempfile.mkdtemp(prefix="by-hand-", dir=engine.context.data.root))
    probe = await driver.probe()
    major, minor, micro = (int(part) for part in probe.version.split("."))
    build = QemuBuild("qemu-system-x86_64", (major, minor, micro), probe.accelerator)
    resources = await resources_of(engine.context, instance)
    overlay, config = directory / "overlay", directory / "config"
    clone(engine.context.data.templates / f"overlay-{instance.overlay_bytes}.ext4", overlay)
    write_config_disk(config, [("arg", "/bin/sleep"), ("arg", "1000"), ("nonce", "hand")])
    console, memory = directory / "console", directory / "memory"
    console.touch()
    with memory.open("wb") as file:
        file.truncate(instance.memory_bytes)
    resources = replace(
        resources, directory=directory, memory_image=memory, console_log=console,
        vmm_log=directory / "vmm.log",
        disks=(
            resources.disks[0],
            replace(resources.disks[1], path=overlay),
            replace(resources.disks[2], path=config),
        ),
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        with bind_unix(directory / "m") as monitor, bind_unix(directory / "a") as agent:
            command = command_line(
                build, spec_of(instance), resources,
                monitor_fd=monitor.fileno(), agent_fd=agent.fileno(),
            )  # fmt: skip
            began = time.perf_counter()
            process = spawn(
                command, output=resources.vmm_log, pass_fds=(monitor.fileno(), agent.fileno())
            )
        stack.push_async_callback(process.kill)
        async with asyncio.timeout(120), file_changes(console) as changed:
            while READY not in console.read_bytes():
                changed.clear()
                await changed.wait()
        return (time.perf_counter() - began) * 1000


async def memory_per_vm(engine: Engine, count: int) -> float:
    """Growth of our own resident memory by each running VM, in KiB."""
    before = resident_kib()
    for number in range(count):
        await boot_ours(engine, f"vm-{number}", keep=True)
    return (resident_kib() - before) / count


def resident_kib() -> int:
    """Our resident memory (VmRSS of proc(5))."""
    text = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0])


def report(ours: list[float], by_hand: list[float], growth: float) -> int:
    """Print and write the figures; 1 when the target is missed."""
    ratio = statistics.median(ours) / statistics.median(by_hand)
    result = {
        "boot_to_running_ms": {"median": statistics.median(ours), "all": ours},
        "same_command_by_hand_ms": {"median": statistics.median(by_hand), "all": by_hand},
        "ratio": ratio,
        "target": TARGET,
        "server_memory_per_vm_kib": growth,
    }
    (ROOT / "bench" / "results-boot.json").write_text(json.dumps(result, indent=1) + "\n")
    verdict = "reached" if ratio <= TARGET else "NOT REACHED"
    print("| measure | value |\n|---|---|")
    print(f"| boot to Running, median of {len(ours)} | {statistics.median(ours):.0f} ms |")
    print(f"| same command line by hand | {statistics.median(by_hand):.0f} ms |")
    print(f"| ratio (target {TARGET}) | {ratio:.2f}, {verdict} |")
    print(f"| our own memory per running VM | {growth:.0f} KiB |")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    raise SystemExit(asyncio.run(main(parser.parse_args().runs)))
