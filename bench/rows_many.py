"""The row about many forks at once: one call, as many concurrent calls, one after another."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bench.client import Client, NotThere, Reply, running_ms
from bench.lab import USED, Json, Lab, alternate
from bench.results import Row, Samples, figure, median_phases
from bench.rows_forks import quiet

KEYS = ("many-forks",)
COUNT = 16


@dataclass
class _Many:
    """Samples in ms: until the last of ``COUNT`` ran, by how they were asked for."""

    lab: Lab
    snapshot: Json
    samples: Samples = field(default_factory=dict)
    timings: list[dict[str, float]] = field(default_factory=list)

    def single(self, label: str) -> None:
        """One fork, then gone."""
        quiet()
        reply = self.lab.fork(self.snapshot)
        self._add(label, reply.running_ms)
        self.lab.client.delete(reply.body["id"])

    def together(self, label: str) -> None:
        """All in one call. Raises NotThere, RuntimeError when a fork failed."""
        quiet()
        reply = self.lab.client.request_new(
            "POST", f"/snapshots/{self.snapshot['id']}/forks",
            {"count": COUNT, "name_prefix": self.lab.name("many")},
        )  # fmt: skip
        forks = instances_of(reply)
        for fork in forks:
            self.lab.note_clock(fork)
        self._add(label, max(running_ms(f, reply.sent, reply.answered) for f in forks))
        self._add(f"{label}, answered", reply.answer_ms)
        self.timings += [fork.get("timings_ms", {}) for fork in forks]
        self._delete(forks)

    def concurrently(self, label: str) -> None:
        """As many calls at the same time, each on a connection of its own."""
        quiet()
        clients = [self.lab.client.another() for _ in range(COUNT)]
        try:
            for client in clients:
                client.request("GET", "/health")  # connected before the clock starts
            with ThreadPoolExecutor(COUNT) as pool:
                began = time.time()
                replies = list(pool.map(self._one, clients))
            last = max(reply.sent + reply.running_ms / 1000 for reply in replies)
            self._add(label, (last - began) * 1000)
        finally:
            for client in clients:
                client.close()
        self._delete([reply.body for reply in replies])

    def _one(self, client: Client) -> Reply:
        path = f"/snapshots/{self.snapshot['id']}/fork"
        return client.request("POST", path, {"name": self.lab.name("one")})

    def _add(self, label: str, value: float) -> None:
        self.samples.setdefault(label, []).append(value)

    def _delete(self, forks: list[Json]) -> None:
        for fork in forks:
            self.lab.client.delete(fork["id"])

    def ratio(self, many: str, one: str) -> float:
        """Many, over as many times one."""
        median = statistics.median
        return median(self.samples[many]) / (COUNT * median(self.samples[one]))


def instances_of(reply: Reply) -> list[Json]:
    """The forks of a call for many. Raises RuntimeError when some failed."""
    outcomes = reply.body["outcomes"]
    errors = [o["error"] for o in outcomes if o.get("error")]
    if errors or len(outcomes) != COUNT or reply.body["succeeded"] != COUNT:
        raise RuntimeError(f"{len(errors)} of {COUNT} forks failed: {errors[:1]}")
    return [outcome["instance"] for outcome in outcomes]


def measure(lab: Lab, _wanted: set[str]) -> list[Row]:
    """The row of ``KEYS``."""
    row = Row(
        "many-forks", f"{COUNT} forks in one call / {COUNT} x one fork, to running",
        "<= 0.7 cold; warm shown", limit=0.7,
    )  # fmt: skip
    many = _Many(lab, lab.snapshot_of(USED))
    steps = [lambda: many.single("one"), lambda: many.concurrently("concurrent calls")]
    try:
        many.together("one call")  # not counted: it shows whether the server can
        many.samples.clear()
        many.timings.clear()
        steps.append(lambda: many.together("one call"))
    except NotThere as error:
        row.not_run = str(error)
    alternate(lab.runs, steps, lab.say)
    if row.not_run is None:
        row.value = many.ratio("one call", "one")
        row.details.append(f"one call {figure(many.samples['one call'])}")
        row.phases = {f"each of {COUNT}": median_phases(many.timings)}
    row.details += [
        f"one fork {figure(many.samples['one'])}",
        f"{COUNT} concurrent calls {figure(many.samples['concurrent calls'])}, "
        f"ratio {many.ratio('concurrent calls', 'one'):.2f}",
    ]
    row.details += lab.clock_notes()
    row.samples = many.samples
    if row.not_run is None:
        _add_warm(lab, row, many)
    return [row]


def _add_warm(lab: Lab, row: Row, cold: _Many) -> None:
    snapshot = lab.snapshot_to_warm(USED)
    warm = _Many(lab, snapshot)
    try:
        for _ in range(lab.runs):
            lab.keep_warm(snapshot, COUNT)
            warm.together("one call, warm")
        lab.keep_warm(snapshot, 0)
    except NotThere as error:
        row.details.append(f"warm not run: {error}")
        return
    row.samples |= warm.samples
    ratio = statistics.median(warm.samples["one call, warm"]) / (
        COUNT * statistics.median(cold.samples["one"])
    )
    row.details.append(
        f"warm: one call {figure(warm.samples['one call, warm'])}, over {COUNT} x one cold fork "
        f"{ratio:.3f}"
    )
    row.phases[f"each of {COUNT}, warm"] = median_phases(warm.timings)
