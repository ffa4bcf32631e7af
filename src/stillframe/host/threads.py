"""Work on many pieces at once: a few threads, results in order, a bounded number ahead.

Reading, hashing and compressing release the interpreter's lock, so threads use all processors.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def usable_processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0))


async def in_own_thread(work: Callable[[], T]) -> T:
    """Run blocking ``work`` in a thread of its own, which waits for nobody else's.

    For what a guest that stands still waits for. Not to be cancelled: that waits for ``work``.
    """
    with ThreadPoolExecutor(1, "at once") as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, work)


def in_order(
    work: Callable[[T], R], items: Iterable[T], threads: int | None = None
) -> Generator[R]:
    """Yield ``work(item)`` for each item, in the order of the items, computed by ``threads``.

    At most twice as many results wait as there are threads (default: one for each processor).
    What ``work`` raises is raised here. Closing the generator waits for the pieces under way and
    forgets the others.
    """
    count = threads or usable_processors()
    ahead: deque[Future[R]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="pieces") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) >= 2 * count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
