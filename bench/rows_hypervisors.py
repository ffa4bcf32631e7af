"""The rows about other hypervisors: forks and pauses on each beside those on QEMU's q35.

A hypervisor that this host does not have has a row too, which says why there is no figure.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from bench.lab import SMALL, ForkTimes, Guest, Lab, alternate
from bench.results import Row, figure, median_phases
from bench.rows_forks import quiet
from bench.rows_pause import Pauses, snapshot_ticking

KEYS = ("microvm", "firecracker", "cloud-hypervisor")


def measure(lab: Lab, wanted: set[str]) -> list[Row]:
    """The rows of ``wanted``."""
    return [_row(lab, key) for key in KEYS if key in wanted]


def _row(lab: Lab, key: str) -> Row:
    hypervisor = "qemu-microvm" if key == "microvm" else key
    row = Row(
        key, f"fork over HTTP to running, {hypervisor} / qemu (256 MiB)", "shown",
    )  # fmt: skip
    row.not_run = lab.missing(hypervisor)
    if row.not_run is None:
        _beside_qemu(lab, row, replace(SMALL, hypervisor=hypervisor))
    return row


def _beside_qemu(lab: Lab, row: Row, other: Guest) -> None:
    forks: dict[Guest, list[ForkTimes]] = {SMALL: [], other: []}
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

    alternate(lab.runs, [lambda: step(SMALL), lambda: step(other)], lab.say)
    running = {guest: [times.running_ms for times in found] for guest, found in forks.items()}
    row.value = statistics.median(running[other]) / statistics.median(running[SMALL])
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
