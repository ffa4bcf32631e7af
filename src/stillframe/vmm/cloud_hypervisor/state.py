"""Device state of Cloud Hypervisor as one file: its ``config.json`` and ``state.json``.

The state lists the ranges of memory that a restore copies from the dump beside it. They are taken
out: memory is in our own image, which the restored VM maps as its zone's file.

The configuration tells what the state belongs to. It is compared, and never given to another
Cloud Hypervisor: that gets one made for its VM, so nothing in a snapshot names a file to be opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillframe.host.files import open_regular
from stillframe.model.errors import DamagedData, VmmFailure

_FORMAT = 1
CONFIG, STATE, MEMORY = "config.json", "state.json", "memory-ranges"
_RANGES = "memory_ranges"
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)


def hold_memory_off(directory: Path) -> None:
    """Have a snapshot into ``directory`` end before it writes memory. Raises OSError.

    Cloud Hypervisor writes all of a private mapping, into a file of this name that must not exist
    yet, after everything else (vmm/src/vm.rs and memory_manager.rs, ``send``; 51.0 to 53.0).
    """
    (directory / MEMORY).mkdir(mode=0o700)


def complete(directory: Path) -> bool:
    """Whether all but memory was written: state is the last, and one JSON object."""
    try:
        _read(directory / CONFIG)
        _read(directory / STATE)
    except (OSError, DamagedData):
        return False
    return (directory / MEMORY).is_dir()


def pack(directory: Path, destination: Path) -> None:
    """Put what Cloud Hypervisor wrote to ``directory`` into the new file ``destination``.

    Raises DamagedData when it is not as expected, OSError.
    """
    config, state = _read(directory / CONFIG), _read(directory / STATE)
    if not _empty_ranges(state):
        raise DamagedData("Cloud Hypervisor's state does not tell where its memory is")
    document = {"format": _FORMAT, "config": config, "state": state}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    with destination.open("x", encoding="ascii") as file:
        file.write(text)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object that Cloud Hypervisor wrote. Raises DamagedData, OSError."""
    try:
        with open(open_regular(path), "rb") as file:  # noqa: PTH123 - a descriptor
            told = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DamagedData(f"Cloud Hypervisor's {path.name} is no JSON: {error}") from error
    if not isinstance(told, dict):
        raise DamagedData(f"Cloud Hypervisor's {path.name} is no JSON object")
    return told


class SavedState:
    """Device state that was packed."""

    def __init__(self, source: Path) -> None:
        """Raises DamagedData, OSError."""
        document = _read(source)
        try:
            if document["format"] != _FORMAT:
                raise DamagedData(f"device state of format {document['format']} is not known here")
            self._state = document["state"]
            self.shape = shape_of(document["config"])
            self.mac = _mac(document["config"])
        except (KeyError, TypeError, IndexError) as error:
            raise DamagedData(f"the device state is damaged: {error!r}") from error

    def unpack(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Write the state, and the configuration to restore it with, to ``directory``.

        Raises VmmFailure when the state is of another VM than ``config``, OSError.
        """
        if self.shape != shape_of(config):
            raise VmmFailure(
                "the device state is of another VM: "
                f"{_told(self.shape)}, not {_told(shape_of(config))}"
            )
        for name, part in ((CONFIG, config), (STATE, self._state)):
            (directory / name).write_text(json.dumps(part), encoding="ascii")


Shape = tuple[int, int, tuple[bool, ...], int]


def shape_of(config: Mapping[str, Any]) -> Shape:
    """What of a ``VmConfig`` must be equal: vCPUs, bytes, which disks are read-only, networks.

    Raises KeyError, TypeError, IndexError when it is no such thing.
    """
    return (
        config["cpus"]["boot_vcpus"],
        sum(zone["size"] for zone in config["memory"]["zones"]),
        tuple(disk["readonly"] for disk in config["disks"]),
        len(config.get("net") or ()),
    )


def _told(shape: Shape) -> str:
    vcpus, size, disks, networks = shape
    return f"{vcpus} vCPUs, {size} bytes, {len(disks)} disks, {networks} network devices"


def _mac(config: Mapping[str, Any]) -> str | None:
    """The guest's address; None without a network. Raises DamagedData, KeyError, TypeError."""
    if not config.get("net"):
        return None
    mac = config["net"][0]["mac"]
    if _MAC.fullmatch(mac) is None:
        raise DamagedData("the device state names no network address")
    return str(mac)


def _empty_ranges(value: Any) -> bool:
    """Empty every list of memory ranges within ``value``; whether there was one.

    Components keep their state as JSON within a string.
    """
    found = False
    if isinstance(value, list):
        return any(list(map(_empty_ranges, value)))  # all of them, not only the first
    if not isinstance(value, dict):
        return False
    for name, part in value.items():
        if name == _RANGES:
            value[name] = _emptied(part)
            found = True
        elif name == "state" and isinstance(part, str):
            inner = json.loads(part)
            if _empty_ranges(inner):
                value[name] = json.dumps(inner, separators=(",", ":"))
                found = True
        else:
            found = _empty_ranges(part) or found
    return found


def _emptied(ranges: Any) -> Any:
    """A table of ranges is a list, or an object that holds one."""
    if isinstance(ranges, dict):
        return {name: _emptied(part) for name, part in ranges.items()}
    return [] if isinstance(ranges, list) else ranges
