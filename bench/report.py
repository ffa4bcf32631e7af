"""The report: results.json, and the tables of results.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.results import Row, number

ROOT = Path(__file__).resolve().parents[1]

_METHOD = """\
**Floor**: the same QEMU command line on the same memory image and device state, started by a script
without a control plane; from the spawn to QEMU's answer to `cont`. Files are linked and cloned
before its clock starts.

**Peers' way**: the same VM with plain memory; `stop`, `migrate` of all memory to a file without a
limit on its speed, a sparse copy of the VM's directory, `cont`; for a fork, a new process with
`-incoming` from that file. No control plane, no fsync.

**Running** is from just before the HTTP request to the moment of `cont` that the server tells;
**usable** is when an exec in the guest has answered.

**Pause**: the guest sends a datagram every millisecond, the host answers with its clock, which goes
on while the guest stands. The pause is the largest gap around the snapshot; the noise is the
largest in an equal window without one, subtracted only where the measure says "over its noise".

**Memory**: slope of the host's available memory over idle forks, less what the same VMM holds that
is run by hand from the same state and idles too, its guest's pages not counted: program, heap,
devices, and under emulation the code that it made of the guest's.

**Stored**: what the file system has less free after the second snapshot than before it.
"""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the figures depend on."""

    runs: int
    quick: bool
    has_resumed_at: bool
    qemu: str
    accelerator: str
    file_system: str
    seconds: float
    load_before: float

    def as_json(self) -> dict[str, Any]:
        """For results.json, with what this machine is."""
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **circumstances(),
            "runs": self.runs,
            "quick": self.quick,
            "running_stops_at": "resumed_at" if self.has_resumed_at else "the HTTP answer",
            "qemu": self.qemu,
            "accelerator": self.accelerator,
            "file_system": self.file_system,
            "cores": os.cpu_count(),
            "load_before": self.load_before,
            "seconds": round(self.seconds),
        }


def write(rows: Sequence[Row], facts: dict[str, Any], out: Path, plots: Sequence[str]) -> str:
    """Write results.json and results.md into ``out``; the text of the latter."""
    out.mkdir(parents=True, exist_ok=True)
    document = {"circumstances": facts, "rows": [row.as_json() for row in rows]}
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    text = markdown(rows, facts, plots)
    (out / "results.md").write_text(text)
    return text


def markdown(rows: Sequence[Row], facts: dict[str, Any], plots: Sequence[str]) -> str:
    """The whole of results.md."""
    parts = [
        "# What Stillframe costs",
        _circumstances_text(facts),
        table(rows),
        "## The figures behind it",
        _details(rows),
        "## Where the milliseconds go",
        phase_table(rows),
    ]
    parts += ["## How it is measured", _METHOD]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def table(rows: Sequence[Row]) -> str:
    """One line for each row: measure, value, target, verdict."""
    lines = ["| measure | value | target | verdict |", "|---|---|---|---|"]
    lines += [
        f"| {row.measure} | {row.shown_value}{_conditions(row)} | {row.target} | {row.verdict} |"
        for row in rows
    ]
    return "\n".join(lines)


def _conditions(row: Row) -> str:
    return "".join(f"; {what} {number(value)}" for what, value, _ in row.conditions)


def _details(rows: Sequence[Row]) -> str:
    """Medians and percentiles of each row, and its phases when its target was not reached."""
    blocks = []
    for row in rows:
        lines = [f"- {detail}" for detail in row.details]
        if row.reached is False:
            lines += [
                f"- where it goes, {what}: {phases_text(row.phases[what])}" for what in row.phases
            ]
        if lines:
            blocks.append("\n".join([f"**{row.measure}**: {row.verdict}", "", *lines]))
    return "\n\n".join(blocks)


def phases_text(phases: dict[str, float]) -> str:
    """Phases in one line, the largest first."""
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {number(value)}" for name, value in ordered) + " ms"


def phase_table(rows: Sequence[Row]) -> str:
    """Median phases in ms of everything that was run, each once."""
    phases = {what: times for row in rows for what, times in row.phases.items() if times}
    lines = ["| what | phases, medians in ms, in the order they begin |", "|---|---|"]
    for what, times in phases.items():
        text = ", ".join(f"{name} {number(value)}" for name, value in times.items())
        lines.append(f"| {what} | {text} |")
    return "\n".join(lines) if phases else ""


def _circumstances_text(facts: dict[str, Any]) -> str:
    mode = ", a quick run to try it out" if facts["quick"] else ""
    lines = [
        f"{facts['runs']} runs of each{mode}, taking turns; medians, p90 beside them. "
        f"{facts['date']}, commit {facts['commit']}, {facts['seconds'] // 60} minutes.",
        f"{facts['cores']} cores ({facts['processor']}), Linux {facts['kernel']}, "
        f"QEMU {facts['qemu']} with {facts['accelerator']}, data on {facts['file_system']}, load "
        f"before {facts['load_before']:.2f}.",
    ]
    return "\n".join(lines)


def circumstances(data: Path | None = None) -> dict[str, str]:
    """Commit, kernel, processor and Python; with ``data`` the file system that holds it."""
    return {
        "commit": _commit(),
        "kernel": platform.release(),
        "processor": _processor(),
        "python": platform.python_version(),
        **({} if data is None else {"file_system": file_system_of(data)}),
    }


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    dirty = "-dirty" if changed_files() else ""
    return f"{done.stdout.strip()}{dirty}" if done.stdout else "unknown"


def changed_files() -> list[str]:
    """Tracked files that differ from the last commit, but for results written by measurements."""
    done = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ".",
         ":!bench/results.*", ":!bench/plots", ":!docs/crash.md"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [line[3:] for line in done.stdout.splitlines()]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system_of(path: Path) -> str:
    """The type of the file system that holds ``path`` (proc(5), mounts)."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, found = line.split()[:3]
        inside = str(path.resolve()).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind
