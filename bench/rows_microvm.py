"""The row about QEMU's other machine: forks and pauses on microvm beside those on q35."""

from __future__ import annotations

import statistics
from dataclasses import replace

from bench.lab import SMALL, ForkTimes, Guest, Lab, alternate
from bench.results import Row, figure, median_phases
from bench.rows_forks import quiet
from bench.rows_pause import Pauses, snapshot_ticking

KEYS = ("microvm",)
MICROVM = replace(SMALL, hypervisor="qemu-microvm")


def measure(lab: Lab, _wanted: set[str]) -> list[Row]:
    """The row of ``KEYS``."""
    row = Row(
        "microvm", "fork over HTTP to running, qemu-microvm / qemu (256 MiB)", "shown",
    )  # fmt: skip
    forks: dict[Guest, list[ForkTimes]] = {SMALL: [], MICROVM: []}
    pauses = {guest: Pauses() for guest in forks}
    snapshots = {guest: lab.snapshot_of(guest) for guest in forks}

    def step(guest: Guest) -> None:
        quiet()
        forks[guest].append(lab.timed_fork(snapshots[guest]))
        # A new fork each time: later snapshots of one VM may be cheaper than its first.
        fork = lab.fork(snapshots[guest]).body["id"]
        taken = snapshot_ticking(lab, fork, lab.start_ticks(fork), pauses[guest], 0.8)
        lab.client.delete_snapshot(taken.body["id"])
        lab.client.delete(fork)

    alternate(lab.runs, [lambda: step(SMALL), lambda: step(MICROVM)], lab.say)
    running = {guest: [times.running_ms for times in found] for guest, found in forks.items()}
    row.value = statistics.median(running[MICROVM]) / statistics.median(running[SMALL])
    for guest, found in forks.items():
        usable = [times.usable_ms for times in found]
        row.details.append(
            f"{guest.hypervisor}: fork running {figure(running[guest])}, usable {figure(usable)}; "
            f"pause of an idle fork's snapshot: {pauses[guest].text()}"
        )
        row.samples |= {f"{guest.hypervisor}: running": running[guest]}
        row.samples |= pauses[guest].samples(guest.hypervisor)
        row.phases[f"fork, {guest.hypervisor}"] = median_phases([one.timings_ms for one in found])
        row.phases[f"snapshot, {guest.hypervisor}"] = median_phases(pauses[guest].timings)
    row.details += lab.clock_notes()
    return [row]
