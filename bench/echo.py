"""Gaps in the life of a guest, by a clock that goes on while it stands still.

The guest's end is bench/guest/ticks.c, which describes the idea. This end is a process of its own,
so that neither the server's nor the benchmark's work delays an answer: it answers datagrams with
CLOCK_MONOTONIC, and tells the guest which window is open. User-mode networking brings a datagram
that the guest sends to 10.0.2.2 to the host's loopback device.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GATEWAY = "10.0.2.2"
BUCKET_ENDS_MS = (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500)
_MAGIC = 0x4B434954
_QUESTION = struct.Struct("<4I3I12I4xQ")  # struct question of ticks.c
_ANSWER = struct.Struct("<4IQ")  # struct answer
_PATIENCE = 30.0


@dataclass(frozen=True, slots=True)
class Window:
    """What a guest counted in one window: ticks, lost datagrams, its largest gap, all gaps.

    ``histogram`` counts gaps below each of ``BUCKET_ENDS_MS``, the last one those above.
    """

    count: int
    lost: int
    largest_ms: float
    histogram: tuple[int, ...]


class Echo:
    """The answering process, and the windows the benchmark opens in it."""

    def __init__(self) -> None:
        """Start the process; ``close`` ends it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.echo"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        self._unread = b""
        self._last_window = 0
        self._port: int | None = None
        self._open: int | None = None
        self._seen: set[int] = set()
        self._figures: dict[tuple[int, int], Window] = {}  # by token and window

    @property
    def port(self) -> int:
        """Where it listens, on the host's loopback device."""
        self._until(lambda: self._port is not None, "the answering process does not start")
        assert self._port is not None
        return self._port

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def new_token(self) -> int:
        """A number by which a guest's datagrams are told from those of others."""
        return secrets.randbits(31)

    def await_guest(self, token: int) -> None:
        """Return when the guest of that token has ticked. Raises RuntimeError after 30 s."""
        self._until(lambda: token in self._seen, "no datagram came from the guest")

    @contextlib.contextmanager
    def window(self, token: int) -> Iterator[list[Window]]:
        """A window around the block; at its end the guest's figures are in the yielded list."""
        self._last_window += 1
        number, figures = self._last_window, list[Window]()
        self._change(number)
        try:
            yield figures
        finally:
            self._change(0)
        self._until(lambda: (token, number) in self._figures, "the guest sent no figures")
        figures.append(self._figures[token, number])

    def _change(self, window: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{window}\n".encode())
        self._process.stdin.flush()
        self._until(lambda: self._open == window, "the answering process does not answer")

    def _until(self, condition: Callable[[], bool], complaint: str) -> None:
        """Read news until ``condition`` holds. Raises RuntimeError after ``_PATIENCE``."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise RuntimeError(f"{complaint} ({_PATIENCE:.0f} s)")
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                raise RuntimeError("the answering process ended")
            *lines, self._unread = (self._unread + chunk).split(b"\n")
            for line in lines:
                self._take(json.loads(line))

    def _take(self, news: dict[str, Any]) -> None:
        match news["is"]:
            case "listening":
                self._port = news["port"]
            case "window":
                self._open = news["window"]
            case "guest":
                self._seen.add(news["token"])
            case "figures":
                count, lost, *histogram = news["counts"]
                self._figures[news["token"], news["window"]] = Window(
                    count, lost, news["largest_ns"] / 1e6, tuple(histogram)
                )


class _Answerer:
    """The loop of the answering process."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self._window = 0
        self._known: dict[tuple[int, Any], int] = {}  # guest -> last window it reported

    def serve(self) -> None:
        """Answer until standard input ends."""
        say({"is": "listening", "port": self.socket.getsockname()[1]})
        while True:
            ready, _, _ = select.select([self.socket, sys.stdin], [], [])
            if self.socket in ready:
                self._answer()
            if sys.stdin in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                self._window = int(line)
                say({"is": "window", "window": self._window})

    def _answer(self) -> None:
        data, address = self.socket.recvfrom(512)
        now = time.monotonic_ns()
        if len(data) != _QUESTION.size:
            return
        magic, token, sequence, has_figures, window, *counts, largest = _QUESTION.unpack(data)
        if magic != _MAGIC:
            return
        guest = (token, address)
        acknowledged = window if has_figures else 0
        self.socket.sendto(_ANSWER.pack(_MAGIC, sequence, self._window, acknowledged, now), address)
        if guest not in self._known:
            self._known[guest] = 0
            say({"is": "guest", "token": token})
        if has_figures and self._known[guest] != window:
            self._known[guest] = window
            say({"is": "figures", "token": token, "window": window, "counts": counts,
                 "largest_ns": largest})  # fmt: skip


def say(news: dict[str, Any]) -> None:
    """One line to whoever started us."""
    os.write(1, json.dumps(news).encode() + b"\n")


def main() -> int:
    """Serve, before other work of the host where we may."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    answerer = _Answerer()
    with answerer.socket:
        answerer.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
