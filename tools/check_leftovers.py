"""Fail if anything that ran with a given temporary directory is still there.

    check_leftovers.py DIRECTORY

Looks for processes that name the directory (command line, environment or working directory),
mounts and bound Unix sockets below it, and temporary directories called ``stillframe-*`` in it.
Prints nothing when there are none.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Processes that were sent a signal may need a moment to be gone.
_GRACE_SECONDS = 3.0


def main() -> int:
    """Print what is left, one line each; 1 if there is anything."""
    directory = str(Path(sys.argv[1]).resolve())
    deadline = time.monotonic() + _GRACE_SECONDS
    while (left := list(leftovers(directory))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for line in left:
        print(f"left behind: {line}", file=sys.stderr)
    return 1 if left else 0


def leftovers(directory: str) -> Iterator[str]:
    """What still exists of a run that used ``directory`` for its temporary files."""
    yield from _processes(directory)
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        if line.split()[4].startswith(directory):
            yield f"mount {line.split()[4]}"
    for line in Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7].startswith(directory):
            yield f"socket {fields[7]}"
    for path in sorted(Path(directory).glob("stillframe-*")):
        yield f"temporary directory {path}"


def _processes(directory: str) -> Iterator[str]:
    own, wanted = {os.getpid(), os.getppid()}, directory.encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) in own:
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            named = wanted in command or wanted in (entry / "environ").read_bytes()
            if named or str((entry / "cwd").readlink()).startswith(directory):
                text = command.replace(b"\0", b" ").decode("utf-8", "replace")
                yield f"process {entry.name}: {text[:160]}"
        except OSError:
            continue  # It ended while we looked, or belongs to another user.


if __name__ == "__main__":
    sys.exit(main())
