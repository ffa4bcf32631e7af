"""The floor: start the same QEMU, load the same state, say ``cont``; no control plane at all.

    python -m bench.floor < JSON      {"command": [...], "directory": "...", "state": "..."}

Prints ``{"running_ms": ..., "times_ms": {...}}``, from the spawn to QEMU's answer to ``cont``, and
ends QEMU when its standard input ends. A program of its own, so that nothing else runs in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.monitor import HandStarted

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class FloorRun:
    """Milliseconds from the spawn: to the running guest, and to each step on the way."""

    running_ms: float
    times_ms: dict[str, float]


def measure_floor(command: list[str], directory: Path, state: Path) -> FloorRun:
    """Run the floor once, in a process of its own, and end its QEMU. Raises RuntimeError."""
    wish = {"command": command, "directory": str(directory), "state": str(state)}
    with subprocess.Popen(
        [sys.executable, "-m", "bench.floor"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(wish).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        process.stdin.close()
        process.wait()
    if not line:
        raise RuntimeError("the floor script failed; see its message above")
    answer = json.loads(line)
    return FloorRun(answer["running_ms"], answer["times_ms"])


def main() -> int:
    """Read the wish, measure, report, hold QEMU until the reader is done."""
    wish: dict[str, Any] = json.loads(sys.stdin.readline())
    machine = HandStarted(wish["command"], Path(wish["directory"]), Path(wish["state"]))
    try:
        machine.load()
        running = machine.go()
        print(json.dumps({"running_ms": running, "times_ms": machine.times}), flush=True)
        sys.stdin.read()
    finally:
        machine.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
