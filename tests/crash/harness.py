"""One verb under one fault at call 1, 2, 3 … until it passes; the oracle after each."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from crash.injection import Fault
from crash.stage import Stage, Verb
from crash.world import SLACK, Violation, World

_MAX_POINTS = 5000
_KILLING = (Fault.KILL, Fault.EIO_FSYNC_KILL)


@dataclass(frozen=True, slots=True)
class Point:
    """One fault at one call of one verb."""

    verb: Verb
    fault: Fault
    number: int
    only: str


@dataclass(slots=True)
class Tally:
    """What was tried of one verb under one fault: how many calls it struck at, what failed."""

    verb: str
    fault: Fault
    points: int = 0
    failures: list[str] = field(default_factory=list)


class Bench:
    """A stage that is built anew when a failure has spoiled it."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._stage: Stage | None = None
        self._numbers = count(1)
        self._starts: list[float] = []

    def stage(self) -> Stage:
        """The stage, in order."""
        if self._stage is None:
            # The path is short: Unix socket addresses end at 108 bytes.
            directory = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="sfc-")))
            world = World(directory)
            self._held.callback(world.close)
            world.start()
            self._stage = Stage(world)
            self._stage.build()
        return self._stage

    def spoiled(self) -> None:
        """Throw the stage away."""
        self._starts = self.starts
        self._stage = None
        self._held.close()

    @property
    def starts(self) -> list[float]:
        """Seconds that the starts after kills took; the first of a stage also loads the program."""
        present = self._stage.world.starts[1:] if self._stage is not None else []
        return self._starts + present

    def fresh_name(self) -> str:
        """A name that nobody has."""
        return f"n{next(self._numbers)}"


@contextlib.contextmanager
def open_bench() -> Iterator[Bench]:
    """A bench; nothing of it is left afterwards."""
    bench = Bench()
    try:
        yield bench
    finally:
        bench.spoiled()


def try_verb(
    bench: Bench,
    verb: Verb,
    fault: Fault,
    *,
    points: Iterable[int] | None = None,
    only: str = "",
    report: Callable[[str], None] = lambda _: None,
) -> Tally:
    """Every point of ``verb`` (or ``points``) under ``fault``; ``only`` is for ``Injector.arm``."""
    tally = Tally(verb.name, fault)
    for number in points or count(1):
        point = Point(verb, fault, number, only)
        try:
            struck = _try_point(bench, point)
        except AssertionError as violation:
            tally.failures.append(f"{verb.name}, {fault} at call {number}: {violation}")
            report(tally.failures[-1])
            bench.spoiled()
            struck = number < _MAX_POINTS
            tally.points += not struck
        if not struck:
            break
        tally.points += 1
    return tally


def _try_point(bench: Bench, point: Point) -> bool:
    """Whether the fault has struck. Raises Violation."""
    stage = bench.stage()
    world, stage.name = stage.world, bench.fresh_name()
    before = world.used_bytes()
    point.verb.prepare(stage)
    world.injector.arm(point.fault, point.number, point.only)
    status, answer = point.verb.request(stage)
    outcome = world.injector.disarm()
    try:
        _judge(stage, point, status, struck=outcome.struck, before=before)
    except AssertionError as violation:
        message = "" if answer is None else f" (it answered {status}: {answer})"
        raise Violation(f"[{outcome.where}] {violation}{message}") from violation
    return outcome.struck


def _judge(stage: Stage, point: Point, status: int, *, struck: bool, before: int) -> None:
    world, verb, fault = stage.world, point.verb, point.fault
    if fault in _KILLING and struck:
        world.restart()  # by then it is dead, or as good as answered
    elif status == 0:
        raise Violation("the server died")
    if not struck and not 200 <= status < 300:
        raise Violation(f"without any fault it answered {status}")
    elif struck:  # what could not be taken back goes with the next commit
        world.must("PATCH", f"/snapshots/{stage.live}", {"description": stage.name})
    complete = verb.complete(stage) if verb.background else None
    if not verb.background:
        world.check_everything()
    stage.check()
    if complete is None:
        complete = verb.complete(stage)
    if 200 <= status < 300 and not complete:
        raise Violation("it was answered as done and is not")
    if not complete:
        _repeat(stage, verb)
    verb.cleanup(stage)
    world.check_everything()
    if (grown := world.used_bytes() - before) > SLACK:
        raise Violation(f"{grown} bytes of disk are not back")


def _repeat(stage: Stage, verb: Verb) -> None:
    again, answer = verb.request(stage)
    if not 200 <= again < 300:
        raise Violation(f"repeating it answered {again}: {answer}")
    if not verb.complete(stage):
        raise Violation("repeating it did nothing")
