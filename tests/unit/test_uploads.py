"""Imports that go on after a broken connection, and those that nobody goes on with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import ForkRequest
from stillframe.engine.moving import uploads
from stillframe.engine.moving.arrival import Arrival
from stillframe.model.errors import Conflict, InvalidRequest, NotFound, RateLimited
from stillframe.model.values import Snapshot
from support.engine import ask, make_engine
from support.moving import LIVE, archive_of, pieces, remembering

ID = "u" * 24


class BrokenError(Exception):
    """The connection broke."""


@pytest.fixture
async def data(engine: Engine) -> bytes:
    """The archive of a snapshot with incompressible memory, so that it has many records."""
    source = await remembering(engine)
    overlay = engine.context.data.instance(source.id).overlay
    with overlay.open("r+b") as file:
        file.seek(8 << 20)
        file.write(b"".join(bytes([n]) + b"rest" * 300_000 for n in range(6)))
    return await archive_of(engine, await engine.snapshot(source.id, kind=LIVE))


async def broken(data: bytes) -> AsyncIterator[bytes]:
    """A connection that breaks after ``data``."""
    async for piece in pieces(data):
        yield piece
    raise BrokenError


async def go_on(engine: Engine, data: bytes, offset: int, upload: str = ID) -> Snapshot:
    return await engine.import_snapshot(pieces(data[offset:]), upload=upload, offset=offset)


async def begin(engine: Engine, data: bytes, upload: str = ID) -> int:
    """Begin an upload whose connection breaks; the offset it has come to."""
    with pytest.raises(BrokenError):
        await engine.import_snapshot(broken(data), upload=upload)
    return engine.upload_status(upload).offset


def half_made(engine: Engine) -> list[Path]:
    return list(engine.context.data.snapshots.glob(".*"))


async def test_an_upload_goes_on_where_its_connection_broke(
    engine: Engine, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillframe.engine.moving.arrival._PIECE", 1000)
    offset = await begin(engine, data[: len(data) // 2])
    assert 0 < offset <= len(data) // 2
    with pytest.raises(BrokenError):
        await engine.import_snapshot(broken(data[offset:-50]), upload=ID, offset=offset)
    later = engine.upload_status(ID).offset
    assert offset < later < len(data)
    taken = await go_on(engine, data, later)
    fork = await engine.fork_snapshot(taken.id, ForkRequest("fork"))
    assert await ask(engine, fork.id, "get", "who") == "source"
    assert half_made(engine) == []
    # The answer may be lost: whoever asks again gets the same one.
    assert engine.upload_status(ID).snapshot_id == taken.id
    assert (await go_on(engine, data, later)).id == taken.id


async def test_only_the_next_byte_is_taken(engine: Engine, data: bytes) -> None:
    offset = await begin(engine, data[:-1])
    for wrong in (0, offset + 1, len(data)):
        with pytest.raises(Conflict) as caught:
            await go_on(engine, data, wrong)
        assert caught.value.facts == {"offset": offset}
    with pytest.raises(NotFound):
        await go_on(engine, data, offset, upload="v" * 24)
    for name in ("../x", "", "U" * 24):
        with pytest.raises(InvalidRequest):
            await go_on(engine, data, 0, upload=name)
    with pytest.raises(InvalidRequest):
        await engine.import_snapshot(pieces(data), offset=5)
    assert (await go_on(engine, data, offset)).name is None


async def test_damage_ends_an_upload(engine: Engine, data: bytes) -> None:
    offset = await begin(engine, data[:-1])
    spoilt = data[:offset] + b"?" * (len(data) - offset)
    with pytest.raises(InvalidRequest):
        await go_on(engine, spoilt, offset)
    assert half_made(engine) == []
    assert not engine.context.records.intents
    with pytest.raises(NotFound):
        engine.upload_status(ID)


async def test_an_upload_takes_bytes_from_one_connection(engine: Engine, data: bytes) -> None:
    waiting, going_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield data[: len(data) // 2]
        waiting.set()
        await going_on.wait()
        yield data[len(data) // 2 :]

    first = asyncio.create_task(engine.import_snapshot(slow(), upload=ID))
    await waiting.wait()
    with pytest.raises(Conflict, match="already"):
        await go_on(engine, data, 0)
    going_on.set()
    assert engine.find_snapshot((await first).id)


async def test_an_abandoned_upload_is_removed(
    engine: Engine, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed, abort = asyncio.Event(), Arrival.abort

    async def noted(arrival: Arrival) -> None:
        await abort(arrival)
        removed.set()

    monkeypatch.setattr(Arrival, "abort", noted)
    monkeypatch.setattr(uploads, "PATIENCE", 0.0)
    with pytest.raises(BrokenError):
        await engine.import_snapshot(broken(data[:-1]), upload=ID)
    async with asyncio.timeout(30):
        await removed.wait()
    assert half_made(engine) == []
    assert not engine.context.records.intents
    with pytest.raises(NotFound):
        engine.upload_status(ID)


async def test_so_many_at_once_and_no_more(
    engine: Engine, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_UPLOADS", 2)
    for letter in "ab":
        await begin(engine, data[:100], upload=letter * 24)
    with pytest.raises(RateLimited):
        await go_on(engine, data, 0)
    assert len(half_made(engine)) == 2


async def test_those_that_have_come_whole_keep_nobody_out(
    engine: Engine, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_UPLOADS", 2)
    await begin(engine, data[:100])
    for letter in "abc":
        await engine.import_snapshot(pieces(data), upload=letter * 24)
    assert engine.upload_status("c" * 24).snapshot_id
    with pytest.raises(NotFound):  # the oldest answer is forgotten
        engine.upload_status("a" * 24)
    assert (await go_on(engine, data, engine.upload_status(ID).offset)).id


async def test_the_end_of_the_server_is_the_end_of_its_uploads(
    tmp_path: Path, engine: Engine, data: bytes
) -> None:
    other = make_engine(tmp_path / "other")
    await other.open()
    await other.context.images.ensure("stillframe/base")
    await begin(other, data[:-1])
    assert half_made(other)
    await other.close()
    assert half_made(other) == []
