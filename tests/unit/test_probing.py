"""What is missing is looked for again; what was found stays found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stillframe.model.errors import MissingComponent
from stillframe.model.values import Hypervisor
from stillframe.vmm import probing
from stillframe.vmm.cloud_hypervisor.driver import CloudHypervisorDriver
from stillframe.vmm.driver import DriverProbe
from stillframe.vmm.firecracker.driver import FirecrackerDriver
from stillframe.vmm.probing import ProbeOnce


@dataclass
class Host:
    """A hypervisor that is installed or not, a clock, and how often somebody looked."""

    installed: bool = False
    takes: float = 0.0  # seconds
    now: float = 1000.0
    looks: int = 0
    probe: ProbeOnce = field(init=False)

    def __post_init__(self) -> None:
        self.probe = ProbeOnce(Hypervisor.QEMU, self.look, steady=lambda: self.now)

    async def look(self) -> DriverProbe:
        self.looks += 1
        self.now += self.takes
        if not self.installed:
            raise MissingComponent("it is not installed", hint="install it")
        return DriverProbe(Hypervisor.QEMU, True, "1.0")


async def test_what_is_installed_while_the_server_runs_is_found() -> None:
    host = Host()
    assert (await host.probe()).reason == "it is not installed"
    host.installed = True
    assert not (await host.probe()).available  # looked for a moment ago
    host.now += 11
    assert (await host.probe()).version == "1.0"
    assert host.looks == 2


async def test_what_was_found_is_not_looked_for_again() -> None:
    host = Host(installed=True)
    await host.probe()
    host.now += 1e6
    assert (await host.probe()).available
    assert host.looks == 1


async def test_a_look_that_takes_seconds_is_rare() -> None:
    host = Host(takes=5.0)
    await host.probe()
    host.now += 60
    await host.probe()
    assert host.looks == 1
    host.now += 60
    await host.probe()
    assert host.looks == 2


@pytest.mark.parametrize("make", [FirecrackerDriver, CloudHypervisorDriver])
async def test_what_setup_installs_beside_a_running_server_is_found(
    make: type[FirecrackerDriver | CloudHypervisorDriver],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probing, "_SHORTEST_REST", 0.0)
    monkeypatch.setattr(probing, "_REST_FACTOR", 0)
    driver = make("vmm-of-ours", installed=tmp_path / "programs")
    assert (await driver.probe()).reason == "vmm-of-ours is not installed"
    (tmp_path / "programs").mkdir()
    program = tmp_path / "programs/vmm-of-ours"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert (await driver.probe()).reason != "vmm-of-ours is not installed"
