"""The benchmark as a client of the server: one kept-alive connection, and when what happened.

The standard library's client, because it costs the least of those at hand: what is measured is the
server. Moments are CLOCK_REALTIME in seconds, which client and server share on one machine.
"""

from __future__ import annotations

import http.client
import json
import select
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from websockets.sync.client import connect

from stillframe.cli.commands.tokens import mint_token, read_secret

_SECONDS = 600.0
_ABSENT = (404, 405, 501)


class ApiError(RuntimeError):
    """The server answered with an error."""

    def __init__(self, method: str, path: str, status: int, body: Any) -> None:
        super().__init__(f"{method} {path}: {status} {body}")
        self.status = status


class NotThere(RuntimeError):
    """The server lacks what a row needs; the message says what it answered."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A decoded answer, and the moments just before the request and just after the answer."""

    body: Any
    sent: float
    answered: float

    @property
    def answer_ms(self) -> float:
        """Milliseconds from the request to the answer."""
        return (self.answered - self.sent) * 1000

    @property
    def running_ms(self) -> float:
        """Milliseconds from the request to the guest's first step, see ``resumed_at``."""
        return running_ms(self.body, self.sent, self.answered)

    def since_sent_ms(self, moment: float) -> float:
        """Milliseconds from the request to ``moment``."""
        return (moment - self.sent) * 1000


def running_ms(instance: dict[str, Any], sent: float, answered: float) -> float:
    """Milliseconds from ``sent`` to the instance's own time of ``cont``, else to the answer.

    A moment outside of the request (the clock was set meanwhile) is not believed.
    """
    resumed = instance.get("resumed_at")
    if resumed is not None:
        moment = datetime.fromisoformat(resumed).timestamp()
        if sent <= moment <= answered:
            return (moment - sent) * 1000
        raise ValueError(f"resumed_at {resumed} lies outside of the request")
    return (answered - sent) * 1000


class Client:
    """Requests to one server, in one thread."""

    def __init__(self, url: str, data_dir: Path) -> None:
        """Talk to ``url`` with a token made from the secret in the server's data directory."""
        address = urlsplit(url)
        token = mint_token(read_secret(data_dir), subject="benchmark", lifetime=timedelta(hours=12))
        self._url, self._data_dir = url, data_dir
        self.address = address.netloc
        self._headers = {"Authorization": f"Bearer {token}"}
        self._http = http.client.HTTPConnection(address.netloc, timeout=_SECONDS)

    def another(self) -> Client:
        """A client of the same server with a connection of its own."""
        return Client(self._url, self._data_dir)

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def request(
        self, method: str, path: str, body: Any = None, *, content: bytes | None = None
    ) -> Reply:
        """Send ``body`` as JSON, or ``content`` as it is. Raises ApiError."""
        headers = dict(self._headers)
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self._be_connected()
        sent = time.time()
        self._http.request(method, path, content, headers)
        response = self._http.getresponse()
        answer = response.read()
        answered = time.time()
        decoded = json.loads(answer) if answer else None
        if response.status >= 400:
            raise ApiError(method, path, response.status, decoded)
        return Reply(decoded, sent, answered)

    def _be_connected(self) -> None:
        """Connect unless connected: a server hangs up on a connection that is idle for long."""
        sock = self._http.sock
        if sock is not None and select.select([sock], [], [], 0)[0]:
            self._http.close()
        if self._http.sock is None:
            self._http.connect()

    def request_new(self, method: str, path: str, body: Any = None) -> Reply:
        """A request to a route that a server may lack. Raises NotThere, ApiError."""
        try:
            return self.request(method, path, body)
        except ApiError as error:
            if error.status in _ABSENT:
                shape = "/".join("{id}" if len(p) >= 20 else p for p in path.split("/"))
                raise NotThere(f"the server answers {error.status} to {method} {shape}") from error
            raise

    def run(self, instance: str, *command: str) -> tuple[int, str, float]:
        """Run a command in the guest, as the SDK does; exit code, output, moment of its end."""
        with connect(
            f"ws://{self.address}/instances/{quote(instance)}/exec",
            additional_headers=self._headers, compression=None, proxy=None, open_timeout=60,
        ) as socket:  # fmt: skip
            socket.send(json.dumps({"command": command, "tty": False, "wait_for_agent": 60}))
            output = bytearray()
            while isinstance(frame := socket.recv(timeout=_SECONDS), bytes):
                output += frame
            ended = time.time()
        code = json.loads(frame).get("exitCode")
        if code is None:
            raise RuntimeError(f"{command} in {instance}: {frame}")
        return int(code), output.decode(errors="replace").strip(), ended

    def must_run(self, instance: str, *command: str) -> str:
        """Run a command that must succeed; its output. Raises RuntimeError."""
        code, output, _ = self.run(instance, *command)
        if code != 0:
            raise RuntimeError(f"{command} in {instance}: exit {code}: {output}")
        return output

    def delete(self, instance: str) -> None:
        """Remove an instance at once."""
        self.request("DELETE", f"/instances/{quote(instance)}?graceful_shutdown=false")

    def delete_snapshot(self, snapshot: str) -> None:
        """Remove a snapshot."""
        self.request("DELETE", f"/snapshots/{snapshot}")
