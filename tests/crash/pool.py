"""Verbs and faults in several processes at once, each with a server and a stage of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import TypeAlias

from crash.harness import Tally, open_bench, try_verb
from crash.injection import Fault
from crash.verbs import VERBS

Pipe: TypeAlias = "Connection[object, object]"


@dataclass(frozen=True, slots=True)
class Task:
    """One verb under one fault, at each ``every``th call."""

    verb: str
    fault: Fault
    every: int = 1


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a task: the tally, and the seconds that it and each start after a kill took."""

    tally: Tally
    seconds: float
    starts: list[float]


def try_all(tasks: Iterable[Task], processes: int, report: Callable[[str], None]) -> Iterator[Done]:
    """All tasks, in their order, in so many processes; failures are reported as they are found.

    Raises EOFError when one of the processes ends early.
    """
    waiting = deque(tasks)
    with contextlib.ExitStack() as held:
        busy = [held.enter_context(_worker()) for _ in range(processes)]
        for connection in busy:
            connection.send(_next(waiting))
        while busy:
            for connection in [one for one in busy if one in wait(busy)]:
                match connection.recv():
                    case str(words):
                        report(words)
                    case Done() as done:
                        yield done
                        connection.send(_next(waiting))
                    case None:
                        busy.remove(connection)


def _next(waiting: deque[Task]) -> Task | None:
    return waiting.popleft() if waiting else None


@contextlib.contextmanager
def _worker() -> Iterator[Pipe]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.terminate()  # nothing happens if it has ended
        process.join()


def _work(orders: Pipe) -> None:
    """Do what is ordered until the order is None, which is the last answer then."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is cleaned up
    verbs = {verb.name: verb for verb in VERBS}
    with open_bench() as bench:
        while isinstance(task := orders.recv(), Task):
            began, before = time.monotonic(), len(bench.starts)
            tally = try_verb(
                bench, verbs[task.verb], task.fault,
                points=count(1, task.every), report=orders.send,
            )  # fmt: skip
            orders.send(Done(tally, time.monotonic() - began, bench.starts[before:]))
    orders.send(None)
