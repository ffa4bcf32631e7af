"""One session with a guest agent: greeting, channels, credit both ways, bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Self

from stillframe.guest import wire
from stillframe.guest.wire import Frame, FrameType
from stillframe.model.errors import GuestFailure

NONCE_SIZE = 16
AGENT_SAYS = "guest agent: "  # before the words of an agent
HELLO_INTERVAL = 0.5  # seconds between greetings while nobody answers
READ_SIZE = 65536
# Grant credit in pieces of this size, not per frame.
GRANT_SIZE = wire.INITIAL_CREDIT // 4
_DATA_TYPES = (FrameType.STDOUT, FrameType.STDERR, FrameType.DATA)
_ENTRY_TYPES = (FrameType.ENTRY, FrameType.END)  # charged whole, by agents that do
# What a channel may hold unread, headers included: far more than credit allows. Only an agent that
# does not charge for entries gets here in honesty, with a tree of many and a slow reader.
MAX_UNREAD_BYTES = 8 * 1024 * 1024

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class AgentHello:
    """What the agent says of its guest. ``workload`` is starting, running or exited.

    ``charges_entries``: when asked to, it lets the frames of a copied tree cost credit.
    """

    boot_id: str
    workload: str
    exit_code: int | None = None
    charges_entries: bool = False


EventCallback = Callable[[AgentHello], None]


def parse_hello(payload: bytes) -> AgentHello:
    """The text list of HELLO_OK and EVENT. Raises GuestFailure when it is malformed."""
    fields = parse_fields(payload)
    try:
        code = int(fields["exit_code"]) if "exit_code" in fields else None
        charges = fields.get("charges") == "entries"
        return AgentHello(fields["boot_id"][:64], fields["workload"][:16], code, charges)
    except (KeyError, ValueError) as error:
        raise GuestFailure("the guest agent's greeting is malformed") from error


def parse_fields(payload: bytes) -> dict[str, str]:
    """A text list as a dict (last value wins). Raises GuestFailure when it is malformed.

    The values are ``wire.printable``, for they end in records and answers.
    """
    return {key: wire.printable(value) for key, value in parse_names(payload).items()}


def parse_names(payload: bytes) -> dict[str, str]:
    """``parse_fields`` with names of files as they are, to be handed back: bytes are escaped."""
    try:
        return dict(wire.parse_text_list(payload))
    except ValueError as error:
        raise GuestFailure(f"the guest agent's answer is malformed: {error}") from error


def silent(seconds: float) -> GuestFailure:
    """The error for an agent that has not answered within that time."""
    return GuestFailure(
        f"the guest agent did not answer within {seconds:g} s",
        hint="look at the instance's app log: the guest may still boot or have crashed",
    )


class Channel:
    """One operation's frames. Made by ``AgentConnection.open_channel``; close it in the end."""

    def __init__(self, connection: AgentConnection, number: int) -> None:
        self.number = number
        self.charges_entries = connection.hello.charges_entries
        self._connection = connection
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._unread = 0
        self._consumed = 0
        self._credit = wire.INITIAL_CREDIT
        self._credit_changed = asyncio.Event()
        self._ended = False
        self._failure: GuestFailure | None = None

    async def receive(self) -> Frame:
        """Next frame. Raises GuestFailure: ERROR from the agent, or the connection was lost."""
        frame = await self._frames.get()
        if frame is None:
            self._frames.put_nowait(None)  # for whoever asks next
            raise self._failure or self._connection.failure()
        self._unread -= len(frame.payload) + wire.HEADER_SIZE
        if frame.type == FrameType.ERROR:
            self._ended = True
            fields = parse_fields(frame.payload)
            raise GuestFailure(
                f"{AGENT_SAYS}{fields.get('message', 'failed')[:400]}",
                errno=fields.get("errno", "EUNKNOWN")[:32],
            )
        if frame.type in _DATA_TYPES:
            await self._consume(len(frame.payload))
        elif self.charges_entries and frame.type in _ENTRY_TYPES:
            await self._consume(wire.HEADER_SIZE + len(frame.payload))
        return frame

    async def expect(self, *types: FrameType) -> Frame:
        """Next frame, which must be of one of ``types``. Raises GuestFailure otherwise."""
        frame = await self.receive()
        if frame.type not in types:
            raise GuestFailure("the guest agent answered out of turn", frame_type=frame.type)
        return frame

    async def send(self, kind: FrameType, payload: bytes = b"") -> None:
        """Send a frame that needs no credit. Raises GuestFailure when the connection is lost."""
        await self._connection.send(Frame(kind, self.number, payload))

    async def send_data(self, kind: FrameType, data: bytes) -> None:
        """Send bytes as frames, waiting for the guest's credit. Raises GuestFailure."""
        view = memoryview(data)
        while view:
            while self._credit == 0 and not self._ended and self._connection.alive:
                self._credit_changed.clear()
                await self._credit_changed.wait()
            if self._ended:
                return
            size = min(len(view), self._credit, wire.MAX_PAYLOAD)
            self._credit -= size
            await self.send(kind, bytes(view[:size]))
            view = view[size:]

    def end(self) -> None:
        """The operation is over on the guest's side: nobody need wait for credit any more."""
        self._ended = True
        self._credit_changed.set()

    async def close(self) -> None:
        """Forget the channel; tells the guest when the operation is still under way. Idempotent."""
        self._connection.forget(self)
        if not self._ended:
            self.end()
            self._connection.post(Frame(FrameType.CLOSE, self.number, b""))

    async def _consume(self, size: int) -> None:
        self._consumed += size
        if self._consumed >= GRANT_SIZE:
            grant, self._consumed = self._consumed, 0
            await self.send(FrameType.CREDIT, struct.pack("<I", grant))

    def deliver(self, frame: Frame | None) -> None:
        """From the connection's reader: a frame, or None when the connection is lost.

        Raises GuestFailure when the guest sends more than it may: the channel can only ``fail``.
        """
        if frame is None:
            self._frames.put_nowait(None)
            self._credit_changed.set()
            return
        if frame.type == FrameType.CREDIT:
            if len(frame.payload) == 4:
                self._credit += struct.unpack("<I", frame.payload)[0]
                self._credit_changed.set()
            return
        if frame.type in (FrameType.ERROR, FrameType.EXIT, FrameType.OK):
            self.end()
        self._unread += len(frame.payload) + wire.HEADER_SIZE
        if self._unread > MAX_UNREAD_BYTES:
            raise GuestFailure(
                "the guest agent sends more than it was allowed to",
                hint="if this was a copy of very many files, copy a part of them at a time, or "
                "have them packed in the guest: its agent may be of an older version",
            )
        self._frames.put_nowait(frame)

    def fail(self, failure: GuestFailure) -> None:
        """End this operation alone; whoever reads gets ``failure`` after what has arrived."""
        self._failure = failure
        self._connection.forget(self)
        self.deliver(None)
        if not self._ended:
            self.end()
            self._connection.post(Frame(FrameType.CLOSE, self.number, b""))


class AgentConnection:
    """A greeted agent. Use ``open``; every channel fails with GuestFailure when it is lost."""

    def __init__(
        self,
        stream: Stream,
        hello: AgentHello,
        on_event: EventCallback | None,
        on_loss: Callable[[], None] | None,
    ) -> None:
        self._reader, self._writer = stream
        self._hello = hello
        self._on_event = on_event
        self._on_loss = on_loss
        self._channels: dict[int, Channel] = {}
        self._next = 0
        self._failure: GuestFailure | None = None
        self._pump: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        stream: Stream,
        *,
        deadline: float,
        on_event: EventCallback | None = None,
        on_loss: Callable[[], None] | None = None,
    ) -> Self:
        """Greet the agent within ``deadline`` seconds; the stream is ours, and closed on failure.

        ``on_event`` is called with the new state when the workload starts or ends, ``on_loss``
        when the session has ended, for whatever reason. Raises GuestFailure (code
        ``guest_agent_error``) when nobody answers or the stream breaks.
        """
        reader, writer = stream
        try:
            async with asyncio.timeout(deadline):
                hello, decoder = await _greet(reader, writer)
        except TimeoutError as error:
            writer.transport.abort()
            raise silent(deadline) from error
        except BaseException:
            writer.transport.abort()
            raise
        connection = cls(stream, hello, on_event, on_loss)
        connection._pump = asyncio.create_task(connection._read(decoder))
        return connection

    @property
    def hello(self) -> AgentHello:
        """The guest's state as last heard (greeting or event)."""
        return self._hello

    @property
    def alive(self) -> bool:
        """Whether the stream is still good."""
        return self._failure is None

    def failure(self) -> GuestFailure:
        """Why the connection is lost, as a fresh error to raise."""
        if self._failure is None:
            return GuestFailure("the guest agent is gone")
        return GuestFailure(self._failure.message, hint=self._failure.hint)

    @contextlib.asynccontextmanager
    async def answering(self, seconds: float) -> AsyncIterator[None]:
        """Give the agent that long for the block, which asks for what it can answer at once.

        One that does not has lost us: the session ends, and whoever connects next greets anew.
        Raises GuestFailure.
        """
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            self._lose(silent(seconds))
            raise self.failure() from error

    def open_channel(self) -> Channel:
        """A channel with a number never used before. Raises GuestFailure when lost."""
        if self._failure:
            raise self.failure()
        self._next += 1
        channel = self._channels[self._next] = Channel(self, self._next)
        return channel

    def forget(self, channel: Channel) -> None:
        """Drop what still arrives for this channel."""
        self._channels.pop(channel.number, None)

    def post(self, frame: Frame) -> None:
        """Write a small frame without waiting for a guest that may take nothing any more."""
        if self.alive:
            self._writer.write(wire.encode(frame))

    async def send(self, frame: Frame) -> None:
        """Write a frame and wait until the stream takes more. Raises GuestFailure when lost."""
        if self._failure:
            raise self.failure()
        try:
            self._writer.write(wire.encode(frame))
            await self._writer.drain()
        except OSError as error:
            self._lose(GuestFailure(f"the guest agent's stream broke: {error}"))
            raise self.failure() from error
        except ValueError as error:
            raise GuestFailure("the request is too large for the guest agent") from error

    async def close(self, why: str | None = None) -> None:
        """End the session and the stream; open channels fail, and say ``why``. Idempotent.

        What the guest has not taken yet is dropped: it may never take it.
        """
        reason = "the connection to the guest agent was closed"
        self._lose(GuestFailure(f"{reason}: {why}" if why else reason))
        if self._pump:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self, decoder: wire.Decoder) -> None:
        try:
            for frame in decoder.feed(b""):
                self._dispatch(frame)
            while data := await self._reader.read(READ_SIZE):
                for frame in decoder.feed(data):
                    self._dispatch(frame)
            self._lose(GuestFailure("the guest agent's stream ended"))
        except OSError as error:
            self._lose(GuestFailure(f"the guest agent's stream broke: {error}"))
        except GuestFailure as error:
            self._lose(error)

    def _dispatch(self, frame: Frame) -> None:
        if frame.channel:
            channel = self._channels.get(frame.channel)
            if channel:
                try:
                    channel.deliver(frame)
                except GuestFailure as error:  # its own affair: the others' commands go on
                    channel.fail(error)
        elif frame.type == FrameType.EVENT:
            self._hello = parse_hello(frame.payload)
            if self._on_event:
                self._on_event(self._hello)

    def _lose(self, failure: GuestFailure) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        for channel in list(self._channels.values()):
            channel.deliver(None)
        # The guest's end takes one host at a time: the next one must not queue behind us.
        self._writer.transport.abort()
        if self._on_loss:
            self._on_loss()


async def _greet(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[AgentHello, wire.Decoder]:
    """Send HELLO until answered. What comes first may be half a frame of an earlier session, in
    which a decoder could lose its way: so the answer is looked for by its nonce."""
    buffer, nonces = bytearray(), list[bytes]()
    receiving = asyncio.ensure_future(reader.read(READ_SIZE))
    try:
        while True:
            nonces.append(secrets.token_bytes(NONCE_SIZE))
            writer.write(wire.encode(Frame(FrameType.HELLO, 0, nonces[-1])))
            await writer.drain()
            loop = asyncio.get_running_loop()
            until = loop.time() + HELLO_INTERVAL
            while (left := until - loop.time()) > 0:
                done, _ = await asyncio.wait({receiving}, timeout=left)
                if not done:
                    break
                if not (data := receiving.result()):
                    raise GuestFailure("the guest agent's stream ended")
                buffer += data
                if answer := _find_answer(buffer, nonces):
                    return answer
                receiving = asyncio.ensure_future(reader.read(READ_SIZE))
    except OSError as error:
        raise GuestFailure(f"the guest agent's stream broke: {error}") from error
    finally:
        if not receiving.done():
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)


def _find_answer(buffer: bytearray, nonces: list[bytes]) -> tuple[AgentHello, wire.Decoder] | None:
    """The HELLO_OK in the buffer with one of our nonces, and a decoder holding what follows it."""
    for nonce in nonces:
        at = buffer.find(nonce) - wire.HEADER_SIZE
        if at < 0:
            continue
        frames = wire.Decoder().feed(bytes(buffer[at:]))
        if frames and frames[0].type == FrameType.HELLO_OK and frames[0].payload[:16] == nonce:
            rest = wire.Decoder()
            rest.prime(bytes(buffer[at + wire.HEADER_SIZE + len(frames[0].payload) :]))
            return parse_hello(frames[0].payload[NONCE_SIZE:]), rest
    limit = 2 * (wire.HEADER_SIZE + wire.MAX_PAYLOAD)
    if len(buffer) > limit:  # an answer never is that long: forget what lies before
        del buffer[: len(buffer) - limit]
    return None
