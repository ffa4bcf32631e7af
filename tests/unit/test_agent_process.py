"""The real agent, as a process of this machine: what needs neither a guest nor root."""

import asyncio
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stillframe.guest import connection as connections
from stillframe.guest import files, wire
from stillframe.guest.connection import AgentConnection
from stillframe.guest.wire import HEADER_SIZE, INITIAL_CREDIT, Frame, FrameType

ROOT = Path(__file__).parents[2]
PARTS = ("wire", "exec", "files", "identity", "util", "workload")
COMPILER = shutil.which("musl-gcc") or shutil.which("gcc")
LINKS, SIZE = 3000, 300_000
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler: make setup")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent with a stream socket in place of its port."""
    path = tmp_path_factory.mktemp("agent") / "serve"
    sources = [ROOT / "tests/guest/serve.c", *(ROOT / f"agent/{part}.c" for part in PARTS)]
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]
    subprocess.run([str(COMPILER), *flags, "-o", path, *sources], check=True, timeout=120)
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories full of links and empty files, as package managers make them, and one file."""
    top = tmp_path_factory.mktemp("tree")
    for number in range(10):
        (top / f"d{number}").mkdir()
    for number in range(LINKS):
        (top / f"d{number % 10}" / f"link{number}").symlink_to("../a/target/of/some/length")
        (top / f"d{number % 10}" / f"empty{number}").touch()
    (top / "file").write_bytes(b"x" * SIZE)
    return top


class Host:
    """Frames to and from the agent, and no credit but what the scenario grants."""

    def __init__(self, stream: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self.reader, self.writer = stream
        self.decoder = wire.Decoder()

    def send(self, kind: FrameType, channel: int, payload: bytes) -> None:
        """Write one frame."""
        self.writer.write(wire.encode(Frame(kind, channel, payload)))

    async def until(self, channel: int) -> list[Frame]:
        """All frames up to the first of that channel, which is the last of them."""
        found: list[Frame] = []
        while not any(frame.channel == channel for frame in found):
            data = await self.reader.read(65536)
            assert data
            found += self.decoder.feed(data)
        return found


@asynccontextmanager
async def greeted(program: Path) -> AsyncIterator[tuple[Host, Frame]]:
    """A host that has greeted an agent, and what that answered."""
    async with agent(program) as stream:
        host = Host(stream)
        host.send(FrameType.HELLO, 0, b"n" * 16)
        (hello,) = await host.until(0)
        yield host, hello


@asynccontextmanager
async def agent(
    program: Path,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """The stream of an agent, which ends with the block."""
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        process = await asyncio.create_subprocess_exec(program, str(fd), pass_fds=[fd])
    stream = await asyncio.open_connection(sock=ours)
    try:
        async with asyncio.timeout(60):
            yield stream
    finally:
        process.kill()
        await process.wait()
        stream[1].close()
        await asyncio.gather(stream[1].wait_closed(), return_exceptions=True)


def reading(tree: Path, *more: tuple[str, str]) -> bytes:
    """The payload of a READ."""
    return wire.text_list([("path", str(tree)), ("follow", "0"), *more])


async def quiet(host: Host) -> list[Frame]:
    """What the agent sends of channel 1 until it waits.

    Each answer on another channel comes before what that turn of the agent sends: two in a row
    without anything between them tell that it has nothing left to send.
    """
    found: list[Frame] = []
    empty = 0
    for channel in range(1000, 100_000):
        host.send(FrameType.STAT, channel, wire.text_list([("path", "/")]))
        new = await host.until(channel)
        found += [frame for frame in new if frame.channel == 1]
        empty = empty + 1 if len(new) == 1 else 0
        if empty == 2:
            return found
    raise AssertionError("the agent never waits")


def charged(frames: list[Frame]) -> int:
    """What the frames cost: bytes of a file as they are, the others whole."""
    headers = sum(HEADER_SIZE for frame in frames if frame.type != FrameType.DATA)
    return headers + sum(len(frame.payload) for frame in frames)


async def test_an_agent_that_is_asked_to_lets_the_frames_of_a_tree_cost_credit(
    program: Path, tree: Path
) -> None:
    async with greeted(program) as (host, hello):
        assert ("charges", "entries") in wire.parse_text_list(hello.payload[16:])
        host.send(FrameType.READ, 1, reading(tree, ("charge", "entries")))
        first = await quiet(host)
        assert INITIAL_CREDIT <= charged(first) < INITIAL_CREDIT + 1000
        host.send(FrameType.CREDIT, 1, struct.pack("<I", 100_000))
        first += await quiet(host)
        assert INITIAL_CREDIT + 100_000 <= charged(first) < INITIAL_CREDIT + 101_000


async def test_an_agent_that_is_not_asked_to_does_as_its_older_hosts_expect(
    program: Path, tree: Path
) -> None:
    async with greeted(program) as (host, _):
        (tree / "file").rename(tree.with_suffix(".file"))  # which would wait for credit
        try:
            host.send(FrameType.READ, 1, reading(tree))
            frames = await quiet(host)
        finally:
            tree.with_suffix(".file").rename(tree / "file")
        assert frames[-1].payload == b"final"
        assert len(frames) == 2 * (10 + 2 * LINKS) + 1


async def test_a_copy_of_very_many_entries_waits_for_a_slow_client(
    program: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may be unread is set below what the whole tree is."""
    monkeypatch.setattr(connections, "MAX_UNREAD_BYTES", 2 * INITIAL_CREDIT)
    async with agent(program) as stream:
        session = await AgentConnection.open(stream, deadline=60)
        found, sizes = 0, 0
        async for entry in files.read_path(session, str(tree)):
            if found % 500 == 0:  # an agent that goes on would send all it can meanwhile
                await files.stat(session, "/")
            sizes += sum([len(data) async for data in entry.data])
            found += 1
        await session.close()
    assert (found, sizes) == (10 + 2 * LINKS + 1, SIZE)
