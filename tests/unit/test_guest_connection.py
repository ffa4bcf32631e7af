"""A session against a small agent of our own over a socket pair."""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from stillframe.guest import connection as connections
from stillframe.guest import files, wire
from stillframe.guest.connection import AgentConnection, AgentHello
from stillframe.guest.exec import start_exec
from stillframe.guest.wire import Frame, FrameType
from stillframe.model.errors import GuestFailure

STATE = [("version", "1"), ("boot_id", "b-1"), ("workload", "running")]
Answer = Callable[["FakeAgent", Frame], Awaitable[None]]


class FakeAgent:
    """Answers HELLO, hands every other frame to the scenario."""

    def __init__(
        self,
        stream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        state: list[tuple[str, str]] = STATE,
    ) -> None:
        self.reader, self.writer = stream
        self.state = state
        self.seen: list[Frame] = []

    def send(self, kind: int, channel: int, payload: bytes = b"") -> None:
        self.writer.write(wire.encode(Frame(kind, channel, payload)))

    async def serve(self, answer: Answer) -> None:
        decoder = wire.Decoder()
        while data := await self.reader.read(65536):
            for frame in decoder.feed(data):
                if frame.type == FrameType.HELLO:
                    self.send(FrameType.HELLO_OK, 0, frame.payload + wire.text_list(self.state))
                else:
                    self.seen.append(frame)
                    await answer(self, frame)


@asynccontextmanager
async def session(
    answer: Answer,
    *,
    first: bytes = b"",
    on_event: Callable[[AgentHello], None] | None = None,
    state: list[tuple[str, str]] = STATE,
) -> AsyncIterator[tuple[AgentConnection, FakeAgent]]:
    ours, theirs = socket.socketpair()
    agent = FakeAgent(await asyncio.open_connection(sock=theirs), state)
    agent.writer.write(first)
    task = asyncio.create_task(agent.serve(answer))
    stream = await asyncio.open_connection(sock=ours)
    connection = await AgentConnection.open(stream, deadline=10, on_event=on_event)
    try:
        yield connection, agent
    finally:
        await connection.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        agent.writer.close()
        await asyncio.gather(agent.writer.wait_closed(), return_exceptions=True)


async def ignore(agent: FakeAgent, frame: Frame) -> None:
    """An agent that does not answer."""


async def test_the_greeting_is_found_behind_half_a_frame_that_claims_what_follows() -> None:
    cut = wire.encode(Frame(FrameType.STDOUT, 3, b"z" * 60000))[:100]
    async with session(ignore, first=cut) as (connection, _):
        assert connection.hello == AgentHello("b-1", "running")


async def test_a_silent_agent_is_reported_when_the_deadline_passes() -> None:
    ours, theirs = socket.socketpair()
    stream = await asyncio.open_connection(sock=ours)
    with theirs, pytest.raises(GuestFailure, match="did not answer"):
        await AgentConnection.open(stream, deadline=0.05)


async def test_a_command_yields_both_streams_then_its_code() -> None:
    async def answer(agent: FakeAgent, frame: Frame) -> None:
        agent.send(FrameType.STDOUT, frame.channel, b"out")
        agent.send(FrameType.STDERR, frame.channel, b"err")
        agent.send(FrameType.EXIT, frame.channel, struct.pack("<i", 7))

    async with session(answer) as (connection, agent):
        command = await start_exec(connection, ["sh", "-c", "x"], env={"A": "b"})
        assert [part async for part in command.output()] == [(1, b"out"), (2, b"err")]
        assert await command.wait() == 7
        await command.close()
        fields = wire.parse_text_list(agent.seen[0].payload)
        assert fields[:4] == [("arg", "sh"), ("arg", "-c"), ("arg", "x"), ("env", "A=b")]


async def test_a_command_that_cannot_start_is_told_apart() -> None:
    async def answer(agent: FakeAgent, frame: Frame) -> None:
        error = wire.text_list([("errno", "ENOENT"), ("message", "exec: no such file")])
        agent.send(FrameType.ERROR, frame.channel, error)

    async with session(answer) as (connection, _):
        with pytest.raises(GuestFailure) as caught:
            await (await start_exec(connection, ["nope"])).wait()
        assert (caught.value.code, caught.value.facts) == ("exec_failed", {"errno": "ENOENT"})
        assert caught.value.message == "cannot run nope: no such file"


async def test_stdin_waits_for_the_guests_credit() -> None:
    full = asyncio.Event()

    async def answer(agent: FakeAgent, frame: Frame) -> None:
        if sum(len(f.payload) for f in agent.seen if f.type == FrameType.STDIN) == 262144:
            full.set()

    async with session(answer) as (connection, agent):
        command = await start_exec(connection, ["cat"])
        writing = asyncio.create_task(command.write_stdin(b"x" * 262145))
        await full.wait()
        assert not writing.done()
        agent.send(FrameType.CREDIT, 1, struct.pack("<I", 1))
        await writing
        await command.close()


async def test_a_lost_guest_fails_every_open_command() -> None:
    async def answer(agent: FakeAgent, frame: Frame) -> None:
        if len(agent.seen) == 2:
            agent.writer.close()

    async with session(answer) as (connection, _):
        commands = [await start_exec(connection, ["sleep"]) for _ in range(2)]
        for command in commands:
            with pytest.raises(GuestFailure, match="stream"):
                await command.wait()
        with pytest.raises(GuestFailure):
            connection.open_channel()


async def test_the_end_of_the_workload_is_heard() -> None:
    heard: asyncio.Queue[AgentHello] = asyncio.Queue()
    async with session(ignore, on_event=heard.put_nowait) as (connection, agent):
        ended = [*STATE[:2], ("workload", "exited"), ("exit_code", "3")]
        agent.send(FrameType.EVENT, 0, wire.text_list(ended))
        assert await heard.get() == AgentHello("b-1", "exited", 3)
        assert connection.hello.exit_code == 3


@pytest.mark.parametrize("path", ["/etc/passwd", "a/../../b", "..", "", "a//b", "x" * 300])
async def test_a_path_that_leaves_the_tree_is_refused(path: str) -> None:
    async def answer(agent: FakeAgent, frame: Frame) -> None:
        entry = [("path", path), ("type", "file"), ("mode", "644"), ("size", "0")]
        entry += [("mtime", "1"), ("uid", "0"), ("gid", "0")]
        agent.send(FrameType.ENTRY, frame.channel, wire.text_list(entry))

    async with session(answer) as (connection, _):
        with pytest.raises(GuestFailure, match="outside"):
            async for _ in files.read_path(connection, "/tree"):
                pass


async def test_a_session_with_bytes_that_nobody_takes_closes_at_once() -> None:
    ours, theirs = socket.socketpair()
    stream = await asyncio.open_connection(sock=ours)
    agent = FakeAgent(await asyncio.open_connection(sock=theirs))
    serving = asyncio.create_task(agent.serve(ignore))
    lost = asyncio.Event()
    connection = await AgentConnection.open(stream, deadline=10, on_loss=lost.set)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    agent.reader._transport.pause_reading()  # type: ignore[attr-defined]
    channel = connection.open_channel()
    sending = asyncio.create_task(channel.send_data(FrameType.DATA, bytes(1 << 20)))
    await asyncio.wait([sending], timeout=0.2)
    async with asyncio.timeout(10):
        await channel.close()
        assert not lost.is_set()
        await connection.close()
        await asyncio.gather(sending, return_exceptions=True)
    assert lost.is_set()
    agent.writer.close()


async def test_names_of_files_that_are_no_text_are_handed_back_as_they_are() -> None:
    entry = b"path\0\xff\0type\0file\0mode\x00644\0size\x000\0mtime\x001\0uid\x000\0gid\x000\0"

    async def answer(agent: FakeAgent, frame: Frame) -> None:
        agent.send(FrameType.ENTRY, frame.channel, entry)
        agent.send(FrameType.END, frame.channel)
        agent.send(FrameType.END, frame.channel)

    async with session(answer) as (connection, _):
        (found,) = [entry.path async for entry in files.read_path(connection, "/tree")]
    assert os.fsencode(found) == b"\xff"


LINK = [("path", "node_modules/p/index"), ("type", "link"), ("target", "../x"), ("mode", "777")]
LINK += [("size", "4"), ("mtime", "1"), ("uid", "0"), ("gid", "0")]


async def test_an_agent_that_sends_too_much_for_one_operation_fails_that_alone() -> None:
    """A tree of very many links, from an agent that lets them cost nothing, and a slow client."""
    closed = asyncio.Event()

    async def answer(agent: FakeAgent, frame: Frame) -> None:
        if frame.type == FrameType.CLOSE:
            closed.set()
        elif frame.type == FrameType.READ:
            entry = wire.encode(Frame(FrameType.ENTRY, frame.channel, wire.text_list(LINK)))
            pair = entry + wire.encode(Frame(FrameType.END, frame.channel, b""))
            for _ in range(2 * connections.MAX_UNREAD_BYTES // len(pair) // 1000):
                agent.writer.write(pair * 1000)
                await agent.writer.drain()

    async with session(answer) as (connection, agent):
        command = await start_exec(connection, ["long", "running"])
        entries = files.read_path(connection, "/tree")
        await anext(entries)
        async with asyncio.timeout(60):
            await closed.wait()
            with pytest.raises(GuestFailure, match="more than it was allowed to"):
                async for _ in entries:
                    pass
            agent.send(FrameType.EXIT, 1, struct.pack("<i", 0))
            assert await command.wait() == 0
        assert [f.type for f in agent.seen if f.channel == 2] == [FrameType.READ, FrameType.CLOSE]


@pytest.mark.parametrize("charges", [False, True])
async def test_credit_for_entries_is_granted_to_agents_that_charge_for_them(charges: bool) -> None:
    """Others would get more credit than they use, and send more of a file than is to be unread."""
    entry = Frame(FrameType.ENTRY, 1, wire.text_list(LINK))
    number = 2 * connections.GRANT_SIZE // len(wire.encode(entry))
    last = asyncio.Event()

    async def answer(agent: FakeAgent, frame: Frame) -> None:
        if frame.type == FrameType.SHUTDOWN:
            last.set()
        if frame.type == FrameType.READ:
            for _ in range(number):
                agent.send(FrameType.ENTRY, 1, entry.payload)
                agent.send(FrameType.END, 1)
            agent.send(FrameType.END, 1, b"final")

    state = [*STATE, ("charges", "entries")] if charges else STATE
    async with session(answer, state=state) as (connection, agent):
        async with asyncio.timeout(60):
            found = [entry.path async for entry in files.read_path(connection, "/tree")]
            await connection.send(Frame(FrameType.SHUTDOWN, 9, b""))  # behind all that was granted
            await last.wait()
    assert len(found) == number
    asked = ("charge", "entries") in wire.parse_text_list(agent.seen[0].payload)
    granted = sum(
        struct.unpack("<I", f.payload)[0] for f in agent.seen if f.type == FrameType.CREDIT
    )
    sent = number * len(wire.encode(entry) + bytes(wire.HEADER_SIZE))
    assert asked is charges
    assert sent - connections.GRANT_SIZE < granted <= sent if charges else granted == 0
