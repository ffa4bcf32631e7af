"""The guest agent inside the fake hypervisor: docs/agent-protocol.md, with builtin commands.

No asyncio and no dataclasses here: a fake guest must start within a few ten milliseconds.
"""

from __future__ import annotations

import re
import shlex
import struct
from collections.abc import Callable, Generator
from typing import Protocol

from stillframe.guest.wire import (
    INITIAL_CREDIT,
    Decoder,
    Frame,
    FrameType,
    encode,
    parse_text_list,
    text_list,
)
from stillframe.vmm.fake.files import FileTree

_GRANT = INITIAL_CREDIT // 4
_PIECE = 32768
_MAX_CHANNELS = 128
_MAX_QUEUED = 1 << 20
_VARIABLE = re.compile(r"\$(\w+)")

STDIN = "stdin"  # a command yields this to be sent bytes, b"" at the end of file
DRAINED = "drained"  # ... and this to be resumed when its output was taken
Wish = str | float  # a float: resume after so many seconds
Running = Generator[Wish, bytes, int]


class Guest(Protocol):
    """What the agent sees of its guest."""

    files: FileTree

    def clock(self) -> float:
        """Seconds the guest has run; stands still while it is paused."""

    def counter(self) -> int:
        """The counter in guest memory."""

    def random(self) -> str:
        """32 hex digits from the random state in guest memory."""

    def get(self, key: str) -> str | None:
        """A value kept in guest memory."""

    def set(self, key: str, value: str) -> None:
        """Keep a value in guest memory; OSError when it is full."""

    def hello(self) -> list[tuple[str, str]]:
        """The text list of HELLO_OK."""

    def identify(self, fields: dict[str, str]) -> None:
        """Become the guest that IDENTIFY describes."""

    def shut_down(self, reason: str, code: int) -> None:
        """End the workload with ``code``, then the VM."""


class Refused(Exception):
    """What becomes an ERROR frame: ``errno`` by name and a message."""

    def __init__(self, errno: str, message: str) -> None:
        super().__init__(message)
        self.errno = errno


class Shell:
    """Builtin commands as generators, which yield what they wait for and return an exit code."""

    def __init__(
        self, guest: Guest, out: Callable[[bytes], None], env: dict[str, str], cwd: str, tty: bool
    ) -> None:
        self._guest, self._out, self._env, self._cwd, self._tty = guest, out, env, cwd, tty

    def start(self, words: list[str]) -> Running:
        """The running command. Raises Refused (ENOENT) when there is none by that name."""
        name = words[0].rpartition("/")[2] if words[0].startswith(_BINARIES) else words[0]
        command = _COMMANDS.get(name)
        if command is None:
            raise Refused("ENOENT", f"{words[0]}: not found")
        return command(self, words[1:])

    def _print(self, text: str) -> None:
        self._out((text + "\n").encode("utf-8", "surrogateescape"))

    def _echo(self, words: list[str]) -> Running:
        self._print(" ".join(words))
        yield DRAINED
        return 0

    def _cat(self, words: list[str]) -> Running:
        for path in words:
            try:
                for data in self._guest.files.content(path):
                    self._out(data)
                    yield DRAINED
            except OSError as error:
                self._print(f"cat: {path}: {error.strerror}")
                return 1
        while not words and (data := (yield STDIN)):
            self._out(data)
            yield DRAINED
        return 0

    def _head(self, words: list[str]) -> Running:
        left = int(words[1])  # head -c N
        while left and (data := (yield STDIN)):
            self._out(data[:left])
            left -= min(left, len(data))
            yield DRAINED
        return 0

    def _sleep(self, words: list[str]) -> Running:
        yield float(words[0])
        return 0

    def _exit(self, words: list[str]) -> Running:
        yield 0.0
        return int(words[0]) & 255 if words else 0

    def _true(self, _: list[str]) -> Running:
        yield 0.0
        return 0

    def _false(self, _: list[str]) -> Running:
        yield 0.0
        return 1

    def _set(self, words: list[str]) -> Running:
        yield 0.0
        try:
            self._guest.set(words[0], " ".join(words[1:]))
        except OSError:
            return 1
        return 0

    def _get(self, words: list[str]) -> Running:
        value = self._guest.get(words[0])
        if value is None:
            return 1
        yield from self._echo([value])
        return 0

    def _write_out(self, words: list[str]) -> Running:
        """Print ``count`` bytes: flood COUNT."""
        left = int(words[0])
        while left:
            self._out(b"x" * min(left, _PIECE))
            left -= min(left, _PIECE)
            yield DRAINED
        return 0

    def _env_list(self, _: list[str]) -> Running:
        return (yield from self._echo(["\n".join(f"{k}={v}" for k, v in self._env.items())]))

    def _tty_name(self, _: list[str]) -> Running:
        yield from self._echo(["/dev/pts/0" if self._tty else "not a tty"])
        return 0 if self._tty else 1

    def _reboot(self, _: list[str]) -> Running:
        yield 0.0
        self._guest.shut_down("guest-reset", 0)
        return 0

    def _poweroff(self, _: list[str]) -> Running:
        yield 0.0
        self._guest.shut_down("guest-shutdown", 0)
        return 0

    def _sh(self, words: list[str]) -> Running:
        """``sh -c``: commands separated by ``;``, ``$NAME`` from the environment, quotes."""
        lexer = shlex.shlex(words[1], posix=False, punctuation_chars=";")
        lexer.whitespace_split = True
        code = 0
        parts: list[str] = []
        for token in [*lexer, ";"]:
            if token.strip(";"):
                parts.append(self._word(token))
                continue
            if parts and parts[0] == "exit":
                return int(parts[1]) & 255 if len(parts) > 1 else code
            if parts:
                try:
                    code = yield from self.start(parts)
                except Refused as error:
                    self._print(f"sh: {error}")
                    code = 127
            parts = []
        return code

    def _word(self, token: str) -> str:
        if token[0] == "'":
            return token.strip("'")
        return _VARIABLE.sub(lambda match: self._env.get(match[1], ""), token.strip('"'))


_BINARIES = ("/bin/", "/usr/bin/", "/sbin/", "/usr/sbin/")
_COMMANDS: dict[str, Callable[[Shell, list[str]], Running]] = {
    "cat": Shell._cat,
    "counter": lambda shell, _: shell._echo([str(shell._guest.counter())]),
    "echo": Shell._echo,
    "env": Shell._env_list,
    "exit": Shell._exit,
    "false": Shell._false,
    "flood": Shell._write_out,
    "get": Shell._get,
    "head": Shell._head,
    "hostname": lambda shell, _: shell._echo([shell._guest.get("hostname") or ""]),
    "poweroff": Shell._poweroff,
    "pwd": lambda shell, _: shell._echo([shell._cwd]),
    "random": lambda shell, _: shell._echo([shell._guest.random()]),
    "reboot": Shell._reboot,
    "set": Shell._set,
    "sh": Shell._sh,
    "sleep": Shell._sleep,
    "true": Shell._true,
    "tty": Shell._tty_name,
}


class Channel:
    """One operation: a command, a READ or a WRITE, driven by the agent."""

    def __init__(self, agent: Agent, number: int, answer: FrameType) -> None:
        self._agent, self._number, self._answer = agent, number, answer
        self._credit = INITIAL_CREDIT
        self._backlog = bytearray()
        self._input: list[bytes] = []
        self._eof = False
        self._consumed = 0
        self._running: Running | None = None
        self._wish: Wish = 0.0
        self._wake = 0.0
        self.deadline: float | None = None

    def run(self, running: Running) -> None:
        """Begin; the first step is taken by the next ``step``."""
        self._running = running
        self._wake = 0.0
        self._wish = -1.0

    def out(self, data: bytes) -> None:
        """Bytes for the host, as far as there is credit; the rest waits."""
        self._backlog += data
        self._flush()

    def frame(self, kind: FrameType, payload: bytes = b"") -> None:
        """A frame without credit."""
        self._agent.send(Frame(kind, self._number, payload))

    def grant(self, size: int) -> None:
        """The host takes ``size`` more bytes."""
        self._credit += size
        self._flush()

    def feed(self, data: bytes) -> None:
        """Bytes from the host: empty is end of file."""
        if data:
            self._input.append(data)
        else:
            self._eof = True

    def step(self) -> bool:
        """Run on as far as possible. True when the operation has ended."""
        now = self._agent.guest.clock()
        if self.deadline is not None and now >= self.deadline:
            return self.end(124)
        for _ in range(64):  # then others have their turn
            value = self._ready(now)
            if value is None or self._running is None:
                return False
            try:
                # A generator takes None first; any answer it ignores may be bytes.
                wish = next(self._running) if self._wish != STDIN else self._running.send(value)
            except StopIteration as stop:
                return self.end(stop.value)
            except Refused as error:
                return self.refuse(error.errno, str(error))
            except OSError as error:
                return self.refuse(_errno_name(error), error.strerror or "failed")
            except (ValueError, IndexError):
                return self.end(2)  # as shells do for a wrong usage
            self._wish = wish
            if isinstance(wish, float):
                self._wake = now + wish
        return False

    def end(self, code: int) -> bool:
        """EXIT, after what output there is credit for."""
        self._flush()
        if self._running is not None:
            self._running.close()
        if self._answer == FrameType.EXIT:
            self.frame(FrameType.EXIT, struct.pack("<i", code))
        return True

    def refuse(self, errno: str, message: str) -> bool:
        """ERROR ends the channel."""
        self.frame(FrameType.ERROR, text_list([("errno", errno), ("message", message)]))
        return True

    def _ready(self, now: float) -> bytes | None:
        """The answer to what the operation waits for; None: not yet."""
        if isinstance(self._wish, float):
            return b"" if now >= self._wake else None
        if self._wish == DRAINED:
            return b"" if not self._backlog and not self._agent.congested else None
        if self._input:
            data = self._input.pop(0)
            self._consumed += len(data)
            if self._consumed >= _GRANT:
                self.frame(FrameType.CREDIT, struct.pack("<I", self._consumed))
                self._consumed = 0
            return data
        return b"" if self._eof else None

    def _flush(self) -> None:
        kind = FrameType.DATA if self._answer == FrameType.END else FrameType.STDOUT
        while self._backlog and self._credit:
            size = min(len(self._backlog), self._credit, _PIECE)
            self._credit -= size
            self.frame(kind, bytes(self._backlog[:size]))
            del self._backlog[:size]


class Agent:
    """Frames in, frames out; ``outgoing`` is what the stream has still to take."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.outgoing = bytearray()
        self._decoder = Decoder()
        self._channels: dict[int, Channel] = {}
        self._greeted = False

    @property
    def congested(self) -> bool:
        """Whether the host is slow to read."""
        return len(self.outgoing) > _MAX_QUEUED

    def reset(self) -> None:
        """The host is gone: forget its session."""
        self.outgoing.clear()
        self._decoder = Decoder()
        self._channels.clear()
        self._greeted = False

    def send(self, frame: Frame) -> None:
        """Queue a frame."""
        self.outgoing += encode(frame)

    def event(self) -> None:
        """Tell the host of the workload, if there is a host."""
        if self._greeted:
            self.send(Frame(FrameType.EVENT, 0, text_list(self.guest.hello())))

    def step(self) -> None:
        """Let every operation run on."""
        for number, channel in list(self._channels.items()):
            if channel.step():
                self._channels.pop(number, None)

    def feed(self, data: bytes) -> None:
        """Bytes from the host."""
        for frame in self._decoder.feed(data):
            try:
                self._handle(frame)
            except Refused as error:
                Channel(self, frame.channel, FrameType.OK).refuse(error.errno, str(error))
            except OSError as error:
                words = error.strerror or "failed"
                Channel(self, frame.channel, FrameType.OK).refuse(_errno_name(error), words)
            except (ValueError, KeyError, struct.error):
                Channel(self, frame.channel, FrameType.OK).refuse("EINVAL", "malformed request")

    def _handle(self, frame: Frame) -> None:
        if frame.type == FrameType.HELLO:
            self.outgoing.clear()
            self._channels.clear()
            self._greeted = True
            answer = frame.payload[:16] + text_list(self.guest.hello())
            self.send(Frame(FrameType.HELLO_OK, 0, answer))
        elif (channel := self._channels.get(frame.channel)) is not None:
            self._continue(channel, frame)
        elif frame.type in _REQUESTS:
            if len(self._channels) >= _MAX_CHANNELS:
                raise Refused("EMFILE", "too many channels")
            _REQUESTS[FrameType(frame.type)](self, frame.channel, frame.payload)

    def _continue(self, channel: Channel, frame: Frame) -> None:
        if frame.type == FrameType.CREDIT:
            channel.grant(struct.unpack("<I", frame.payload)[0])
        elif frame.type in (FrameType.STDIN, FrameType.DATA):
            channel.feed(frame.payload)
        elif frame.type == FrameType.END:
            channel.feed(b"")
        elif frame.type == FrameType.SIGNAL:
            channel.end(128 + struct.unpack("<I", frame.payload)[0])
            self._channels.pop(frame.channel)
        elif frame.type == FrameType.CLOSE:
            self._channels.pop(frame.channel)

    def _open(self, number: int, answer: FrameType) -> Channel:
        channel = self._channels[number] = Channel(self, number, answer)
        return channel

    def _exec(self, number: int, payload: bytes) -> None:
        pairs = parse_text_list(payload)
        fields = dict(pairs)
        words = [value for key, value in pairs if key == "arg"]
        if not words:
            raise Refused("EINVAL", "no command")
        env = {"PATH": "/usr/bin:/bin", "HOME": "/root"}
        stored = self.guest.get("env") or ""
        given = [value for key, value in pairs if key == "env"]
        env.update(entry.partition("=")[::2] for entry in [*stored.split("\0"), *given] if entry)
        cwd = fields.get("cwd") or self.guest.get("cwd") or "/"
        channel = Channel(self, number, FrameType.EXIT)
        shell = Shell(self.guest, channel.out, env, cwd, fields.get("tty") == "1")
        channel.run(shell.start(words))
        if seconds := float(fields.get("timeout", "0")):
            channel.deadline = self.guest.clock() + seconds
        self._channels[number] = channel

    def _stat(self, number: int, payload: bytes) -> None:
        fields = dict(parse_text_list(payload))
        found = self.guest.files.stat(fields["path"], follow=fields.get("follow") == "1")
        self._ok(number, [("exists", "1" if found else "0"), *found.items()])

    def _read(self, number: int, payload: bytes) -> None:
        fields = dict(parse_text_list(payload))
        follow = fields.get("follow") == "1"
        channel = self._open(number, FrameType.END)
        channel.run(self._reading(channel, fields["path"], follow))

    def _reading(self, channel: Channel, path: str, follow: bool) -> Running:
        for name, inner in self.guest.files.walk(path, follow=follow):
            fields = self.guest.files.stat(inner, follow=follow)
            fields["path"] = name
            channel.frame(FrameType.ENTRY, text_list(fields.items()))
            if fields["type"] == "file":
                for data in self.guest.files.content(inner):
                    channel.out(data)
                    yield DRAINED
            channel.frame(FrameType.END)
            yield DRAINED
        channel.frame(FrameType.END, b"final")
        return 0

    def _write(self, number: int, payload: bytes) -> None:
        fields = dict(parse_text_list(payload))
        channel = self._open(number, FrameType.OK)
        channel.run(self._writing(number, fields))

    def _writing(self, number: int, fields: dict[str, str]) -> Running:
        writer = self.guest.files.begin(
            fields["path"],
            kind=fields.get("kind", "file"),
            mode=int(fields["mode"], 8) if "mode" in fields else None,
            uid=int(fields.get("uid", "0")),
            gid=int(fields.get("gid", "0")),
        )
        while data := (yield STDIN):
            writer.add(data)
        writer.finish()
        self._ok(number, [("bytes", str(writer.size))])
        return 0

    def _identify(self, number: int, payload: bytes) -> None:
        self.guest.identify(dict(parse_text_list(payload)))
        self._ok(number, self.guest.hello())

    def _shutdown(self, number: int, _: bytes) -> None:
        self._ok(number, [])
        self.guest.shut_down("guest-shutdown", 143)

    def _ok(self, number: int, pairs: list[tuple[str, str]]) -> None:
        self.send(Frame(FrameType.OK, number, text_list(pairs)))


_REQUESTS: dict[FrameType, Callable[[Agent, int, bytes], None]] = {
    FrameType.EXEC: Agent._exec,
    FrameType.STAT: Agent._stat,
    FrameType.READ: Agent._read,
    FrameType.WRITE: Agent._write,
    FrameType.IDENTIFY: Agent._identify,
    FrameType.SHUTDOWN: Agent._shutdown,
}


def _errno_name(error: OSError) -> str:
    import errno

    return errno.errorcode.get(error.errno or 0, "EIO")
