"""Device state of vz as one file: what the framework saved, and a trailer that says whose it is.

The framework's file holds the guest's memory too; it is opaque, encrypted for the Mac and user
that saved it, and as large as it likes. It stays at the start of our file, so that a clone cut off
at the trailer is it again, byte by byte, without copying where the file system shares blocks.

    framework's file | trailer, JSON | length of the trailer, 8 bytes little-endian | magic
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from stillframe.host.files import clone, open_regular
from stillframe.model.errors import DamagedData
from stillframe.vmm.driver import MachineSpec
from stillframe.vmm.vz.protocol import Identity

_MAGIC = b"STILLVZ1"
_END = struct.Struct("<Q8s")
_MAX_TRAILER = 1 << 16  # bytes


@dataclass(frozen=True, slots=True)
class Trailer:
    """What the VM must be made of for its state to load."""

    vcpus: int
    memory_bytes: int
    identity: Identity

    def check(self, spec: MachineSpec) -> None:
        """Raises DamagedData when the state is of a VM of another shape."""
        found = (self.vcpus, self.memory_bytes)
        if found != (spec.vcpus, spec.memory_bytes):
            raise DamagedData(
                f"the device state is of a VM with {found[0]} vCPUs and {found[1]} bytes of memory"
            )
        if spec.network != (self.identity.mac is not None):
            raise DamagedData("the device state does not agree with the spec on a network card")


def append_trailer(path: Path, trailer: Trailer) -> None:
    """Add the trailer to the framework's file. Raises OSError."""
    document = {
        "vcpus": trailer.vcpus,
        "memory_bytes": trailer.memory_bytes,
        "identity": trailer.identity.as_json(),
    }
    text = json.dumps(document, sort_keys=True).encode("ascii")
    with path.open("r+b") as file:  # never a new one
        file.seek(0, os.SEEK_END)
        file.write(text + _END.pack(len(text), _MAGIC))


def detach(source: Path, destination: Path) -> Trailer:
    """Make the new file ``destination`` the framework's part of ``source``; the trailer.

    Raises DamagedData, OSError.
    """
    trailer, length = _read(source)
    clone(source, destination)
    try:
        os.truncate(destination, length)
    except BaseException:
        destination.unlink(missing_ok=True)
        raise
    return trailer


def _read(source: Path) -> tuple[Trailer, int]:
    """The trailer, and where it starts."""
    with os.fdopen(open_regular(source), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _END.size:
            raise DamagedData("the device state is cut off")
        file.seek(size - _END.size)
        length, magic = _END.unpack(file.read(_END.size))
        start = size - _END.size - length
        if magic != _MAGIC or length > _MAX_TRAILER or start < 0:
            raise DamagedData("the device state does not end as one of vz does")
        file.seek(start)
        text = file.read(length)
    try:
        document = json.loads(text)
        vcpus, memory = document["vcpus"], document["memory_bytes"]
        return Trailer(int(vcpus), int(memory), Identity.from_json(document["identity"])), start
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedData(f"the device state is damaged: {error}") from error
