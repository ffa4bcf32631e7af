"""Every verb under a fault at every call on the data directory, and what must hold afterwards.

    make crash                                  all verbs, all faults, every call
    make crash ARGS="--verb create --fault KILL --every 5"
    make crash ARGS="--random 200"              kill -9 at random moments of a mixed load

A server on the fake hypervisor runs each verb with a fault at call 1, 2, 3 … until the verb passes
(``tests/crash``). After each: it starts again, every snapshot verifies, nothing is left over,
guests have their memory and go on, the request can be repeated, and disk space is back. Prints the
points tried; exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.table import Table

from crash.harness import Bench, Tally, open_bench, try_verb
from crash.injection import Fault
from crash.many import make_many
from crash.random_kills import kill_at_random
from crash.verbs import VERBS
from crash.world import Violation, running_world

_DEFAULT_FAULTS = ("KILL", "NO_SPACE", "FULL", "EIO_WRITE", "EIO_FSYNC", "EIO_FSYNC_KILL")
console = Console(soft_wrap=True, highlight=False)


def main() -> int:
    """Run what the arguments ask for; 1 if anything failed."""
    names = [verb.name for verb in VERBS]
    parser = argparse.ArgumentParser(description="Faults at every call of every verb.")
    parser.add_argument("--verb", action="append", choices=names, metavar="NAME")
    parser.add_argument("--fault", action="append", choices=[f.name for f in Fault])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth call")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random kills instead")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--many", action="store_true", help="only start and list with many records")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is cleaned up
    if wanted.random:
        return _random(wanted.random, wanted.seed)
    if not wanted.many and not _all_points(
        wanted.verb or names, [Fault[f] for f in wanted.fault or _DEFAULT_FAULTS], wanted.every
    ):
        return 1
    _many()
    return 0


def _all_points(names: list[str], faults: list[Fault], every: int) -> bool:
    table = Table("verb", *faults, title="points tried", title_justify="left")
    failures: list[str] = []
    points = 0
    with open_bench() as bench:
        for verb in (verb for verb in VERBS if verb.name in names):
            began, cells = time.monotonic(), []
            for fault in faults:
                tally = try_verb(bench, verb, fault, points=count(1, every), report=console.print)
                cells.append(_cell(tally))
                failures += tally.failures
                points += tally.points
            console.print(f"{verb.name}: {', '.join(cells)} ({time.monotonic() - began:.0f} s)")
            table.add_row(verb.name, *cells)
        slowest = _slowest(bench)
    console.print(table)
    console.print(f"slowest start after a kill: {slowest:.2f} s")
    console.print(f"{points} points, {len(failures)} failures")
    return not failures


def _slowest(bench: Bench) -> float:
    bench.spoiled()
    return bench.slowest_start


def _cell(tally: Tally) -> str:
    failed = f", {len(tally.failures)} FAILED" if tally.failures else ""
    return f"{tally.points}{failed}"


def _random(rounds: int, seed: int) -> int:
    console.print(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="sfc-") as directory:
        try:
            with running_world(Path(directory)) as world:
                promised = kill_at_random(world, rounds, seed, console.print)
        except Violation as violation:
            console.print(f"FAILED: {violation}")
            return 1
    console.print(
        f"{rounds} random kills: {promised} snapshots promised, 0 lost, 0 broken; "
        f"slowest start {world.slowest_start:.2f} s"
    )
    return 0


def _many() -> None:
    for how_many in (0, 1000, 10_000):
        with tempfile.TemporaryDirectory(prefix="sfc-") as directory:
            if how_many:
                make_many(Path(directory) / "data", how_many)
            with running_world(Path(directory)) as world:
                took = 0.0
                for _ in range(2):  # the first request of a server loads more of the program
                    began = time.perf_counter()
                    found = world.must("GET", "/snapshots?tags[number]=7")
                    took = (time.perf_counter() - began) * 1000
        console.print(
            f"{how_many} snapshots: start {world.slowest_start:.2f} s, "
            f"list with a filter {took:.0f} ms ({len(found)} found)"
        )


if __name__ == "__main__":
    sys.exit(main())
