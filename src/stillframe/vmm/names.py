"""Names in a VM's directory for its files elsewhere, for VMMs that keep paths in snapshots.

Such a VMM runs in the VM's directory and knows relative names only: the same ones in every VM, so
no path in a snapshot leads out of the VM that loads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from stillframe.model.errors import HostFailure
from stillframe.vmm.driver import MachineResources

_SUFFIX = ".link"


def give_names(resources: MachineResources, others: Mapping[str, Path]) -> list[str]:
    """Name the disks, and ``others`` by names ending in ``.link``; the names of the disks.

    Raises HostFailure.
    """
    names = [f"disk{index}{_SUFFIX}" for index in range(len(resources.disks))]
    targets = {
        **dict(zip(names, (disk.path for disk in resources.disks), strict=True)),
        **others,
    }
    try:
        for name, target in targets.items():
            (resources.directory / name).symlink_to(target)
    except OSError as error:
        raise HostFailure(f"the VM's files cannot be named: {error.strerror}") from error
    return names


def remove_names(directory: Path, *, sockets: bool = True) -> None:
    """Remove the names, and ``sockets`` with them. No error when there are none."""
    with contextlib.suppress(OSError):
        for path in list(directory.iterdir()):
            name = path.is_symlink() and path.suffix == _SUFFIX
            if name or (sockets and path.is_socket()):
                path.unlink(missing_ok=True)
