"""``stillframe doctor``: what this machine has, what it lacks, and how to mend it.

Reads what is on this machine directly, and asks a running server what its hypervisors offer; where
none runs, it looks at them as a server would. What it takes from ``host`` and ``vmm`` is imported
lazily (exceptions named in the house test).
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from stillframe.cli import output
from stillframe.cli.client import Client
from stillframe.cli.output import JsonFlag
from stillframe.cli.settings import Settings
from stillframe.model.errors import StillframeError
from stillframe.model.units import format_size

_PROGRAMS = {
    "sqfstar": ("squashfs-tools", "builds images' root disks"),
    "mke2fs": ("e2fsprogs", "formats instances' writable disks"),
    "busybox": ("busybox-static", "is the content of stillframe/base"),
}
# Less than this and the first snapshots of ordinary VMs will not fit.
_LITTLE_SPACE = 5 * 1024**3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``level`` is ok, warn or fail; ``fix`` says what to do, if anything."""

    what: str
    level: str
    found: str
    fix: str = ""


def doctor(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Check this machine; exit 1 if something needed is missing."""
    client: Client = context.obj
    findings = [*_local_findings(client.settings), *_server_findings(client)]
    if as_json:
        output.print_json([asdict(finding) for finding in findings])
    else:
        output.print_table(
            ("", "WHAT", "FOUND", "FIX"), [(f.level, f.what, f.found, f.fix) for f in findings]
        )
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


def _local_findings(settings: Settings) -> Iterator[Finding]:
    yield _program(settings.qemu_binary, "qemu-system-x86", "runs virtual machines")
    yield _optional(settings.firecracker_binary, "firecracker", settings.programs_dir)
    yield _optional(settings.cloud_hypervisor_binary, "cloud-hypervisor", settings.programs_dir)
    yield _network(Path("/dev/net/tun"))
    for name, (package, purpose) in _PROGRAMS.items():
        yield _program(name, package, purpose)
    yield _kernel(settings.kernel_dir)
    yield (
        Finding("guest agent", "ok", str(settings.agent_binary))
        if settings.agent_binary.is_file()
        else Finding("guest agent", "fail", "not built", "run `make setup` in the source tree")
    )
    yield _tracker(settings.tracker_library)
    yield _kvm(Path("/dev/kvm"))
    yield from _data_directory(settings.data_dir)


def _program(name: str, package: str, purpose: str) -> Finding:
    # Administrators' programs are not on every user's path.
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    found = shutil.which(name, path=path)
    if found:
        return Finding(name, "ok", found)
    return Finding(name, "fail", f"missing; it {purpose}", f"apt-get install {package}")


def _optional(name: str, hypervisor: str, installed: Path) -> Finding:
    """A hypervisor that nobody needs: whether its program is there, not whether it works."""
    from stillframe.host.programs import find_program

    found = find_program(name, installed)
    if found:
        return Finding(hypervisor, "ok", found)
    missing = f"{name} is not installed; guests can do without"
    return Finding(hypervisor, "warn", missing, f"stillframe setup {hypervisor}")


def _network(device: Path) -> Finding:
    """What the network of guests takes under hypervisors that have none themselves."""
    from stillframe.host.programs import find_program

    without = "no network under firecracker and cloud-hypervisor"
    found = find_program("slirp4netns")
    if not found:
        fix = "apt-get install slirp4netns"
        return Finding("slirp4netns", "warn", f"missing: {without}", fix)
    if not os.access(device, os.R_OK | os.W_OK):
        why = "no permission" if device.exists() else "absent"
        return Finding("slirp4netns", "warn", f"{device}: {why}: {without}", "modprobe tun")
    return Finding("slirp4netns", "ok", found)


def _tracker(library: Path) -> Finding:
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    if not library.is_file():
        found, fix = "not built: longer pauses", "run `make setup` in the source tree"
        return Finding("write tracking", "warn", found, fix)
    if release < (6, 7):
        found = f"Linux {platform.release()} cannot: longer pauses"
        return Finding("write tracking", "warn", found, "use Linux 6.7 or newer")
    return Finding("write tracking", "ok", str(library))


def _kernel(directory: Path) -> Finding:
    kernels = sorted(directory.glob("boot/vmlinuz-*"))
    if kernels:
        return Finding("guest kernel", "ok", str(kernels[-1]))
    return Finding(
        "guest kernel", "fail", f"none under {directory}", "run `make setup` in the source tree"
    )


def _kvm(device: Path) -> Finding:
    if not device.exists():
        return Finding(
            "/dev/kvm", "warn", "absent: guests are emulated (slower)",
            "enable virtualization in the firmware or of the cloud instance",
        )  # fmt: skip
    if not os.access(device, os.R_OK | os.W_OK):
        return Finding(
            "/dev/kvm", "warn", "no permission: guests are emulated (slower)",
            "add your user to the group kvm",
        )  # fmt: skip
    # Whether guests truly run under it is found by the server's probe, which boots one.
    return Finding("/dev/kvm", "ok", "present and may be opened")


def _data_directory(directory: Path) -> Iterator[Finding]:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        yield Finding(
            "data directory", "fail", f"{directory} may not be written",
            "set STILLFRAME_DATA_DIR to a directory of yours",
        )  # fmt: skip
        return
    free = shutil.disk_usage(existing).free
    level = "ok" if free >= _LITTLE_SPACE else "warn"
    yield Finding(
        "data directory", level, f"{directory}, {format_size(free)} free",
        "" if level == "ok" else "free some space or move it with STILLFRAME_DATA_DIR",
    )  # fmt: skip
    yield _reflink(existing)


def _reflink(directory: Path) -> Finding:
    from stillframe.host.files import supports_reflink

    try:
        supported = supports_reflink(directory)
    except (OSError, StillframeError) as error:
        return Finding("reflink", "warn", f"cannot be tried: {error}")
    if supported:
        return Finding("reflink", "ok", "disks and memory images are cloned, not copied")
    return Finding(
        "reflink", "warn", "not offered: clones copy their data (sparsely)",
        "put the data directory on XFS or btrfs",
    )  # fmt: skip


def _server_findings(client: Client) -> Iterator[Finding]:
    try:
        answer: dict[str, Any] = client.request("GET", "/capabilities")
    except StillframeError as error:
        yield Finding("server", "warn", error.message, error.hint or "")
        yield from map(_hypervisor, asyncio.run(_probed_here(client.settings)))
        return
    yield Finding("server", "ok", f"{client.base_url}, version {answer['server']['version']}")
    yield from map(_hypervisor, answer.get("runtimes", []))


async def _probed_here(settings: Settings) -> list[dict[str, Any]]:
    """What a server with these settings would find of its hypervisors."""
    from stillframe.vmm.drivers import make_drivers

    drivers = make_drivers(
        settings.qemu_binary, settings.accelerator, None,
        firecracker_binary=settings.firecracker_binary,
        cloud_hypervisor_binary=settings.cloud_hypervisor_binary,
        programs_dir=settings.programs_dir,
    )  # fmt: skip
    found = await asyncio.gather(*(driver.probe() for driver in drivers))
    return [{**asdict(probe), "name": probe.hypervisor.value} for probe in found]


def _hypervisor(runtime: dict[str, Any]) -> Finding:
    name = f"hypervisor {runtime['name']}"
    if runtime["available"]:
        features = ", ".join(runtime.get("features") or ["available"])
        what = f"{runtime.get('version')} on {runtime.get('accelerator')}: {features}"
        emulated = runtime.get("reason")  # why it is not accelerated, if it is not
        return Finding(name, "ok", f"{what}; emulated: {emulated}" if emulated else what)
    reason = str(runtime.get("reason") or "not available")
    return Finding(name, "warn", reason, str(runtime.get("hint") or ""))
