"""Rows about pauses, measured inside the guest by ticks: idle forks, cold boots, busy guests.

A pause is the guest's largest gap between two ticks around a snapshot, all of it; its largest gap
in an equally long window just before is its noise, and is shown beside. Only where the target is
over the noise is it subtracted, the medians of both: a gap does not grow by all of the noise, so
that flatters.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from bench.client import Reply
from bench.lab import SMALL, USED, Gaps, Guest, Lab, alternate
from bench.peer import PeerSnapshot, PeerVm, remove
from bench.results import Row, Samples, figure, median_phases, number
from bench.rows_forks import quiet

KEYS = ("idle-pause", "boot-pause", "busy-pause")
BUSY_MIB = (1024, 2048, 4096)
_BUSY_USED, _BUSY_RATE = 200, 50


@dataclass
class Pauses:
    """Gaps of one kind of guest, and what came with them."""

    gaps: list[Gaps] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    reported_ms: list[float] = field(default_factory=list)  # by whoever made the pause
    together_ms: list[float] = field(default_factory=list)  # running source to running fork
    rates: list[float] = field(default_factory=list)  # MB/s rewritten meanwhile

    @property
    def during(self) -> list[float]:
        """The largest gaps around the snapshots, ms."""
        return [gap.during.largest_ms for gap in self.gaps]

    @property
    def noise(self) -> list[float]:
        """The largest gaps without, ms."""
        return [gap.noise.largest_ms for gap in self.gaps]

    @property
    def pause_ms(self) -> float:
        """The median gap."""
        return statistics.median(self.during)

    @property
    def over_noise_ms(self) -> float:
        """The median gap over the median noise."""
        return self.pause_ms - statistics.median(self.noise)

    def took(self, taken: Reply) -> None:
        """Keep what the server tells of its snapshot."""
        self.timings.append(taken.body.get("timings_ms", {}))
        self.reported_ms.append(taken.body.get("pause_ms") or 0.0)

    def text(self) -> str:
        """Gap, noise and lost datagrams as text."""
        lost = sum(gap.during.lost + gap.noise.lost for gap in self.gaps)
        lost_text = f", {lost} datagrams lost" if lost else ""
        return f"gap {figure(self.during)}, noise {figure(self.noise)}{lost_text}"

    def samples(self, label: str) -> Samples:
        """All figures, by what they are of whom."""
        named = {
            "gap": self.during, "noise": self.noise, "reported": self.reported_ms,
            "with fork": self.together_ms, "rewritten MB/s": self.rates,
        }  # fmt: skip
        return {f"{label}: {what}": values for what, values in named.items() if values}


def measure(lab: Lab, wanted: set[str]) -> list[Row]:
    """The wanted rows of ``KEYS``, one series each."""
    makers = {"idle-pause": _idle_row, "boot-pause": _boot_row, "busy-pause": _busy_row}
    return [makers[key](lab) for key in KEYS if key in wanted]


def snapshot_ticking(lab: Lab, instance: str, token: int, pauses: Pauses, seconds: float) -> Reply:
    """Snapshot a ticking VM of the server, and keep what its guest missed."""
    quiet()
    taken: list[Reply] = []
    pauses.gaps.append(lab.gaps(token, lambda: taken.append(lab.snapshot(instance)), seconds))
    pauses.took(taken[0])
    return taken[0]


def _peer_snapshot(lab: Lab, vm: PeerVm, token: int, pauses: Pauses, seconds: float) -> None:
    """Snapshot a ticking VM the peers' way; it stands still before and after."""
    quiet()
    copy = lab.directory / lab.name("copy")
    taken: list[PeerSnapshot] = []
    vm.go()
    time.sleep(0.3)
    try:
        gaps = lab.gaps(token, lambda: taken.append(vm.snapshot(copy, resume=True)), seconds)
    finally:
        vm.stand()
        remove(copy)
    pauses.gaps.append(gaps)
    pauses.reported_ms.append(taken[0].migrate_ms)


# -- idle forks -----------------------------------------------------------------------------------
def _idle_row(lab: Lab) -> Row:
    row = Row(
        "idle-pause", "pause of a live snapshot of an idle fork, over its noise", "<= 20 ms",
        limit=20.0, unit="ms",
    )  # fmt: skip
    pauses, snapshot = Pauses(), lab.snapshot_of(SMALL)

    def step() -> None:
        # A new fork each time: later snapshots of one VM may be cheaper than its first.
        fork = lab.fork(snapshot).body["id"]
        taken = snapshot_ticking(lab, fork, lab.start_ticks(fork), pauses, 0.8)
        lab.client.delete_snapshot(taken.body["id"])
        lab.client.delete(fork)

    alternate(lab.runs, [step], lab.say)
    row.value = pauses.over_noise_ms
    row.details = [pauses.text(), f"the server says {figure(pauses.reported_ms)}"]
    row.samples = pauses.samples("fork")
    row.phases = {"snapshot of an idle fork": median_phases(pauses.timings)}
    return row


# -- cold boots, beside the peers' way ------------------------------------------------------------
def _boot_row(lab: Lab) -> Row:
    row = Row(
        "boot-pause", "pause of a cold-booted 1 GiB guest with 200 MB used / peers' way",
        "<= 1/20", limit=1 / 20,
    )  # fmt: skip
    ours, theirs = Pauses(), Pauses()
    with lab.peer(USED) as (vm, token):
        steps = [
            lambda: _boot_and_snapshot(lab, ours),
            lambda: _peer_snapshot(lab, vm, token, theirs, 1.0),
        ]
        alternate(lab.runs, steps, lab.say)
    row.value = ours.pause_ms / theirs.pause_ms
    row.details = [
        f"ours: {ours.text()}; the server says {figure(ours.reported_ms)}",
        f"peers: {theirs.text()}",
        f"peers' migrate alone {figure(theirs.reported_ms)}, ours over that "
        f"{ours.pause_ms / statistics.median(theirs.reported_ms):.3f}",
        f"running source to running fork, capture included: ours {figure(ours.together_ms)}",
    ]
    row.samples = ours.samples("ours") | theirs.samples("peers")
    row.phases = {"first snapshot after a cold boot": median_phases(ours.timings)}
    return row


def _boot_and_snapshot(lab: Lab, pauses: Pauses) -> None:
    """Snapshot a VM that was just booted and filled, and fork the snapshot."""
    instance = lab.boot(USED)["id"]
    taken = snapshot_ticking(lab, instance, lab.start_ticks(instance), pauses, 1.0)
    fork = lab.fork(taken.body)
    pauses.together_ms.append(taken.answer_ms + fork.running_ms)
    for done in (fork.body["id"], instance):
        lab.client.delete(done)
    if len(pauses.gaps) == 1:
        lab.verify_fork(taken.body)
    lab.client.delete_snapshot(taken.body["id"])


# -- busy guests ----------------------------------------------------------------------------------
def _busy_row(lab: Lab) -> Row:
    row = Row(
        "busy-pause", f"pause of a guest that rewrites {_BUSY_RATE} MB/s, worst of all sizes",
        "bounded, shown", unit="ms",
    )  # fmt: skip
    runs = 2 if lab.quick else max(5, lab.runs // 4)
    worst: list[float] = []
    for memory in (BUSY_MIB[0], BUSY_MIB[-1]) if lab.quick else BUSY_MIB:
        guest = Guest(memory, used_mib=_BUSY_USED, rate_mib=_BUSY_RATE)
        label = f"{memory // 1024} GiB"
        ours, theirs = _busy_ours(lab, guest, runs), _busy_peers(lab, guest, runs)
        worst.append(max(ours.during))
        row.details.append(
            f"{label}: {ours.text()}, worst {number(max(ours.during))} ms, first "
            f"{number(ours.during[0])} ms; the server says {figure(ours.reported_ms)}; rewritten "
            f"meanwhile {number(statistics.median(ours.rates))} MB/s; peers: {theirs.text()}"
        )
        row.samples |= ours.samples(f"ours {label}") | theirs.samples(f"peers {label}")
        row.phases[f"snapshot of a busy guest, {label}"] = median_phases(ours.timings)
    row.value = max(worst)
    return row


def _busy_ours(lab: Lab, guest: Guest, runs: int) -> Pauses:
    """Several snapshots of one busy VM; a fork of the last one compares all its pages.

    Nothing else runs meanwhile: a writer of this rate takes much of a core under emulation, so
    these VMs cannot take turns with the peers'.
    """
    lab.say(f"a guest with {guest.label}")
    pauses = Pauses()
    instance = lab.boot(guest)["id"]
    token = lab.start_ticks(instance)
    for run in range(runs):
        pages, milliseconds = _rewritten(lab, instance)
        taken = snapshot_ticking(lab, instance, token, pauses, 1.5)
        more_pages, later = _rewritten(lab, instance)
        pauses.rates.append((more_pages - pages) * 4096 / 1e6 / ((later - milliseconds) / 1000))
        if run + 1 == runs:
            lab.client.delete(instance)
            lab.verify_fork(taken.body)
        lab.client.delete_snapshot(taken.body["id"])
    return pauses


def _busy_peers(lab: Lab, guest: Guest, runs: int) -> Pauses:
    """The same, the peers' way."""
    pauses = Pauses()
    with lab.peer(guest) as (vm, token):
        for _ in range(runs):
            _peer_snapshot(lab, vm, token, pauses, 1.5)
    return pauses


def _rewritten(lab: Lab, instance: str) -> tuple[int, int]:
    """Pages rewritten since the fill, and the guest's milliseconds since."""
    answer = lab.client.must_run(instance, "dirty", "ask", "status").split()
    words = dict(word.split("=") for word in answer[1:])
    return int(words["written"]), int(words["ms"])
