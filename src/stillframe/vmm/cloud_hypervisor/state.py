"""Device state of Cloud Hypervisor as one file: its ``config.json`` and ``state.json``.

The state lists the ranges of memory that a restore copies from the dump beside it. They are taken
out: memory is in our own image, which the restored VM maps as its zone's file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillframe.model.errors import DamagedData

_FORMAT = 1
CONFIG, STATE, RANGES = "config.json", "state.json", "memory_ranges"


def pack(directory: Path, destination: Path) -> None:
    """Put what Cloud Hypervisor wrote to ``directory`` into the new file ``destination``.

    Raises DamagedData when it is not as expected, OSError.
    """
    try:
        config = json.loads((directory / CONFIG).read_bytes())
        state = json.loads((directory / STATE).read_bytes())
    except ValueError as error:
        raise DamagedData(f"Cloud Hypervisor's state is no JSON: {error}") from error
    if not _empty_ranges(state):
        raise DamagedData("Cloud Hypervisor's state does not tell where its memory is")
    document = {"format": _FORMAT, "config": config, "state": state}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    with destination.open("x", encoding="ascii") as file:
        file.write(text)


def unpack(source: Path, directory: Path) -> None:
    """Write the two files to ``directory``. Raises DamagedData, OSError."""
    try:
        document = json.loads(source.read_bytes())
        if document["format"] != _FORMAT:
            raise DamagedData(f"device state of format {document['format']} is not known here")
        parts = {CONFIG: document["config"], STATE: document["state"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedData(f"the device state is damaged: {error}") from error
    for name, part in parts.items():
        (directory / name).write_text(json.dumps(part), encoding="ascii")


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
        if name == RANGES:
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
