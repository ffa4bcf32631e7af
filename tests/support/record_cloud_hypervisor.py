"""Record ``conversations/cloud-hypervisor-VERSION.json`` from a real Cloud Hypervisor.

    PYTHONPATH=src:tests .venv/bin/python -m support.record_cloud_hypervisor CLOUD_HYPERVISOR

It boots tests/guest/tiny.S; see tests/vm/test_tiny_guest.py for what that needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from stillframe.host.files import clone
from stillframe.model.errors import VmmFailure
from stillframe.vmm.cloud_hypervisor import api
from stillframe.vmm.cloud_hypervisor.driver import CloudHypervisorDriver
from support.conversations import DIRECTORY, Exchange, recording
from support.record_firecracker import NETWORKED, SPEC, files


async def record(binary: str, home: Path) -> tuple[str, dict[str, list[Exchange]]]:
    """Boot and capture; restore and capture; be refused; the same with a network.

    The version, and what was said.
    """
    driver = CloudHypervisorDriver(binary, accelerator="kvm")
    version = (await driver.probe()).version
    cold = files(home)
    heard: dict[str, list[Exchange]] = {}
    with recording() as heard["boot"]:
        machine = await driver.start(SPEC, cold)
    with recording() as heard["capture"]:
        await machine.status()
        await machine.pause()
        await machine.save_devices(home / "devices")
        await machine.resume()
    with recording() as heard["refusals"]:
        with contextlib.suppress(VmmFailure):
            await machine.call(api.boot())
        with contextlib.suppress(VmmFailure):  # it runs
            await machine.save_devices(home / "again")
    await machine.kill()
    clone(cold.memory_image, home / "captured")
    warm = replace(cold, device_state=home / "devices", memory_image=home / "captured")
    with recording() as heard["restore"]:
        machine = await driver.start(SPEC, warm)
    with recording() as heard["capture restored"]:
        await machine.status()
        await machine.resume()
        await machine.pause()
        await machine.save_devices(home / "more")
    await machine.kill()
    with recording() as heard["boot with network"]:
        machine = await driver.start(NETWORKED, cold)
    await machine.pause()
    await machine.save_devices(home / "networked")
    await machine.kill()
    warm = replace(warm, device_state=home / "networked")
    with recording() as heard["restore with network"]:
        machine = await driver.start(NETWORKED, warm)
    await machine.kill()
    return version, {
        name: [_short(exchange) for exchange in exchanges] for name, exchanges in heard.items()
    }


def _short(exchange: Exchange) -> Exchange:
    """Without what vm.info tells of configuration and devices, which nobody reads."""
    body = exchange["answer"]["body"]
    if isinstance(body, dict) and "state" in body:
        exchange["answer"]["body"] = {"state": body["state"]}
    return exchange


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as home:
        version, heard = asyncio.run(record(sys.argv[1], Path(home)))
    DIRECTORY.mkdir(exist_ok=True)
    text = json.dumps(heard, indent=1) + "\n"
    (DIRECTORY / f"cloud-hypervisor-{version}.json").write_text(text)


if __name__ == "__main__":
    main()
