"""A QEMU of our own, without a control plane: spawned by hand, spoken to over a blocking socket.

Used for the floor and for the peers' way, so it does nothing that is not needed, and nothing later
than it could be done. The sockets are bound before the clock starts. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The command line names these descriptors; they are put in place just before the spawn.
MONITOR_FD, AGENT_FD, STATE_FD = 200, 201, 202
_PATIENCE = 120.0  # seconds until an answer that does not come is an error
Command = tuple[str, dict[str, Any]]


class MonitorError(RuntimeError):
    """QEMU refused a command, or went away."""


class Monitor:
    """QMP over a connected socket. Commands may be sent ahead; answers come in their order."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over ``connection``; the greeting is still to come."""
        connection.settimeout(_PATIENCE)
        self._socket = connection
        self._pending = b""
        self.events: list[dict[str, Any]] = []

    def send(self, name: str, descriptor: int | None = None, **arguments: Any) -> None:
        """Send a command, with a file descriptor beside it if given."""
        message = json.dumps({"execute": name, "arguments": arguments}).encode()
        if descriptor is None:
            self._socket.sendall(message)
        else:
            socket.send_fds(self._socket, [message], [descriptor])

    def receive(self) -> dict[str, Any]:
        """The next answer, or the greeting; events met on the way are kept. Raises MonitorError."""
        while True:
            message = self._message()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise MonitorError(message["error"]["desc"])
            else:
                return message

    def run(self, name: str, **arguments: Any) -> Any:
        """Send a command and wait for what it returns. Raises MonitorError."""
        self.send(name, **arguments)
        return self.receive()["return"]

    def await_migration(self) -> None:
        """Return when the migration under way has completed. Raises MonitorError if it failed."""
        while True:
            while not self.events:
                message = self._message()
                if "event" in message:
                    self.events.append(message)
            event = self.events.pop(0)
            if event["event"] == "MIGRATION":
                status = event["data"]["status"]
                if status == "completed":
                    return
                if status == "failed":
                    raise MonitorError("the migration failed")

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._pending:
            chunk = self._socket.recv(65536)
            if not chunk:
                raise MonitorError("QEMU is gone")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Hang up; QEMU runs on."""
        self._socket.close()


class HandStarted:
    """A QEMU process that this program started, its monitor, and when what was done (ms)."""

    def __init__(self, command: Sequence[str], directory: Path, state: Path | None = None) -> None:
        """Bind sockets in ``directory``, start the clock, spawn, and connect to the monitor.

        ``state`` is the stream that the command line loads, if it does. Raises OSError.
        """
        self.times: dict[str, float] = {}
        self._log = directory / "vmm.log"
        with contextlib.ExitStack() as stack:
            for number, name in ((MONITOR_FD, "m"), (AGENT_FD, "a")):
                _listen(directory / name, number, stack)
            inherited = [MONITOR_FD, AGENT_FD]
            if state is not None:
                opened = stack.enter_context(state.open("rb"))
                _inherit(opened.fileno(), STATE_FD, stack)
                inherited.append(STATE_FD)
            log = stack.enter_context(self._log.open("ab"))
            self._began = time.perf_counter()
            # A session of its own: a Ctrl-C is for us, and we end it in order.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=inherited, start_new_session=True,
            )  # fmt: skip
            self._mark("spawn")
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(directory / "m"))
        self.monitor = Monitor(connection)

    def _mark(self, what: str) -> None:
        self.times[what] = (time.perf_counter() - self._began) * 1000

    def greet(self) -> None:
        """Get the monitor ready for commands."""
        self.monitor.send("qmp_capabilities")
        self.monitor.receive()
        self._mark("greeting")
        self.monitor.receive()

    def load(self) -> None:
        """Return when QEMU has loaded the state it was started with. Raises MonitorError.

        It loads by itself, before it looks at its monitor, so the first answer mostly says so.
        """
        try:
            self.monitor.send("qmp_capabilities")
            self.monitor.send("query-migrate")
            self.monitor.receive()
            self._mark("greeting")
            self.monitor.receive()
            answer = self.monitor.receive()["return"]
            while answer.get("status") != "completed":
                if answer.get("status") == "failed":
                    raise MonitorError("the state could not be loaded")
                answer = self.monitor.run("query-migrate")
        except MonitorError as error:
            words = self._log.read_text(errors="replace").strip().splitlines()[-3:]
            raise MonitorError(f"{error} ({' / '.join(words)})") from error
        self._mark("loaded")

    def go(self) -> float:
        """Let the guest run; milliseconds from the spawn to QEMU's answer."""
        self.monitor.run("cont")
        self._mark("running")
        return self.times["running"]

    def kill(self) -> None:
        """End QEMU and wait for its death. Idempotent."""
        self.monitor.close()
        self.process.kill()
        self.process.wait()


def _listen(path: Path, number: int, stack: contextlib.ExitStack) -> None:
    """A listening Unix socket at ``path`` as descriptor ``number``, for a child to inherit."""
    path.unlink(missing_ok=True)
    listening = stack.enter_context(socket.socket(socket.AF_UNIX))
    listening.bind(str(path))
    listening.listen(1)
    _inherit(listening.fileno(), number, stack)


def _inherit(descriptor: int, number: int, stack: contextlib.ExitStack) -> None:
    """The same open file as descriptor ``number``, as long as the stack."""
    os.dup2(descriptor, number, inheritable=True)
    stack.callback(os.close, number)
