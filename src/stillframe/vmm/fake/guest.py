"""The process of the fake hypervisor: guest memory, a clock, a workload, a control socket.

Started by ``fake.py`` with one JSON argument. Everything a fork must continue from lies in the
privately mapped memory image, so a capture of this process's pages is a capture of its guest:

    0 magic   8 counter (u64)   16 uptime (f64)   24 workload's wake time (f64)
    64 random state (64 bytes)  4096 u32 length and JSON: keys, names, nonce, workload

Commands in flight are not in memory; a loaded workload sleeps what it had left, then ends with 0.
Pydantic and asyncio stay out of here, for the process must start in a few ten milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import selectors
import socket
import struct
import sys
import time
import uuid
from typing import Any

from stillframe.vmm.fake.agent import STDIN, Agent, Refused, Running, Shell
from stillframe.vmm.fake.files import FileTree

FORMAT = "stillframe-fake-1"
TICK = 0.005  # seconds between counts
_MAGIC = b"FAKEMEM1"
_COUNTER, _UPTIME, _WAKE, _RANDOM, _STATE = 8, 16, 24, 64, 4096
_STATE_LIMIT = 1 << 20
_CONFIG_MAGIC = b"STILLFRAME-CFG1\n"
_MAX_REQUEST = 1 << 16


class Damaged(Exception):
    """Device state or memory that this VM cannot be loaded from."""


class Memory:
    """Guest memory, mapped MAP_PRIVATE: the image file never changes."""

    def __init__(self, path: str, size: int) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != size:
                raise Damaged("the memory image has another size than the VM")
            self._map = mmap.mmap(
                descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        finally:
            os.close(descriptor)
        self.state: dict[str, str] = {}

    def format(self) -> None:
        """Cold boot: a new random state, everything else empty."""
        self._map[:8] = _MAGIC
        self._map[_RANDOM : _RANDOM + 64] = os.urandom(64)

    def load(self) -> None:
        """Go on with what the image holds. Raises Damaged."""
        if self._map[:8] != _MAGIC:
            raise Damaged("the memory image holds no fake guest")
        (length,) = struct.unpack_from("<I", self._map, _STATE)
        try:
            self.state = json.loads(self._map[_STATE + 4 : _STATE + 4 + length])
        except ValueError as error:
            raise Damaged("guest memory is damaged") from error

    def keep(self, **changes: str) -> None:
        """Store strings. Raises OSError (ENOMEM) and changes nothing when they do not fit."""
        state = {**self.state, **changes}
        body = json.dumps(state).encode()
        if len(body) > _STATE_LIMIT:
            raise OSError(12, os.strerror(12))
        struct.pack_into(f"<I{len(body)}s", self._map, _STATE, len(body), body)
        self.state = state

    def number(self, offset: int, kind: str) -> Any:
        """The number at ``offset`` (struct's letter)."""
        return struct.unpack_from(f"<{kind}", self._map, offset)[0]

    def put(self, offset: int, kind: str, value: float) -> None:
        """Write a number."""
        struct.pack_into(f"<{kind}", self._map, offset, value)

    def stir(self, seed: bytes) -> bytes:
        """Mix ``seed`` into the random state; 16 bytes that follow from it."""
        new = hashlib.blake2b(self._map[_RANDOM : _RANDOM + 64] + seed).digest()
        self._map[_RANDOM : _RANDOM + 64] = new
        return hashlib.blake2b(new, digest_size=16, person=b"output").digest()


class Guest:
    """What runs in the VM. Implements ``agent.Guest``."""

    def __init__(self, memory: Memory, disks: list[list[Any]], console: str) -> None:
        self._memory = memory
        overlay = next((path for path, readonly in disks if not readonly), None)
        self.files = FileTree(overlay)
        self._console = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._base = 0.0
        self._since: float | None = None
        self._workload: Running | None = None
        self._wish: object = 0.0
        self.ending: tuple[str, int] | None = None
        self.agent = Agent(self)

    def boot(self, pairs: list[tuple[str, str]]) -> None:
        """Cold boot with the pairs of the config disk."""
        fields = dict(pairs)
        self._memory.format()
        names = ("hostname", "machine_id", "instance_id", "nonce", "cwd")
        self._memory.keep(
            boot_id=str(uuid.uuid4()),
            env="\0".join(value for key, value in pairs if key == "env"),
            **{name: fields.get(name, "") for name in names},
        )
        self._memory.stir(fields.get("seed", "").encode())
        self._since = time.monotonic()
        self._say(f"STILLFRAME-PROGRAM-START nonce={fields.get('nonce', '')}")
        self._say(f"STILLFRAME-AGENT-READY nonce={fields.get('nonce', '')}")
        words = [value for key, value in pairs if key == "arg"]
        self._workload = self._start(words) if words else None

    def load(self) -> None:
        """Stand still as the memory image says. Raises Damaged."""
        self._memory.load()
        self._base = self._memory.number(_UPTIME, "d")
        self._workload = self._sleep_on() if self._memory.number(_WAKE, "d") else None

    def _sleep_on(self) -> Running:
        yield max(0.0, self._memory.number(_WAKE, "d") - self.clock())
        return 0

    def _start(self, words: list[str]) -> Running:
        env = dict(
            entry.partition("=")[::2] for entry in self._memory.state["env"].split("\0") if entry
        )
        cwd = self._memory.state["cwd"] or "/"
        shell = Shell(self, lambda data: _write(self._console, data), env, cwd, False)
        try:
            return (yield from shell.start(words))
        except Refused as error:
            self._say(str(error))
            return 127

    # -- time ---------------------------------------------------------------------------------
    @property
    def paused(self) -> bool:
        """Whether the guest stands still."""
        return self._since is None

    def clock(self) -> float:
        """Seconds the guest has run."""
        return self._base + (0.0 if self._since is None else time.monotonic() - self._since)

    def pause(self) -> None:
        """Stop the clock; nothing in memory changes from now on."""
        self._base, self._since = self.clock(), None
        self._memory.put(_UPTIME, "d", self._base)

    def resume(self) -> None:
        """Let the clock run."""
        if self._since is None:
            self._since = time.monotonic()

    def tick(self) -> None:
        """Count, and let workload and commands run on."""
        self._memory.put(_COUNTER, "Q", self.counter() + 1)
        self._memory.put(_UPTIME, "d", self.clock())
        self._run_workload()
        self.agent.step()

    def _run_workload(self) -> None:
        while self._workload is not None and self.ending is None:
            if isinstance(self._wish, float) and self.clock() < self._memory.number(_WAKE, "d"):
                return
            try:
                # The workload's stdin is at its end.
                wish = self._workload.send(b"") if self._wish == STDIN else next(self._workload)
            except StopIteration as stop:
                self._workload = None
                self._memory.put(_WAKE, "d", 0.0)
                self.shut_down("guest-shutdown", stop.value)
                return
            except (ValueError, IndexError):
                self.shut_down("guest-shutdown", 2)
                return
            self._wish = wish
            if isinstance(wish, float):
                self._memory.put(_WAKE, "d", max(self.clock() + wish, 1e-9))

    # -- what the agent asks ------------------------------------------------------------------
    def counter(self) -> int:
        """Ticks since the cold boot of the first ancestor."""
        return int(self._memory.number(_COUNTER, "Q"))

    def random(self) -> str:
        """32 hex digits; equal in two forks until they are identified."""
        return self._memory.stir(b"").hex()

    def get(self, key: str) -> str | None:
        """A value from guest memory."""
        return self._memory.state.get(key)

    def set(self, key: str, value: str) -> None:
        """Keep a value in guest memory."""
        self._memory.keep(**{key: value})

    def hello(self) -> list[tuple[str, str]]:
        """The state as HELLO_OK tells it."""
        pairs = [("version", "1"), ("boot_id", self._memory.state["boot_id"])]
        if self.ending is not None:
            return [*pairs, ("workload", "exited"), ("exit_code", str(self.ending[1]))]
        return [*pairs, ("workload", "running")]

    def identify(self, fields: dict[str, str]) -> None:
        """New entropy and names. Raises ValueError, KeyError for a bad request."""
        seed = bytes.fromhex(fields["seed"])
        if not 32 <= len(seed) <= 64:
            raise ValueError("seed")
        self._memory.stir(seed)
        names = ("hostname", "machine_id", "instance_id")
        self._memory.keep(**{name: fields[name] for name in names if fields.get(name)})

    def shut_down(self, reason: str, code: int) -> None:
        """The guest ends; the process follows when its last words are said."""
        if self.ending is not None:
            return
        self.ending = (reason, code)
        if reason == "guest-shutdown":
            message = f"killed by signal {code - 128}" if code > 128 else ""
            nonce = self._memory.state["nonce"]
            self._say(f'STILLFRAME-EXIT nonce={nonce} code={code} message="{message}"')
        self.agent.event()

    def _say(self, line: str) -> None:
        _write(self._console, f"{line}\n".encode())


class Vm:
    """The loop: control clients, one agent client, the clock."""

    def __init__(self, spec: dict[str, Any], guest: Guest, control_fd: int, agent_fd: int) -> None:
        self._spec, self._guest = spec, guest
        self._selector = selectors.DefaultSelector()
        self._control = socket.socket(fileno=control_fd)
        self._agent = socket.socket(fileno=agent_fd)
        self._clients: dict[socket.socket, bytearray] = {}
        self._host: socket.socket | None = None
        self._selector.register(self._control, selectors.EVENT_READ)
        self._watch()

    def run(self) -> None:
        """Until the guest has ended."""
        following = time.monotonic()
        while self._guest.ending is None:
            left = None if self._guest.paused else max(0.0, following - time.monotonic())
            for key, _ in self._selector.select(left):
                self._serve(key.fileobj)
            if not self._guest.paused:
                if time.monotonic() >= following:
                    self._guest.tick()
                    following = time.monotonic() + TICK
                else:
                    self._guest.agent.step()
            self._watch()
        self._last_words()

    def _serve(self, ready: Any) -> None:
        if ready is self._control:
            client, _ = self._control.accept()
            self._clients[client] = bytearray()
            self._selector.register(client, selectors.EVENT_READ)
        elif ready is self._agent:
            self._host, _ = self._agent.accept()
            self._host.setblocking(False)
        elif ready in self._clients:
            self._hear(ready)
        elif not self._guest.paused:
            self._exchange()

    def _watch(self) -> None:
        """Listen to the agent's side only while the guest runs, and write only what is queued."""
        wanted: dict[socket.socket, int] = {}
        if not self._guest.paused:
            if self._host is None:
                wanted[self._agent] = selectors.EVENT_READ
            else:
                events = 0 if self._guest.agent.congested else selectors.EVENT_READ
                events |= selectors.EVENT_WRITE if self._guest.agent.outgoing else 0
                wanted[self._host] = events
        kept = {self._control, *self._clients}
        for key in list(self._selector.get_map().values()):
            if key.fileobj not in kept and key.fileobj not in wanted:
                self._selector.unregister(key.fileobj)
        for sock, events in wanted.items():
            if sock not in self._selector.get_map():
                self._selector.register(sock, events)
            else:
                self._selector.modify(sock, events)

    def _exchange(self) -> None:
        if self._host is None:
            return
        agent = self._guest.agent
        try:
            if agent.outgoing:
                del agent.outgoing[: self._host.send(agent.outgoing)]
            data = self._host.recv(1 << 17)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            agent.feed(data)
            return
        self._selector.unregister(self._host)
        self._host.close()
        self._host = None
        agent.reset()

    def _hear(self, client: socket.socket) -> None:
        buffer = self._clients[client]
        try:
            data = client.recv(4096)
            buffer += data
            if data and len(buffer) <= _MAX_REQUEST:
                while (end := buffer.find(b"\n")) >= 0:
                    line = bytes(buffer[:end])
                    del buffer[: end + 1]
                    client.sendall(_numbered(line, self._answer(line)))
                return
        except OSError:
            pass  # the server went away: the guest runs on
        self._selector.unregister(client)
        del self._clients[client]
        client.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            match request["command"]:
                case "pause":
                    self._guest.pause()
                case "resume":
                    self._guest.resume()
                case "power":
                    self._guest.shut_down("guest-shutdown", 143)
                case "save":
                    self._save(request["path"])
                case "status":
                    pass
                case unknown:
                    return {"error": f"unknown command {unknown!r}"}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"malformed request: {error}"}
        except (OSError, Refused) as error:
            return {"error": str(error)}
        return {"status": "paused" if self._guest.paused else "running"}

    def _save(self, path: str) -> None:
        if not self._guest.paused:
            raise Refused("EBUSY", "the guest is running")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"format": FORMAT, "spec": self._spec}, file)

    def _last_words(self) -> None:
        """Tell every client why, within a second: then the process may go."""
        if self._host is not None:
            self._send_last(self._host, bytes(self._guest.agent.outgoing))
        if self._guest.ending is not None:
            event = {"event": "shutdown", "reason": self._guest.ending[0]}
            for client in self._clients:
                self._send_last(client, json.dumps(event).encode() + b"\n")

    def _send_last(self, sock: socket.socket, data: bytes) -> None:
        try:
            sock.settimeout(1)
            sock.sendall(data)
        except OSError:
            pass


def read_config(disks: list[list[Any]]) -> list[tuple[str, str]]:
    """The pairs of the third disk (docs/agent-protocol.md); none without a config disk."""
    if len(disks) < 3:
        return []
    from stillframe.guest.wire import parse_text_list

    with open(disks[2][0], "rb") as file:  # noqa: PTH123 - pathlib is slow to import
        if file.read(16) != _CONFIG_MAGIC:
            raise Damaged("the config disk is damaged")
        (length,) = struct.unpack("<I", file.read(4))
        return parse_text_list(file.read(length))


def check_devices(path: str, spec: dict[str, Any]) -> None:
    """Raises Damaged unless the file is device state of a VM of this very spec."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            state = json.loads(file.read(_MAX_REQUEST))
        found, saved = state["format"], state["spec"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged("the device state is damaged") from error
    if found != FORMAT:
        raise Damaged(f"the device state has the format {found}, not {FORMAT}")
    if saved != spec:
        raise Damaged("the device state is of a VM with other memory, vCPUs or devices")


def _numbered(line: bytes, answer: dict[str, Any]) -> bytes:
    """The answer with its request's number, as a line."""
    try:
        answer["id"] = json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        answer["id"] = None
    return json.dumps(answer).encode() + b"\n"


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def main(arguments: dict[str, Any]) -> int:
    """Run a VM to its end; 0 when the guest ended, 1 with a line on stderr if it cannot start."""
    spec = arguments["spec"]
    try:
        if arguments["devices"] is not None:
            check_devices(arguments["devices"], spec)
        memory = Memory(arguments["memory"], spec["memory_bytes"])
        guest = Guest(memory, arguments["disks"], arguments["console"])
        if arguments["devices"] is not None:
            guest.load()
        else:
            guest.boot(read_config(arguments["disks"]))
    except (Damaged, OSError, ValueError) as error:
        print(f"fake: {error}", file=sys.stderr)
        return 1
    Vm(spec, guest, arguments["control_fd"], arguments["agent_fd"]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
