"""Moving snapshots between two engines, each with a data directory of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from stillframe.engine.engine import Engine
from stillframe.model.values import Instance, Snapshot, SnapshotKind
from support.engine import ask, running

LIVE, DISK = SnapshotKind.STANDBY, SnapshotKind.STOPPED


async def archive_of(engine: Engine, snapshot: Snapshot, **options: Any) -> bytes:
    """The whole archive."""
    archive = await engine.export_snapshot(snapshot.id, **options)
    try:
        return b"".join([piece async for piece in archive])
    finally:
        await archive.close()


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    """The bytes as a client sends them."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def take(engine: Engine, data: bytes, **options: Any) -> Snapshot:
    """Import an archive."""
    return await engine.import_snapshot(pieces(data), **options)


async def remembering(engine: Engine, name: str = "source") -> Instance:
    """A Running instance that remembers who it is."""
    source = await running(engine, name)
    await ask(engine, source.id, "set", "who", name)
    return source
