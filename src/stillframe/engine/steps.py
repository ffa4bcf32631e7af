"""Long work in short steps: threads do it one step at a time, and it can be left between them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from stillframe.engine.context import finish

T = TypeVar("T")
P = ParamSpec("P")


class Steps:
    """Runs the steps of one piece of work in threads, never two at once.

    A cancelled step runs to its end; what is run next, such as closing files, waits for it.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()

    async def run(self, step: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """The result of ``step``, or what it raised."""

        def in_turn() -> T:
            with self._turn:
                return step(*arguments, **keywords)

        return await finish(asyncio.to_thread(in_turn))
