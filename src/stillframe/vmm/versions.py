"""Which versions of the hypervisors are run, and which are refused, with the reason.

A version is refused when it lacks what we rely on, or when a guest or a snapshot from elsewhere
could use a known hole in it to reach the host and a later release has closed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillframe.model.errors import MissingComponent
from stillframe.model.values import Hypervisor

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KnownBad:
    """Versions from ``since`` (inclusive) to ``before`` are refused because of ``reason``.

    ``cves`` names the holes, if it is for holes.
    """

    since: Version
    before: Version
    reason: str
    cves: tuple[str, ...] = ()


# For its holes no QEMU is refused: distributions close them without a new version number.
_QEMU = (KnownBad((0,), (6, 2), "it cannot map a guest's memory as our images need"),)
# CVE-2026-5747: AWS security bulletin 2026-015, GHSA-776c-mpj7-jm3r. Guests of ours have no PCI
# transport, which is the holed part; but whether one is there is told by device state, and that
# may come from elsewhere. 1.12 does not know the transport.
_FIRECRACKER_PCI = "device state from elsewhere could let a guest write into the VMM's memory"
KNOWN_BAD: dict[Hypervisor, Sequence[KnownBad]] = {
    Hypervisor.QEMU: _QEMU,
    Hypervisor.QEMU_MICROVM: _QEMU,
    Hypervisor.FIRECRACKER: (
        # CHANGELOG.md of 1.12.0: network_overrides in /snapshot/load.
        KnownBad((0,), (1, 12), "a fork could not get a network device of its own"),
        KnownBad((1, 13), (1, 14, 4), _FIRECRACKER_PCI, ("CVE-2026-5747",)),
        KnownBad((1, 15), (1, 15, 1), _FIRECRACKER_PCI, ("CVE-2026-5747",)),
    ),
    Hypervisor.CLOUD_HYPERVISOR: (
        # release-notes.md of v50.1 and v51.0: GHSA-jmr4-g2hv-mjj6 (34.0 to 50.0). The releases of
        # the 50 series that close it are below our minimum all the same.
        KnownBad((0,), (51,), "a guest's disk could name files of the host", ("CVE-2026-27211",)),
        # release-notes.md of v52.0: GHSA-f47p-p25q-83rh, use after free in virtio-block.
        KnownBad((51,), (51, 2), "a guest could corrupt the VMM's memory", ("CVE-2026-45782",)),
    ),
}


def refuse_known_bad(hypervisor: Hypervisor, version: Version) -> None:
    """Raises MissingComponent, with the reason and what to install, for such a version."""
    entries = KNOWN_BAD.get(hypervisor, ())
    for bad in entries:
        if bad.since <= version < bad.before:
            named = f"{', '.join(bad.cves)}: " if bad.cves else ""
            # Not the end of this range: what is newer than that may be bad in another way.
            good = max(entry.before for entry in entries)
            raise MissingComponent(
                f"{hypervisor.value} {_text(version)} is refused: {named}{bad.reason}",
                hint=f"install {_text(good)} or newer",
            )


def _text(version: Version) -> str:
    return ".".join(map(str, version))
