"""The row about standby and restore, which has no target: it shows where the time goes."""

from __future__ import annotations

import statistics

from bench.lab import USED, Lab, alternate
from bench.results import Row, figure, median_phases
from bench.rows_forks import quiet

KEYS = ("restore",)


def measure(lab: Lab, _wanted: set[str]) -> list[Row]:
    """The row of ``KEYS``."""
    row = Row(
        "restore", "restore from standby over HTTP to running, 1 GiB guest with 200 MB used",
        "shown", unit="ms",
    )  # fmt: skip
    fork = lab.fork(lab.snapshot_of(USED)).body["id"]
    standby, restore = list[float](), list[float]()
    phases: dict[str, list[dict[str, float]]] = {"standby": [], "restore": []}

    def step() -> None:
        quiet()
        asleep = lab.client.request("POST", f"/instances/{fork}/standby", {})
        awake = lab.client.request("POST", f"/instances/{fork}/restore")
        lab.note_clock(awake.body)
        standby.append(asleep.answer_ms)
        restore.append(awake.running_ms)
        phases["standby"].append(asleep.body.get("timings_ms", {}))
        phases["restore"].append(awake.body.get("timings_ms", {}))

    alternate(lab.runs, [step], lab.say)
    lab.client.delete(fork)
    row.value = statistics.median(restore)
    row.details = [f"restore {figure(restore)}", f"standby, durable, answered {figure(standby)}"]
    row.details += lab.clock_notes()
    row.samples = {"restore": restore, "standby": standby}
    row.phases = {name: median_phases(runs) for name, runs in phases.items()}
    return [row]
