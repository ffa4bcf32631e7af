"""Exports that go on after a broken connection, without making again what was sent."""

from __future__ import annotations

from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.moving import export as exporting
from stillframe.model.errors import InvalidRequest
from stillframe.store.archive import Position
from stillframe.store.archive_export import export
from support.archives import positions
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
        await archive_of(engine, made, offset=len(data) + 1)


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
