"""Which versions of the hypervisors are run, and which are refused, with the reason.

A version is refused when it lacks what we rely on, or when a guest could use a known hole in it to
reach its host and a later release has closed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillframe.model.errors import MissingComponent
from stillframe.model.values import Hypervisor

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KnownBad:
    """Versions from ``since`` (inclusive) to ``before`` are refused because of ``reason``."""

    since: Version
    before: Version
    reason: str


_QEMU = (KnownBad((0,), (6, 2), "it cannot map a guest's memory as our images need"),)
KNOWN_BAD: dict[Hypervisor, Sequence[KnownBad]] = {
    Hypervisor.QEMU: _QEMU,
    Hypervisor.QEMU_MICROVM: _QEMU,
    Hypervisor.FIRECRACKER: (
        # CHANGELOG.md of 1.12.0: network_overrides in /snapshot/load.
        KnownBad((0,), (1, 12), "a fork could not get a network device of its own"),
    ),
    Hypervisor.CLOUD_HYPERVISOR: (
        # release-notes.md of v51.0: GHSA-jmr4-g2hv-mjj6, disk images of a guest's making.
        KnownBad((0,), (51,), "CVE-2026-27211: a guest's disk could name files of the host"),
        # release-notes.md of v52.0: GHSA-f47p-p25q-83rh, use after free in virtio-block.
        KnownBad((51,), (51, 2), "CVE-2026-45782: a guest could corrupt the VMM's memory"),
    ),
}


def refuse_known_bad(hypervisor: Hypervisor, version: Version) -> None:
    """Raises MissingComponent, with the reason and what to install, for such a version."""
    for bad in KNOWN_BAD.get(hypervisor, ()):
        if bad.since <= version < bad.before:
            text = ".".join(map(str, version))
            raise MissingComponent(
                f"{hypervisor.value} {text} is refused: {bad.reason}",
                hint=f"install {'.'.join(map(str, bad.before))} or newer",
            )
