"""What stands beside a VMM that has a network of its own: see ``stillframe/vmm/isolation``."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable
from pathlib import Path

from stillframe.model.errors import MissingComponent
from stillframe.vmm.isolation.command import find_uplink

DEADLINE = 60.0  # seconds


def hindrance() -> str | None:
    """Why no VMM can have a network of its own here; None if one can."""
    try:
        find_uplink()
    except MissingComponent as error:
        return error.message
    return None


def children(parent: int) -> list[int]:
    """The processes that a process has started, and that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, of = entry.read_text().rpartition(")")[2].split()[:2]
            if int(of) == parent and state not in "ZX":
                found.append(int(entry.parent.name))
    return found


def marked(mark: str) -> list[int]:
    """Other processes with that word in the environment they were started with."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
    return found


class Watch:
    """Processes by pidfd_open(2), which tells of their end: nobody asks again and again."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._ends = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self._ends.append(os.pidfd_open(pid))

    def wait_all(self) -> None:
        """Return when all have ended."""
        try:
            for end in self._ends:
                poll = select.poll()
                poll.register(end, select.POLLIN)
                assert poll.poll(DEADLINE * 1000), "a process is left"
        finally:
            for end in self._ends:
                os.close(end)
