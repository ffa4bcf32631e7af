"""Can VMs of Virtualization.framework be made here? By facts, then by asking the framework."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from stillframe.host.process import run
from stillframe.model.errors import MissingComponent, NotSupported

PACKAGE_ROOT = Path(__file__).resolve().parents[3]
_NEEDED = "Virtualization.framework needs macOS 14 or newer on Apple silicon"
_OLDEST = 14  # the first that saves and restores
_DEADLINE = 60.0  # seconds
_ENTITLEMENT = "com.apple.security.virtualization"


@dataclass(frozen=True, slots=True)
class PlatformFacts:
    """What is known of this host without asking the framework."""

    system: str  # platform.system()
    release: str  # of macOS, such as 14.5; empty elsewhere
    machine: str  # platform.machine()
    bindings: bool  # whether PyObjC's Virtualization can be imported
    interpreter: str = sys.executable

    @classmethod
    def here(cls) -> PlatformFacts:
        """Those of this host."""
        bindings = importlib.util.find_spec("Virtualization") is not None
        return cls(platform.system(), platform.mac_ver()[0], platform.machine(), bindings)


def check_facts(facts: PlatformFacts) -> None:
    """Raises NotSupported or MissingComponent, with what to do about it."""
    if facts.system != "Darwin":
        raise NotSupported(
            f"{_NEEDED}; this is {facts.system} {facts.machine}",
            hint="use qemu, firecracker or cloud-hypervisor here",
        )
    if facts.machine != "arm64":
        raise NotSupported(
            f"{_NEEDED}; this is an Intel Mac, or an interpreter for one ({facts.machine})",
            hint="on Apple silicon, use a native Python; on an Intel Mac, use qemu",
        )
    match = re.match(r"\d+", facts.release)
    if match is None or int(match[0]) < _OLDEST:
        raise NotSupported(
            f"{_NEEDED}; this is macOS {facts.release or 'of an unknown version'}",
            hint="update macOS: older ones cannot save the state of a VM",
        )
    if not facts.bindings:
        raise MissingComponent(
            "pyobjc-framework-Virtualization is not installed",
            hint="pip install 'stillframe[vz]'",
        )


async def ask_framework(interpreter: str) -> None:
    """Have a shim validate a small VM. Raises MissingComponent, HostFailure, Timeout."""
    done = await run(
        shim_command(interpreter, "--probe"),
        timeout=_DEADLINE, extra_environment=shim_environment(),
    )  # fmt: skip
    try:
        unusable = json.loads(done.stdout)["unusable"]
    except (ValueError, KeyError, TypeError) as error:
        raise MissingComponent("the vz shim gives no answer that can be understood") from error
    if unusable is None:
        return
    if "entitlement" not in unusable:
        raise MissingComponent(f"Virtualization.framework refuses: {unusable}")
    raise MissingComponent(
        f"{interpreter} lacks the entitlement {_ENTITLEMENT}: {unusable}",
        hint="sign a copy of the interpreter that has it: docs/hypervisors.md, vz",
    )


def shim_command(interpreter: str, *arguments: str | Path) -> list[str | Path]:
    """The command line of a shim."""
    return [interpreter, "-m", "stillframe.vmm.vz.shim", *arguments]


def shim_environment() -> dict[str, str]:
    """What a shim needs beside the minimal environment: to find this package."""
    return {"PYTHONPATH": str(PACKAGE_ROOT), "PYTHONUNBUFFERED": "1"}
