"""What a capture leaves behind when it is broken off, by failure, cancellation or a server's end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.model.errors import VmmFailure
from stillframe.model.values import SnapshotKind
from support.engine import ask, open_engine, running

LIVE = SnapshotKind.STANDBY


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with open_engine(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_disk_copy_that_was_half_begun_is_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """Else its bitmap, and a node that holds the copy open, would stay in the VMM."""
    source = await running(engine)
    engine.context.shares_blocks = False
    machine = engine.context.live[source.id].machine
    begun, ended = asyncio.Event(), list[int]()

    async def half(*_: Any) -> bool:
        begun.set()
        if cancelled:
            await asyncio.Event().wait()
        raise VmmFailure("the copy cannot be opened")

    async def end(index: int) -> None:
        ended.append(index)

    monkeypatch.setattr(machine, "begin_disk_copy", half)
    monkeypatch.setattr(machine, "end_disk_copy", end)
    taking = asyncio.create_task(engine.snapshot(source.id, kind=LIVE))
    await begun.wait()
    if cancelled:
        taking.cancel()
    with pytest.raises((VmmFailure, asyncio.CancelledError)):
        await taking
    assert ended == [1]
    monkeypatch.undo()
    await engine.snapshot(source.id, kind=LIVE)
    assert await ask(engine, source.id, "true") == ""
