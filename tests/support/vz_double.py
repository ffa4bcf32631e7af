"""A double of ``vmm/vz/framework.py`` for hosts without Virtualization.framework.

Its guests have a word for a memory, which is told to whoever connects to the agent's port. As a
program it stands in for the interpreter that runs a shim: see ``interpreter``.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from stillframe.vmm.vsock import AGENT_VSOCK_PORT
from stillframe.vmm.vz.protocol import Description, FrameworkFailure, Refusal

FILLER = bytes(range(256)) * 512  # a state file is larger than what fits into a buffer
# Files in a VM's directory: what the double is to do, and by which it tells that it has stopped.
REFUSES_ENTROPY, REFUSES_TO_SAVE = "refuses-entropy", "refuses-to-save"
TOO_MANY, HANGS_AT_STOP, LET_GO = "too-many", "hangs-at-stop", "let-go"


class Connection:
    """Implements ``GuestConnection``."""

    def __init__(self, host: socket.socket) -> None:
        self._host = host
        self.descriptor = host.fileno()

    def close(self) -> None:
        self._host.close()


class DoubleMachine:
    """Implements ``VirtualMachine``, with the framework's rules on states."""

    def __init__(self, description: Description, ended: Callable[[str], None]) -> None:
        self.description, self._ended = description, ended
        self.machine = description.machine or uuid.uuid4().bytes
        self.memory = ""
        self._state = "stopped"
        self._echoing: set[asyncio.Task[None]] = set()

    def _only(self, *states: str) -> None:
        if self._state not in states:
            raise FrameworkFailure(f"invalid transition from {self._state}", Refusal.REQUEST)

    async def state(self) -> str:
        return self._state

    async def start(self) -> None:
        self._only("stopped")
        if (Path(self.description.console).parent / TOO_MANY).exists():
            raise FrameworkFailure("too many VMs are running", Refusal.LIMIT)
        Path(self.description.console).write_text("booted\n")
        self.memory, self._state = uuid.uuid4().hex, "running"

    async def pause(self) -> None:
        self._only("running")
        self._state = "paused"

    async def resume(self) -> None:
        self._only("paused")
        self._state = "running"

    def _must_agree(self) -> dict[str, object]:
        one = self.description
        return {
            "machine": self.machine.hex(), "mac": one.mac, "entropy": one.entropy,
            "vcpus": one.vcpus, "memory_bytes": one.memory_bytes, "disks": len(one.disks),
        }  # fmt: skip

    async def save(self, path: Path) -> None:
        self._only("paused")
        state = json.dumps({"of": self._must_agree(), "memory": self.memory}).encode()
        path.write_bytes(state + b"\n" + FILLER)
        if (path.parent / REFUSES_TO_SAVE).exists():
            raise FrameworkFailure("the disk is full", Refusal.NO_SPACE)

    async def restore(self, path: Path) -> None:
        self._only("stopped")
        head, _, rest = path.read_bytes().partition(b"\n")
        saved = json.loads(head)
        if saved["of"] != self._must_agree() or rest != FILLER:
            words = "failed to restore: invalid argument (VZErrorDomain 12)"
            raise FrameworkFailure(words, Refusal.RESTORE)
        self.memory, self._state = saved["memory"], "paused"

    async def stop(self) -> None:
        self._only("running", "paused")
        self._state = "stopped"
        home = Path(self.description.console).parent
        if (home / HANGS_AT_STOP).exists():
            await asyncio.Event().wait()
        (home / LET_GO).touch()

    async def request_stop(self) -> None:
        self._only("running")
        self._state = "stopped"
        self._ended("guest-shutdown")

    async def connect(self, port: int) -> Connection:
        if port != AGENT_VSOCK_PORT or self._state != "running":
            raise FrameworkFailure("connection reset by peer")
        host, guest = socket.socketpair()
        guest.sendall(f"{self.memory}\n".encode())
        self._echoing.add(asyncio.get_running_loop().create_task(_echo(guest)))
        return Connection(host)


async def _echo(guest: socket.socket) -> None:
    guest.setblocking(False)
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(guest, 1 << 16):
        await loop.sock_sendall(guest, data)
    guest.close()


class DoubleFramework:
    """Implements ``Framework``; ``made`` are the VMs it made."""

    def __init__(self) -> None:
        self.made: list[DoubleMachine] = []

    async def create(self, description: Description, ended: Callable[[str], None]) -> DoubleMachine:
        for path, _ in description.disks:
            if not Path(path).exists():
                raise FrameworkFailure(f"no such disk: {path}", Refusal.INVALID)
        home = Path(description.console).parent
        if description.entropy and (home / REFUSES_ENTROPY).exists():
            raise FrameworkFailure("entropy devices cannot be saved", Refusal.UNSAVEABLE)
        self.made.append(DoubleMachine(description, ended))
        return self.made[-1]


def interpreter(home: Path, unusable: str | None = None) -> str:
    """A program that takes a shim's command line and serves it with this double."""
    program = home / "interpreter"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from support.vz_double import main\n"
        f"main(sys.argv[1:], {unusable!r})\n"
    )
    program.chmod(0o700)
    return str(program)


def main(arguments: list[str], unusable: str | None) -> None:
    """Stand in for ``python -m stillframe.vmm.vz.shim``."""
    from stillframe.vmm.vz.shim import serve_and_exit

    assert arguments[:2] == ["-m", "stillframe.vmm.vz.shim"]
    if arguments[2:] == ["--probe"]:
        print(json.dumps({"unusable": unusable}))
        return
    assert (arguments[2], arguments[4]) == ("--listen", "--directory")
    assert Path(arguments[5]).is_dir()
    os.umask(0o077)
    serve_and_exit(DoubleFramework(), socket.socket(fileno=int(arguments[3])))
