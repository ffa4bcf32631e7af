"""A verb cancelled while a thread works for it: it waits for the thread, then undoes all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ForkRequest
from stillframe.engine.verbs import create, fork, restore_snapshot, snapshot
from stillframe.model.states import InstanceState
from stillframe.model.values import SnapshotKind
from support.engine import running, traces

pytestmark = pytest.mark.timeout(120)
LIVE, DISK = SnapshotKind.STANDBY, SnapshotKind.STOPPED


class Busy:
    """A busy disk: a function that works in a thread, once ``go_on`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        real = getattr(module, name)

        def work(*arguments: Any, **options: Any) -> Any:
            self.reached.set()
            assert self.go_on.wait(60)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, work)


WORK = {
    "create": (create, "make_overlay_disk"),
    "fork of a snapshot": (fork, "begin_clone"),
    "fork of an instance": (fork, "begin_clone"),
    "snapshot": (snapshot, "clone"),
    "restore in place": (restore_snapshot, "clone"),
}


async def asked(engine: Engine, verb: str) -> Coroutine[Any, Any, Any]:
    """The request, and all it needs."""
    source = await running(engine)
    taken = await engine.snapshot(source.id, kind=LIVE)
    await engine.standby(source.id)
    requests: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "create": lambda: engine.create(CreateRequest("new", "stillframe/base")),
        "fork of a snapshot": lambda: engine.fork_snapshot(taken.id, ForkRequest("new")),
        "fork of an instance": lambda: engine.fork(source.id, name="new"),
        "snapshot": lambda: engine.snapshot(source.id, kind=LIVE),
        "restore in place": lambda: engine.restore_snapshot(
            source.id, taken.id, target_state=InstanceState.RUNNING
        ),
    }
    return requests[verb]()


@pytest.mark.parametrize("impatient", [1, 3])
@pytest.mark.parametrize("verb", WORK)
async def test_a_verb_cancelled_while_a_thread_works_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, impatient: int
) -> None:
    request = await asked(engine, verb)
    before = sorted(traces(tmp_path))
    busy = Busy(monkeypatch, *WORK[verb])
    task = asyncio.ensure_future(request)
    try:
        assert await asyncio.to_thread(busy.reached.wait, 60)
        for _ in range(impatient):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()  # the thread is still at it
    finally:
        busy.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(traces(tmp_path)) == before
    assert engine.context.records.intents == {}
