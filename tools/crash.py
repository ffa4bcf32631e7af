"""Every verb under a fault at every call on the data directory, and what must hold afterwards.

    make crash                                  all verbs, all faults, every call
    make crash ARGS="--verb create --fault KILL --every 5"
    make crash ARGS="--random 200"              kill -9 at random moments of a mixed load

A server on the fake hypervisor runs each verb with a fault at call 1, 2, 3 … until the verb passes
(``tests/crash``). After each: it starts again, every snapshot verifies, nothing is left over,
guests have their memory and go on, the request can be repeated, and disk space is back. Prints the
points tried; exit code 1 if anything failed, or starts take longer than is promised: the median
of them, with ``--strict`` every one, for on a machine that does other things one may be late.
What is run in full is written into ``docs/crash.md``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console

from crash.harness import Tally
from crash.injection import Fault
from crash.many import make_many
from crash.pool import Task, try_all
from crash.random_kills import kill_at_random
from crash.verbs import VERBS
from crash.world import Violation, World, running_world
from tools.crash_report import MANY, POINTS, RANDOM, REPORT, write_section

_DEFAULT_FAULTS = ("KILL", "NO_SPACE", "FULL", "EIO_WRITE", "EIO_FSYNC", "EIO_FSYNC_KILL")
_START_SECONDS, _LIST_MILLISECONDS = 5, 100  # what is promised
_STARTS, _LISTS = 5, 11
_FULL = 200  # kills at random
console = Console(soft_wrap=True, highlight=False, markup=False)


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
    parser.add_argument("--strict", action="store_true", help="judge the slowest start as well")
    parser.add_argument("--report", type=Path, help="write the results here, also of a part")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is cleaned up
    judge = Judge(strict=wanted.strict)
    if wanted.random:
        run = _random(wanted.random, wanted.seed, judge)
        return _end(RANDOM, run, wanted.report or (REPORT if wanted.random >= _FULL else None))
    whole = not (wanted.verb or wanted.fault or wanted.every > 1)
    report = wanted.report or (REPORT if whole else None)
    failed = 0
    if not wanted.many:
        faults = [Fault[f] for f in wanted.fault or _DEFAULT_FAULTS]
        run = _all_points(wanted.verb or names, faults, wanted.every, wanted.jobs, judge)
        failed = _end(POINTS, run, report)
    if whole:
        failed |= _end(MANY, _many(judge), report)
    return failed


@dataclass(slots=True)
class Run:
    """What a run came to, as lines for a document; the failures are among them."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Print a line, and keep it."""
        console.print(line)
        self.lines.append(line)

    def fail(self, line: str) -> None:
        """The same of a failure."""
        self.failures.append(line)
        self.say(f"FAILED: {line}")


@dataclass(frozen=True, slots=True)
class Judge:
    """Holds what was measured against what is promised."""

    strict: bool = False

    def starts(self, run: Run, what: str, seconds: list[float]) -> None:
        """Tell how long starts took, and judge it."""
        if not seconds:
            return
        middle, slowest = median(seconds), max(seconds)
        run.say(
            f"{what}: median {middle:.2f} s, slowest {slowest:.2f} s of {len(seconds)}; "
            f"{_START_SECONDS} s are promised"
        )
        if (slowest if self.strict else middle) > _START_SECONDS:
            run.fail(f"{what} take too long")


def _end(title: str, run: Run, report: Path | None) -> int:
    if report is not None:
        write_section(title, run.lines, data=Path(tempfile.gettempdir()), path=report)
        console.print(f"written: {report}")
    return 1 if run.failures else 0


def _all_points(
    names: list[str], faults: list[Fault], every: int, processes: int, judge: Judge
) -> Run:
    began, tallies, starts = time.monotonic(), dict[tuple[str, Fault], Tally](), list[float]()
    # Fault by fault: kills take longest, and what comes last should be short.
    tasks = [Task(name, fault, every) for fault in faults for name in names]
    for done in try_all(tasks, processes, console.print):
        tally = done.tally
        tallies[tally.verb, tally.fault] = tally
        starts += done.starts
        console.print(
            f"{len(tallies)}/{len(tasks)} {tally.verb}, {tally.fault}: {_cell(tally)} "
            f"({done.seconds:.0f} s)"
        )
    run = Run()
    for line in _table(names, faults, tallies).splitlines():
        run.say(line)
    run.say("")
    points = sum(tally.points for tally in tallies.values())
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    run.say(
        f"{points} points, {len(failures)} failures, {time.monotonic() - began:.0f} s "
        f"in {processes} processes."
    )
    run.say("")
    for failure in failures:
        run.fail(failure)
    judge.starts(run, "Starts after a kill", starts)
    return run


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


def _random(rounds: int, seed: int, judge: Judge) -> Run:
    run, outcome = Run(), None
    with (
        tempfile.TemporaryDirectory(prefix="sfc-") as directory,
        running_world(Path(directory)) as world,
    ):
        try:
            outcome = kill_at_random(world, rounds, seed, console.print)
        except Violation as violation:
            run.fail(f"seed {seed}: {violation}")
    if outcome is not None:
        run.say(
            f"{rounds} kills, seed {seed}: {outcome.promised} snapshots promised, 0 lost, 0 broken."
        )
        steps = (f"{name} {times}" for name, times in sorted(outcome.steps.items()))
        run.say(f"Done to the end between kills: {', '.join(steps)}.")
    run.say("")
    judge.starts(run, "Starts after a kill", world.starts[1:])
    return run


def _many(judge: Judge) -> Run:
    run = Run()
    for how_many in (0, 1000, 10_000):
        with tempfile.TemporaryDirectory(prefix="sfc-") as directory:
            if how_many:
                make_many(Path(directory) / "data", how_many)
            with running_world(Path(directory)) as world:
                for _ in range(_STARTS):
                    world.restart()
                judge.starts(run, f"Starts with {how_many} snapshots", world.starts[1:])
                for tag in ("number]=7", "even]=True"):
                    _list_filtered(run, world, f"/snapshots?tags[{tag}")
        run.say("")
    return run


def _list_filtered(run: Run, world: World, path: str) -> None:
    found, times = len(world.must("GET", path)), []
    for _ in range(_LISTS):
        began = time.perf_counter()
        status, _body = world.transfer("GET", path, None)  # what a client makes of it is its own
        times.append((time.perf_counter() - began) * 1000)
        if status != 200:
            run.fail(f"{path} answered {status}")
    what = f"{path} ({found} found)"
    run.say(
        f"`{what}`: median {median(times):.0f} ms, slowest {max(times):.0f} ms of {len(times)}; "
        f"{_LIST_MILLISECONDS} ms are promised"
    )
    if median(times) > _LIST_MILLISECONDS:
        run.fail(f"{what} takes too long")


if __name__ == "__main__":
    sys.exit(main())
