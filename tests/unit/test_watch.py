"""Waiting for files to change: everybody shares one inotify descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillframe.host.watch import file_changes
from stillframe.model.errors import HostFailure


def descriptors() -> int:
    """How many inotify descriptors this process has."""
    names = list(Path("/proc/self/fd").iterdir())
    links = [str(name.readlink()) for name in names if name.is_symlink()]
    return links.count("anon_inode:inotify")


@contextlib.asynccontextmanager
async def watched(*paths: Path) -> AsyncIterator[list[asyncio.Event]]:
    """All of these files, each watched for itself."""
    async with contextlib.AsyncExitStack() as held:
        yield [await held.enter_async_context(file_changes(path)) for path in paths]


async def set_within_a_minute(event: asyncio.Event) -> None:
    async with asyncio.timeout(60):
        await event.wait()
    event.clear()


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{number}.log" for number in range(3)]
    for path in found:
        path.touch()
    return found


async def test_all_who_wait_share_one_descriptor_which_goes_with_the_last(
    logs: list[Path],
) -> None:
    async with watched(*logs):
        async with watched(*logs, *logs):
            assert descriptors() == 1
        assert descriptors() == 1
    assert descriptors() == 0


async def test_everybody_hears_of_their_own_file_alone(logs: list[Path]) -> None:
    async with watched(logs[0], logs[0], logs[1]) as (one, same, other):
        logs[0].write_text("a line")
        await set_within_a_minute(one)
        await set_within_a_minute(same)
        assert not other.is_set()
        logs[1].unlink()
        await set_within_a_minute(other)


async def test_who_goes_takes_nothing_from_those_who_stay(logs: list[Path]) -> None:
    async with watched(logs[0], logs[1]) as (stays, gone):
        async with watched(logs[0]):
            pass
        logs[1].unlink()
        await set_within_a_minute(gone)
        logs[1].touch()
        async with watched(logs[1]) as (again,):
            logs[1].write_text("a line")
            await set_within_a_minute(again)
        logs[0].write_text("a line")
        await set_within_a_minute(stays)


async def test_when_the_kernel_loses_events_everybody_looks(logs: list[Path]) -> None:
    many = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if many > 1 << 17:
        pytest.skip(f"this host keeps {many} events")
    async with watched(*logs) as events:
        with logs[0].open("ab", buffering=0) as one, logs[1].open("ab", buffering=0) as two:
            for _ in range(many // 2 + 1):  # the same twice would be one event
                one.write(b".")
                two.write(b".")
        logs[2].write_text("a line")
        for event in events:
            await set_within_a_minute(event)


async def test_a_file_that_is_not_there_is_told_and_leaves_no_descriptor(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with file_changes(tmp_path / "nowhere"):
            pass
    assert descriptors() == 0


async def test_a_host_that_gives_no_descriptor_is_told_with_what_to_do(
    logs: list[Path],
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(HostFailure, match="no more files can be watched: Too many") as caught:
            async with file_changes(logs[0]):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "fs.inotify.max_user_instances" in (caught.value.hint or "")
    async with watched(logs[0]):  # nothing is left of it
        assert descriptors() == 1
