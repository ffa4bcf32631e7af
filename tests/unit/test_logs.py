"""The last lines of a log, whatever a guest writes into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.engine import guest
from support.engine import open_engine, running


async def last_lines(tmp_path: Path, content: bytes, tail: int) -> list[str]:
    """What a log with that content answers."""
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        engine.context.data.instance(source.id).log("app").write_bytes(content)
        return [
            line async for line in engine.logs(source.id, source="app", tail=tail, follow=False)
        ]


@pytest.mark.parametrize("tail", [0, 1, 3, 99])
async def test_the_last_lines_are_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: int
) -> None:
    monkeypatch.setattr(guest, "_TAIL_BLOCK", 7)
    lines = [f"line {number} " + "x" * number for number in range(20)]
    content = "\n".join([*lines, "not yet ended"]).encode()
    assert await last_lines(tmp_path, content, tail) == (lines[-tail:] if tail else [])


def test_of_a_line_without_end_a_part_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "_TAIL_BLOCK", 1000)
    monkeypatch.setattr(guest, "_MAX_TAIL", 50_000)
    path = tmp_path / "log"
    path.write_bytes(b"first\n" + b"x" * 1_000_000)
    lines, position = guest._tail(path, 1)
    assert lines == []
    assert position == path.stat().st_size - 50_000  # whoever follows goes on from there
