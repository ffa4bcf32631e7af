"""Logs of instances: their last lines, following them, and keeping them from filling the disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.machines import exit_of
from stillframe.host.watch import file_changes
from stillframe.model.errors import NotFound
from stillframe.model.values import Instance
from stillframe.vmm.logs import log_end
from support.engine import make_engine, open_engine, running

LIMIT = 1000


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    made = make_engine(tmp_path)
    made.context.settings = replace(made.context.settings, max_log_bytes=LIMIT)
    async with open_engine(tmp_path, made) as opened:
        yield opened


@pytest.fixture
async def source(engine: Engine) -> Instance:
    return await running(engine)


@pytest.fixture
def path(engine: Engine, source: Instance) -> Path:
    """The console's log, emptied of what the guest has written."""
    found = engine.context.data.instance(source.id).log("app")
    os.truncate(found, 0)
    return found


@pytest.fixture
def console(path: Path) -> Iterator[int]:
    """The log as a VMM has it open."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    yield fd
    os.close(fd)


def numbered(first: int, end: int) -> list[str]:
    return [f"line {number}" for number in range(first, end)]


def write(console: int, lines: list[str]) -> None:
    os.write(console, "".join(f"{line}\n" for line in lines).encode())


async def last(engine: Engine, instance: Instance, tail: int) -> list[str]:
    return [line async for line in engine.logs(instance.id, source="app", tail=tail, follow=False)]


async def taken(lines: AsyncIterator[str], count: int) -> list[str]:
    async with asyncio.timeout(60):
        return [await anext(lines) for _ in range(count)]


@contextlib.asynccontextmanager
async def followed(
    engine: Engine, instance: Instance, tail: int
) -> AsyncIterator[AsyncIterator[str]]:
    lines = engine.logs(instance.id, source="app", tail=tail, follow=True)
    try:
        yield lines
    finally:
        await lines.aclose()  # type: ignore[attr-defined]


# -- the last lines -------------------------------------------------------------------------------
async def test_a_line_that_is_not_finished_is_shown(
    engine: Engine, source: Instance, console: int
) -> None:
    os.write(console, b"one\ntwo\nlogin: ")
    assert await last(engine, source, 10) == ["one", "two", "login: "]
    assert await last(engine, source, 2) == ["two", "login: "]
    assert await last(engine, source, 0) == []
    os.write(console, b"\n")
    assert await last(engine, source, 1) == ["login: "]


async def test_a_follower_gets_the_last_words_when_the_instance_goes(
    engine: Engine, source: Instance, console: int
) -> None:
    async with followed(engine, source, 10) as lines:
        os.write(console, b"one\nand no more")
        assert await taken(lines, 1) == ["one"]
        await engine.delete(source.id, graceful=False)
        rest = [line async for line in lines]
    assert rest == ["and no more"]


# -- cutting --------------------------------------------------------------------------------------
async def test_a_log_that_grew_too_large_is_cut_and_its_last_part_kept(
    engine: Engine, source: Instance, path: Path, console: int
) -> None:
    write(console, numbered(0, 500))
    await engine.context.logs.look()
    kept = path.with_name("app.log.1")
    assert path.stat().st_size == 0
    assert LIMIT - 10 < kept.stat().st_size <= LIMIT
    assert kept.read_text().startswith("line ")
    write(console, numbered(500, 505))  # whoever appends goes on at the beginning
    assert path.read_text().splitlines() == numbered(500, 505)
    assert await last(engine, source, 20) == numbered(485, 505)
    assert await last(engine, source, 3) == numbered(502, 505)
    write(console, numbered(505, 1000))
    await engine.context.logs.look()
    assert sorted(file.name for file in path.parent.glob("app*")) == ["app.log", "app.log.1"]
    assert (await last(engine, source, 1000))[-10:] == numbered(990, 1000)


async def test_small_logs_and_those_at_rest_are_left_alone(
    engine: Engine, source: Instance, path: Path, console: int
) -> None:
    write(console, numbered(0, 10))
    await engine.context.logs.look()
    assert path.read_text().splitlines() == numbered(0, 10)
    write(console, numbered(10, 500))
    async with engine.context.exclusive(source.id, "try"):
        await engine.context.logs.look()  # it does not wait
        assert path.stat().st_size > LIMIT
    await engine.stop(source.id)
    size = path.stat().st_size
    await engine.context.logs.look()
    assert path.stat().st_size == size


async def test_a_follower_misses_nothing_over_cuts(
    engine: Engine, source: Instance, console: int
) -> None:
    write(console, numbered(0, 10))
    async with followed(engine, source, 2) as lines:
        assert await taken(lines, 2) == numbered(8, 10)
        write(console, numbered(10, 120))
        await engine.context.logs.look()
        assert await taken(lines, 5) == numbered(10, 15)
        os.write(console, b"half ")
        write(console, ["a line"])
        write(console, numbered(121, 200))
        await engine.context.logs.look()
        # What is in neither part any more cannot be had; all the rest comes, in order.
        await asyncio.sleep(0)
        os.write(console, b"the end\n")
        heard = []
        async with asyncio.timeout(60):
            async for line in lines:
                heard.append(line)
                if line == "the end":
                    break
    wanted = [*numbered(15, 120), "half a line", *numbered(121, 200), "the end"]
    assert [line for line in wanted if line in heard] == heard
    assert heard[-80:] == wanted[-80:]


async def test_a_follower_goes_on_when_somebody_else_empties_the_log(
    engine: Engine, source: Instance, path: Path, console: int
) -> None:
    write(console, numbered(0, 10))
    async with followed(engine, source, 1) as lines:
        assert await taken(lines, 1) == numbered(9, 10)
        os.truncate(path, 0)
        write(console, ["new"])
        assert await taken(lines, 1) == ["new"]


async def test_logs_are_cut_in_the_background(tmp_path: Path) -> None:
    made = make_engine(tmp_path)
    made.context.settings = replace(
        made.context.settings, max_log_bytes=LIMIT, log_check_seconds=0.01
    )
    async with open_engine(tmp_path, made) as engine:
        source = await running(engine)
        path = engine.context.data.instance(source.id).log("app")
        with path.open("ab") as file:
            file.write(b"x" * 2 * LIMIT)
        async with asyncio.timeout(60):
            async with file_changes(path) as changed:
                while not path.with_name("app.log.1").exists():
                    await changed.wait()
                    changed.clear()


async def test_a_log_that_cannot_be_cut_stays_as_it_is(
    engine: Engine, source: Instance, path: Path, console: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(console, numbered(0, 500))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stillframe.engine.logs._append", full)
        await engine.context.logs.look()
    assert path.read_text().splitlines() == numbered(0, 500)
    assert not list(path.parent.parent.glob("*.new"))
    await engine.context.logs.look()
    assert path.stat().st_size == 0


# -- who else reads them --------------------------------------------------------------------------
async def test_an_exit_code_is_found_though_the_log_was_cut_behind_it(
    engine: Engine, source: Instance, console: int
) -> None:
    write(console, [*numbered(0, 500), f"STILLFRAME-EXIT nonce={source.boot_nonce} code=7"])
    await engine.context.logs.look()
    assert exit_of(engine.context, source) == (7, None)


def test_the_end_of_a_log_is_read_though_it_was_emptied(tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    log.write_bytes(b"new")
    assert log_end(log, 1) == b"ew"
    assert log_end(log, 100) == b"new"


async def test_a_log_that_is_not_there_is_told(
    engine: Engine, source: Instance, path: Path
) -> None:
    path.unlink()
    with pytest.raises(NotFound, match="app log"):
        await last(engine, source, 1)
