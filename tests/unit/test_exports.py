"""Exports that go on after a broken connection, without making again what was sent."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.keeping.interface import SnapshotChanges
from stillframe.engine.moving import export as exporting
from stillframe.engine.moving.export import about_of
from stillframe.model.errors import Conflict, InvalidRequest
from stillframe.model.values import CompressionState, Snapshot
from stillframe.store.archive import Position
from stillframe.store.archive_export import export
from support.archives import positions
from support.compressing import ZSTD, Gate, captured, settled
from support.moving import LIVE, archive_of, remembering


async def test_what_was_sent_is_not_made_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_PIECE", 900)
    monkeypatch.setattr(exporting, "_APART", 2000)
    made = await engine.snapshot((await remembering(engine)).id, kind=LIVE)
    first = await engine.export_snapshot(made.id)
    data = bytearray()
    async for piece in first:
        data += piece
        if len(data) > 6000:  # the connection breaks
            break
    await first.close()
    began: list[int] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        began.append(options["position"].offset)
        return export(*arguments, **options)

    monkeypatch.setattr(exporting, "export", noted)
    data += await archive_of(engine, made, offset=len(data), tag=first.tag)
    assert await archive_of(engine, made) == data
    for offset in range(1, len(data), len(data) // 5):
        assert await archive_of(engine, made, offset=offset, tag=first.tag) == data[offset:]
        places = [position.offset for position in positions(bytes(data))]
        assert began[-1] in (0, *places)
    assert began[0] > 0
    assert began[1] == 0
    assert began[-1] > len(data) // 2
    with pytest.raises(InvalidRequest):
        await archive_of(engine, made, offset=len(data) + 1, tag=first.tag)


async def test_an_export_goes_on_across_the_end_of_a_compression(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    made = await captured(engine, ZSTD)
    await gate.until_reached()
    raw = await engine.export_snapshot(made.id)
    data = b"".join([piece async for piece in raw])
    await raw.close()
    gate.opened.set()
    after = await settled(engine, made.id)
    assert after.compression_state is CompressionState.COMPRESSED
    assert after.size_bytes != made.size_bytes
    for offset in (1, len(data) // 2, len(data) - 1):
        assert await archive_of(engine, made, offset=offset, tag=raw.tag) == data[offset:]
    assert await archive_of(engine, made) == data


async def test_an_archive_is_another_one_only_by_the_words_that_people_give(
    engine: Engine,
) -> None:
    made = await captured(engine)
    first = await engine.export_snapshot(made.id)
    await first.close()
    kept = replace(
        made,
        size_bytes=1,
        stored_bytes=2,
        stored_beside="b" * 24,
        timings_ms={"copy": 1.0},
        compression=ZSTD,
        compression_state=CompressionState.ERROR,
        compression_error="no space",
        compressed_size_bytes=3,
        uncompressed_size_bytes=4,
        warm_count=5,
        expires_at=made.created_at,
        pinned=True,
        damaged="it is",
    )
    changed = {field for field in fields(made) if getattr(made, field) != getattr(kept, field)}
    words = {"name", "tags", "description"}
    never = {
        "id", "kind", "source_instance_id", "source_instance_name", "source_hypervisor",
        "created_at", "template", "pause_ms", "parent_snapshot_id",
    }  # fmt: skip
    assert changed | words | never == fields(made)  # a new one has to be thought of
    assert about_of(kept) == about_of(made)
    edits: list[SnapshotChanges] = [
        {"name": "other"},
        {"tags": {"a": "b"}},
        {"description": "of old"},
    ]
    for word in edits:
        engine.edit_snapshot(made.id, word)
        with pytest.raises(Conflict):
            await archive_of(engine, made, offset=1, tag=first.tag)


def fields(snapshot: Snapshot) -> set[str]:
    """The names of what is recorded of a snapshot."""
    return {field.name for field in dataclasses.fields(snapshot)}


async def test_nobody_goes_on_with_an_archive_without_saying_which(engine: Engine) -> None:
    made = await captured(engine)
    with pytest.raises(InvalidRequest, match="which one"):
        await archive_of(engine, made, offset=1)


async def test_the_places_of_so_many_archives_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporting, "_ARCHIVES", 2)
    places, far = exporting.Places(), Position(1 << 30, 1, 1, 32, 1 << 20)
    for tag in "abc":
        assert places.before(tag, 1 << 40) == Position()
        places.note(tag, far)
    assert places.before("b", 1 << 40) == far
    assert places.before("b", (1 << 30) - 1) == Position()
    assert places.before("a", 1 << 40) == Position()
