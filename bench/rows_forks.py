"""Rows about one fork at a time: beside the floor, by guest size, warm, beside the peers' way."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.client import NotThere
from bench.lab import LARGE, SMALL, USED, ForkTimes, Json, Lab, alternate
from bench.peer import PeerVm, remove
from bench.results import Row, Samples, figure, median_phases, number, ratio_row

KEYS = ("cold-fork", "fork-size", "warm-fork", "fork-peer")
# After cont: the guest runs already while the agent is told who it is. The sum is no phase.
_NOT_CORE = ("identify", "total")


@dataclass
class _Forks:
    """Samples of the alternating runs, by what was forked."""

    lab: Lab
    forks: dict[str, list[ForkTimes]] = field(default_factory=dict)
    samples: Samples = field(default_factory=dict)
    floor_times: list[dict[str, float]] = field(default_factory=list)
    warm_refused: str | None = None
    warm_bytes: float = 0  # that a warm fork holds while it waits, by the server's word

    def ours(self, label: str, snapshot: Json) -> Callable[[], None]:
        """A step: one fork over HTTP, its times kept under ``label``."""

        def step() -> None:
            quiet()
            self.forks.setdefault(label, []).append(self.lab.timed_fork(snapshot))

        return step

    def warm(self) -> Callable[[], None]:
        """A step: one fork of a snapshot kept warm; refilled before the next step begins."""
        snapshot = self.lab.snapshot_to_warm(USED)
        fork = self.ours("warm", snapshot)

        def step() -> None:
            if self.warm_refused is None:
                self.warm_bytes = self.lab.keep_warm(snapshot, 1).get("memory_bytes", 0)
                fork()
                self.lab.keep_warm(snapshot, 1)

        try:
            self.lab.keep_warm(snapshot, 1)
        except NotThere as error:
            self.warm_refused = str(error)
        return step

    def floor(self) -> None:
        """A step: the floor on the same snapshot as the cold fork."""
        quiet()
        run = self.lab.floor(USED, self.lab.snapshot_of(USED))
        self.samples.setdefault("floor", []).append(run.running_ms)
        self.floor_times.append(run.times_ms)

    def peer(self, vm: PeerVm) -> Callable[[], None]:
        """A step: snapshot and fork the peers' way; the source stands still meanwhile."""

        def step() -> None:
            quiet()
            vm.go()
            time.sleep(0.2)
            copy = self.lab.directory / self.lab.name("copy")
            try:
                taken = vm.snapshot(copy, resume=False)
                restore = vm.fork(taken)
            finally:
                remove(copy)
            for what, value in (
                ("peer fork", taken.copy_ms + restore),
                ("peer copy", taken.copy_ms),
                ("peer restore", restore),
                ("peer capture and fork", taken.pause_ms + restore),
            ):
                self.samples.setdefault(what, []).append(value)

        return step

    def running(self, label: str) -> list[float]:
        """Milliseconds to running of those forks."""
        return [times.running_ms for times in self.forks[label]]

    def usable(self, label: str) -> str:
        """When those forks were answered and usable, as text."""
        forks = self.forks[label]
        return (
            f"{label}: answered {figure([f.answer_ms for f in forks])}, "
            f"usable {figure([f.usable_ms for f in forks])}"
        )

    def phases(self, label: str) -> dict[str, float]:
        """Median phases of those forks."""
        return median_phases([times.timings_ms for times in self.forks[label]])


def quiet() -> None:
    """Let the host write out what earlier steps left, so that nobody pays for another."""
    os.sync()


def measure(lab: Lab, wanted: set[str]) -> list[Row]:
    """The wanted rows of ``KEYS``, all from one alternating series."""
    series = _Forks(lab)
    steps = [series.ours("cold", lab.snapshot_of(USED))]
    if "cold-fork" in wanted:
        lab.compare_command_lines(USED, lab.snapshot_of(USED))
        steps.append(series.floor)
    if "warm-fork" in wanted:
        steps.append(series.warm())
    if "fork-size" in wanted:
        steps.append(series.ours("small", lab.snapshot_of(SMALL)))
        steps.append(series.ours("large", lab.snapshot_of(LARGE)))
    if "fork-peer" in wanted:
        with lab.peer(USED) as (vm, _):
            alternate(lab.runs, [*steps, series.peer(vm)], lab.say)
    else:
        alternate(lab.runs, steps, lab.say)
    if series.warm_refused is None and "warm-fork" in wanted:
        lab.keep_warm(lab.snapshot_to_warm(USED), 0)
    makers = {
        "cold-fork": _cold_row, "fork-size": _size_row, "warm-fork": _warm_row,
        "fork-peer": _peer_row,
    }  # fmt: skip
    rows = [makers[key](series) for key in KEYS if key in wanted]
    for row in rows:
        row.details += [] if row.value is None else lab.clock_notes()
    return rows


def _cold_row(series: _Forks) -> Row:
    row = Row("cold-fork", "cold fork over HTTP to running / floor", "<= 1.2", limit=1.2)
    ratio_row(row, series.running("cold"), series.samples["floor"], ("cold", "floor"))
    row.details.append(series.usable("cold"))
    if series.lab.command_differences:
        row.details.append(
            "the floor's command line differs from the server's: "
            + " ".join(series.lab.command_differences)
        )
    row.phases = {
        "cold fork": series.phases("cold"),
        "floor, since its spawn": median_phases(series.floor_times),
    }
    return row


def _size_row(series: _Forks) -> Row:
    row = Row(
        "fork-size", "fork to running, 4 GiB guest / 256 MiB guest", "<= 1.1", limit=1.1,
    )  # fmt: skip
    ratio_row(row, series.running("large"), series.running("small"), ("4 GiB", "256 MiB"))
    row.samples["1 GiB, 200 MB used"] = series.running("cold")
    row.phases = {"4 GiB": series.phases("large"), "256 MiB": series.phases("small")}
    return row


def _warm_row(series: _Forks) -> Row:
    row = Row(
        "warm-fork", "warm fork over HTTP to running / cold fork", "<= 1/5, engine core <= 5 ms",
        limit=1 / 5,
    )  # fmt: skip
    if series.warm_refused is not None:
        row.not_run = series.warm_refused
        return row
    ratio_row(row, series.running("warm"), series.running("cold"), ("warm", "cold"))
    cores = [core_ms(times.timings_ms) for times in series.forks["warm"]]
    row.conditions.append(("engine core in ms", statistics.median(cores), 5.0))
    row.samples["engine core"] = cores
    row.details += [
        f"engine core (phases up to cont) {figure(cores)}",
        series.usable("warm"),
        f"a waiting one holds {number(series.warm_bytes / (1 << 20))} MiB, the server says",
    ]
    row.phases = {"warm fork": series.phases("warm")}
    return row


def core_ms(timings: dict[str, float]) -> float:
    """The engine's own time to the guest's first step: every phase before it, added up."""
    return sum(value for name, value in timings.items() if name not in _NOT_CORE)


def _peer_row(series: _Forks) -> Row:
    row = Row(
        "fork-peer", "fork / peers' way, 1 GiB guest with 200 MB used", "<= 1/10", limit=1 / 10
    )
    peers = series.samples["peer fork"]
    ratio_row(row, series.running("cold"), peers, ("cold", "peers' copy and restore"))
    row.details += [
        f"peers' copy {figure(series.samples['peer copy'])}, "
        f"restore {figure(series.samples['peer restore'])}",
        "peers, from a running source, capture included: "
        + figure(series.samples["peer capture and fork"]),
    ]
    if "warm" in series.forks:
        ratio = statistics.median(series.running("warm")) / statistics.median(peers)
        row.details.append(f"warm fork / peers' way {ratio:.3f}")
        row.samples["warm"] = series.running("warm")
    row.samples |= {
        name: values for name, values in series.samples.items() if name.startswith("peer")
    }
    row.phases = {"cold fork": series.phases("cold")}
    return row
