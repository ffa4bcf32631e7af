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
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from crash.harness import Tally
from crash.injection import Fault
from crash.many import make_many
from crash.pool import Task, try_all
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
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random kills instead")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--many", action="store_true", help="only start and list with many records")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is cleaned up
    if wanted.random:
        return _random(wanted.random, wanted.seed)
    if not wanted.many and not _all_points(
        wanted.verb or names,
        [Fault[f] for f in wanted.fault or _DEFAULT_FAULTS],
        wanted.every,
        wanted.jobs,
    ):
        return 1
    _many()
    return 0


def _all_points(names: list[str], faults: list[Fault], every: int, processes: int) -> bool:
    began, tallies, slowest = time.monotonic(), dict[tuple[str, Fault], Tally](), 0.0
    # Fault by fault: kills take longest, and what comes last should be short.
    tasks = [Task(name, fault, every) for fault in faults for name in names]
    for done in try_all(tasks, processes, console.print):
        tally = done.tally
        tallies[tally.verb, tally.fault] = tally
        slowest = max(slowest, done.slowest_start)
        console.print(
            f"{len(tallies)}/{len(tasks)} {tally.verb}, {tally.fault}: {_cell(tally)} "
            f"({done.seconds:.0f} s)"
        )
    print(_table(names, faults, tallies))
    points = sum(tally.points for tally in tallies.values())
    failures = sum(len(tally.failures) for tally in tallies.values())
    console.print(f"slowest start after a kill: {slowest:.2f} s")
    console.print(
        f"{points} points, {failures} failures, {time.monotonic() - began:.0f} s "
        f"in {processes} processes"
    )
    return not failures


def _table(
    names: list[str], faults: list[Fault], tallies: Mapping[tuple[str, Fault], Tally]
) -> str:
    """Points tried at, by verb and fault, as a table that can go into a document."""
    rows = [["verb", *faults, "failures"], ["---"] * (len(faults) + 2)]
    for name in names:
        row = [tallies[name, fault] for fault in faults]
        failures = sum(len(tally.failures) for tally in row)
        rows.append([name, *(str(tally.points) for tally in row), str(failures)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
