"""Finding processes by what is on their command line."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Collection
from pathlib import Path

_DEATH = 10.0  # seconds


def processes_naming(path: Path) -> list[int]:
    """Pids of our own user's processes with an argument that contains ``path``/ (not ourselves)."""
    needle = os.fsencode(path) + b"/"
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if entry.stat().st_uid == os.geteuid() and needle in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def kill_orphans(path: Path, spare: Collection[int]) -> list[int]:
    """SIGKILL every VMM that works on files below ``path``, except those in ``spare``; their pids.

    Only leaders of their own session are touched: that is how VMMs are started, and editors or
    shells that happen to name the path are not. They are gone on return, unless the kernel holds
    one for more than ten seconds: until then its disk space and locks are taken.
    """
    killed: dict[int, int] = {}
    with contextlib.ExitStack() as held:
        for pid in processes_naming(path):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if pid not in spare and os.getsid(pid) == pid:
                    descriptor = os.pidfd_open(pid)
                    held.callback(os.close, descriptor)
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    killed[pid] = descriptor
        deadline = time.monotonic() + _DEATH
        for descriptor in killed.values():
            watch = select.poll()  # select(2) knows no descriptor above 1023
            watch.register(descriptor, select.POLLIN)
            left = max(0.0, deadline - time.monotonic())
            watch.poll(left * 1000)  # readable when it is dead, pidfd_open(2)
    return list(killed)
