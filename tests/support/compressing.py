"""Scenarios of compression: a gate in its way, and what there is before and after."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping import compression as keeping
from stillframe.model.values import (
    CompressionAlgorithm,
    CompressionConfig,
    CompressionState,
    Instance,
    Snapshot,
    SnapshotKind,
)
from stillframe.store import compression as storing
from support.engine import ask, running

LIVE, DISK = SnapshotKind.STANDBY, SnapshotKind.STOPPED
ZSTD = CompressionConfig(True, CompressionAlgorithm.ZSTD, 1)
LZ4 = CompressionConfig(True, CompressionAlgorithm.LZ4, 0)
OFF = CompressionConfig(False)


class Gate:
    """Stands in for ``compress``: says that it was reached, then waits to be let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.cancelled = False
        monkeypatch.setattr(keeping, "compress", self)

    def __call__(
        self, source: Path, destination: Path, *rest: Any, cancelled: Callable[[], bool]
    ) -> Any:
        """Leave what an unfinished attempt would leave, while it waits."""
        destination.write_bytes(b"unfinished")
        self.reached.set()
        while not self.opened.wait(0.002):
            if cancelled():
                self.cancelled = True
                return None
        destination.unlink()
        return storing.compress(source, destination, *rest, cancelled=cancelled)

    async def until_reached(self) -> None:
        """Return when a compression is at work."""
        assert await asyncio.to_thread(self.reached.wait, 30)


async def captured(engine: Engine, config: CompressionConfig | None = None) -> Snapshot:
    source = await running(engine)
    await ask(engine, source.id, "set", "who", "source")
    return await engine.snapshot(source.id, kind=LIVE, compression=config)


async def settled(engine: Engine, snapshot_id: str) -> Snapshot:
    """The snapshot once its compression is done."""
    async with asyncio.timeout(60):
        await engine.context.compressor.settled(snapshot_id)
    return engine.find_snapshot(snapshot_id)


async def compressed(engine: Engine, config: CompressionConfig = ZSTD) -> Snapshot:
    snapshot = await settled(engine, (await captured(engine, config)).id)
    assert snapshot.compression_state is CompressionState.COMPRESSED, snapshot.compression_error
    return snapshot


def image_of(engine: Engine, instance_id: str) -> os.stat_result:
    """What an instance maps."""
    return engine.context.data.instance(instance_id).memory.stat()


def expanded(engine: Engine) -> list[Path]:
    return sorted(engine.context.data.expanded.iterdir())


async def removed(engine: Engine) -> list[Path]:
    """The expanded images, when all that is being removed is gone."""
    await engine.context.expanded.close()
    return expanded(engine)


async def forked(engine: Engine, snapshot: Snapshot, name: str) -> Instance:
    fork = await engine.fork_snapshot(snapshot.id, ForkRequest(name))
    assert await ask(engine, fork.id, "get", "who") == "source"
    return fork
