"""What driver and shim say to each other, and what the shim asks of the framework.

A connection to the shim's socket starts with one line. ``CONNECT port`` makes it the byte stream to
that port of the guest, as with Firecracker (``vmm/vsock.py``). Anything else is a request, a JSON
object with a ``do``; the answer is a JSON object in one line, with an ``error`` if it was refused.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

SOCKET = "vz.sock"  # in the VM's directory
ENDED = "STILLFRAME-VZ-ENDED "  # the shim's last line, followed by the reason
MAX_LINE = 1 << 16  # bytes of a request or an answer


class Refusal(StrEnum):
    """Why the framework refused, as far as that makes a difference."""

    NO_SPACE = "no-space"
    INVALID = "invalid"  # the configuration as a whole, missing entitlements too
    UNSAVEABLE = "unsaveable"  # the VM would run, but its state could not be saved
    RESTORE = "restore"  # saved by another Mac, user or VM, or damaged: the framework does not tell
    LIMIT = "limit"  # macOS runs no more VMs
    REQUEST = "request"  # the shim does not understand, or the guest's state forbids it
    OTHER = "other"


class FrameworkFailure(Exception):
    """The framework, or the shim itself, refused."""

    def __init__(self, message: str, kind: Refusal = Refusal.OTHER) -> None:
        super().__init__(message)
        self.message, self.kind = message, kind


@dataclass(frozen=True, slots=True)
class Identity:
    """What of a VM must be the same again for its saved state to load, beside its size.

    ``machine`` is a VZGenericMachineIdentifier's data representation, ``mac`` that of the network
    card (None without one), ``entropy`` whether there is an entropy device.
    """

    machine: bytes
    mac: str | None
    entropy: bool

    def as_json(self) -> dict[str, Any]:
        """For the socket and for the state file."""
        machine = base64.b64encode(self.machine).decode("ascii")
        return {"machine": machine, "mac": self.mac, "entropy": self.entropy}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Identity:
        """Raises ValueError, KeyError, TypeError for what is none."""
        machine, mac = document["machine"], document["mac"]
        entropy = document["entropy"]
        if not isinstance(entropy, bool) or not isinstance(mac, str | None):
            raise TypeError("an identity has the wrong types")
        return cls(base64.b64decode(machine, validate=True), mac, entropy)


@dataclass(frozen=True, slots=True)
class Description:
    """A VM to be made. ``disks`` are raw: path, and whether it is read-only.

    Without ``machine`` a new machine identifier is made; the rest is as in ``Identity``.
    """

    vcpus: int
    memory_bytes: int
    kernel: str
    initrd: str | None
    arguments: str
    disks: tuple[tuple[str, bool], ...]
    console: str
    mac: str | None = None
    machine: bytes | None = None
    entropy: bool = True

    def as_json(self) -> dict[str, Any]:
        """For the socket."""
        machine = None if self.machine is None else base64.b64encode(self.machine).decode("ascii")
        return {**asdict(self), "machine": machine}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Description:
        """Raises ValueError, KeyError, TypeError for what is none."""
        machine = document["machine"]
        return cls(
            **{
                **document,
                "disks": tuple((str(path), bool(readonly)) for path, readonly in document["disks"]),
                "machine": None if machine is None else base64.b64decode(machine, validate=True),
            }
        )


class GuestConnection(Protocol):
    """A connection to a port of the guest. The descriptor is good until ``close``."""

    descriptor: int

    def close(self) -> None:
        """Hang up."""


class VirtualMachine(Protocol):
    """One VM of the framework. All of it raises FrameworkFailure."""

    machine: bytes  # its machine identifier

    async def state(self) -> str:
        """The framework's word for it: stopped, running, paused, ..."""

    async def start(self) -> None:
        """Boot a stopped VM."""

    async def pause(self) -> None:
        """Stop all vCPUs."""

    async def resume(self) -> None:
        """Let the vCPUs of a paused VM run."""

    async def save(self, path: Path) -> None:
        """Write memory and devices of a paused VM to a new file."""

    async def restore(self, path: Path) -> None:
        """Load them into a stopped VM of the same configuration, which is paused then."""

    async def stop(self) -> None:
        """Switch the VM off without asking its guest."""

    async def request_stop(self) -> None:
        """Ask the guest to shut down."""

    async def connect(self, port: int) -> GuestConnection:
        """Connect to a vsock port of the guest."""


class Framework(Protocol):
    """What the shim uses of Virtualization.framework: ``framework.py``, and nothing else."""

    async def create(
        self, description: Description, ended: Callable[[str], None]
    ) -> VirtualMachine:
        """Make a VM and validate it, that it can be saved too. It is stopped.

        ``ended`` is called with the reason when the guest has ended, from any thread. Raises
        FrameworkFailure.
        """
