"""A server on the fake hypervisor that may be killed, and what must be true of it at any time."""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
import stat
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypeman import Hypeman

from crash.injection import Injector
from crash.nursery import NurseryServer
from stillframe.host.orphans import kill_orphans
from stillframe.model.errors import DamagedData
from stillframe.store.paths import DataDirectory
from stillframe.store.payloads import check
from stillframe.store.verification import Depth
from support.contract import mint
from support.payloads import verified
from support.server import run_in

SLACK = 1 << 20  # bytes of disk that may differ: journals and logs
_ENVIRONMENT = {
    "STILLFRAME_DEFAULT_HYPERVISOR": "fake",
    "STILLFRAME_LOG_LEVEL": "warning",
}
VM = {"image": "stillframe/base", "size": "64MB", "overlay_size": "16MB", "vcpus": 1}
# What may lie in the directory of an instance, by whether it has a VMM.
_AT_REST = {"overlay.raw", "config.raw", "logs"}
_MARKED = {*_AT_REST, ".unidentified"}  # until a fork has an identity of its own
_ASLEEP = {*_MARKED, "standby"}
_AWAKE = {*_MARKED, "memory", "memory.blake3", "control.sock", "agent.sock", "devices"}


# What may lie in the data directory itself.
_ROOT = {"stillframe.db", "stillframe.db-wal", "stillframe.db-shm", "lock", "jwt-secret",
         "server.json", "system", "images", "templates", "instances", "snapshots", "expanded",
         "cache"}  # fmt: skip


class Violation(AssertionError):
    """Something that must hold after a fault does not."""


class World:
    """The server, requests to it that a fault may cut off, and the oracle."""

    def __init__(self, directory: Path, **environment: str) -> None:
        self.data_dir = directory / "data"
        self.injector = Injector(directory, self.data_dir)
        self.server = NurseryServer(
            self.data_dir, {**_ENVIRONMENT, **self.injector.environment, **environment}
        )
        self.data = DataDirectory(self.data_dir)
        self.starts: list[float] = []  # seconds that each took; the first loaded the program
        self._sdk: Hypeman | None = None
        self._numbers = 0

    # -- the server ---------------------------------------------------------------------------
    def start(self) -> None:
        """Start the server; it must be ready soon."""
        began = time.monotonic()
        self.server.start()
        self.starts.append(time.monotonic() - began)
        if self._sdk is None:
            self._sdk = Hypeman(api_key=self._token(), timeout=60, max_retries=0)
        self._sdk.base_url = self.server.url

    def restart(self) -> None:
        """Start it again after a kill -9, which it may have got already."""
        self.server.stop(9)
        self.start()

    def _token(self) -> str:
        return mint(self.data_dir)

    def close(self) -> None:
        """End the server and every VM."""
        with contextlib.ExitStack() as ends:
            ends.callback(self.injector.close)
            ends.callback(kill_orphans, self.data.instances, ())
            ends.callback(self.server.close)
            if self._sdk is not None:
                ends.callback(self._sdk.close)

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON of an answer; status 0 when the server died over it."""
        text = None if body is None else json.dumps(body).encode()
        status, content = self.transfer(method, path, text, "application/json")
        return status, json.loads(content) if content else None

    def transfer(
        self, method: str, path: str, sent: bytes | None, kind: str = "application/octet-stream"
    ) -> tuple[int, bytes]:
        """``request`` with bytes both ways; ``kind`` is the media type of what is sent."""
        address = urllib.parse.urlsplit(self.server.url).netloc
        connection = http.client.HTTPConnection(address, timeout=60)
        headers = {
            "Authorization": f"Bearer {self._token()}",
            "Content-Type": kind,
        }
        try:
            connection.request(method, path, sent, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (ConnectionError, http.client.HTTPException):
            return 0, b""
        except TimeoutError as error:
            raise Violation(f"{method} {path}: no answer") from error
        finally:
            connection.close()
        return answer.status, content

    def must(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of an answer that must be a success."""
        status, answer = self.request(method, path, body)
        if not 200 <= status < 300:
            raise Violation(f"{method} {path} answered {status}: {answer}")
        return answer

    # -- what there is ------------------------------------------------------------------------
    def fresh(self, stem: str) -> str:
        """A name that nobody has."""
        self._numbers += 1
        return f"{stem}-{self._numbers}"

    def instance(self, name: str) -> Any:
        """The instance of that name, or None."""
        return next((i for i in self.must("GET", "/instances") if i["name"] == name), None)

    def snapshot_named(self, name: str) -> Any:
        """The snapshot of that name, or None."""
        return next((s for s in self.must("GET", "/snapshots") if s.get("name") == name), None)

    def boot(self, name: str, nonce: str, image: str = "stillframe/base") -> str:
        """A Running instance with ``nonce`` in its memory; its id."""
        wish = {"name": name, **VM, "image": image}
        identifier: str = self.must("POST", "/instances", wish)["id"]
        self.reach(identifier, "Running")
        self.remember(identifier, nonce)
        return identifier

    def reach(self, identifier: str, state: str) -> None:
        """Wait for a state."""
        answer = self.must("GET", f"/instances/{identifier}/wait?state={state}&timeout=60s")
        if answer["state"] != state:
            raise Violation(f"instance {identifier} is {answer['state']} instead of {state}")

    def delete(self, name: str) -> None:
        """Delete the instance of that name, if there is one."""
        if (found := self.instance(name)) is not None:
            self.must("DELETE", f"/instances/{found['id']}?graceful_shutdown=false")

    def delete_snapshot(self, name: str) -> None:
        """Delete the snapshot of that name, if there is one."""
        if (found := self.snapshot_named(name)) is not None:
            self.must("DELETE", f"/snapshots/{found['id']}")

    # -- guests -------------------------------------------------------------------------------
    def ask(self, identifier: str, *command: str) -> str:
        """What a command in the guest prints."""
        assert self._sdk is not None
        try:
            return run_in(self._sdk, identifier, *command).strip()
        except Exception as error:
            raise Violation(f"{command} in {identifier}: {error!r}") from error

    def remember(self, identifier: str, nonce: str) -> None:
        """Keep a nonce in the guest's memory."""
        self.ask(identifier, "set", "nonce", nonce)

    def expect(self, identifier: str, state: str, nonce: str = "") -> None:
        """The instance is in ``state``; if it runs, ``nonce`` is in its memory and it goes on."""
        answer = self.must("GET", f"/instances/{identifier}")
        if answer["state"] != state:
            raise Violation(
                f"{answer['name']} is {answer['state']} ({answer.get('state_error')}) "
                f"instead of {state}"
            )
        if state == "Running":
            self.expect_running(identifier, nonce)

    def expect_running(self, identifier: str, nonce: str) -> None:
        """The guest has the nonce in its memory, and counts."""
        found = self.ask(identifier, "get", "nonce")
        if found != nonce:
            raise Violation(f"the memory of {identifier} holds {found!r} instead of {nonce!r}")
        deadline = time.monotonic() + 10
        before = self.ask(identifier, "counter")
        while self.ask(identifier, "counter") == before:
            if time.monotonic() > deadline:
                raise Violation(f"the guest {identifier} stands still")

    # -- the oracle ---------------------------------------------------------------------------
    def used_bytes(self) -> int:
        """Bytes on disk of all files below the data directory, also deleted ones still open."""
        files = {}
        for path in self.data_dir.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                kept = path.parent.name != "logs" and path.parent != self.data_dir
                if stat.S_ISREG(status.st_mode) and kept:  # there: records and their journals
                    files[status.st_ino] = status.st_blocks * 512
        for status in self._deleted_but_open():
            files[status.st_ino] = status.st_blocks * 512
        return sum(files.values())

    def _deleted_but_open(self) -> Iterator[Any]:
        pids = self.server.vmm_pids()
        pids.append(self.server.pid)
        for pid in pids:
            with contextlib.suppress(FileNotFoundError):
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        target = str(link.readlink())
                        if target.startswith(str(self.data_dir)) and target.endswith(" (deleted)"):
                            yield link.stat()

    def check_everything(self) -> None:
        """What must be true of a server that nobody asks anything. Raises Violation."""
        deadline = time.monotonic() + 10  # a schedule may begin by itself what was missed
        while True:
            instances = {i["id"]: i for i in self.must("GET", "/instances")}
            snapshots = {s["id"] for s in self.must("GET", "/snapshots")}
            try:
                self._same("instance directories", self._names(self.data.instances), set(instances))
                self._same("snapshot directories", self._names(self.data.snapshots), snapshots)
                break
            except Violation:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._check_directories()
        for snapshot_id in snapshots:
            self.check_snapshot(snapshot_id)
        awake = {i for i, one in instances.items() if one["state"] in ("Running", "Initializing")}
        for identifier, one in instances.items():
            asleep = one["state"] == "Standby"
            allowed = _AWAKE if identifier in awake else _ASLEEP if asleep else _AT_REST
            found = self._names(self.data.instances / identifier)
            if extra := found - allowed:
                raise Violation(f"{one['name']} ({one['state']}) has {sorted(extra)} left over")
            if asleep:
                check(self.data.instance(identifier).standby)
        self._check_processes(len(awake))
        if intents := self.intents():
            raise Violation(f"intents are left: {intents}")

    def _check_directories(self) -> None:
        """Nothing half-made or unused lies where the server makes what it shares."""
        if extra := self._names(self.data_dir) - _ROOT:
            raise Violation(f"the data directory has {sorted(extra)} left over")
        deadline = time.monotonic() + 10  # large files are removed beside other work
        for directory in (self.data.images, self.data.templates, self.data.expanded):
            while extra := {name for name in self._names(directory) if name.startswith(".")}:
                if time.monotonic() > deadline:
                    raise Violation(f"{directory.name} has {sorted(extra)} left over")
                time.sleep(0.01)
        digests = {i["digest"].removeprefix("sha256:") for i in self.must("GET", "/images")}
        self._same("images", self._names(self.data.images), digests)
        for path in self.data.expanded.iterdir():
            if path.stat().st_nlink == 1:
                raise Violation(f"nobody has the expanded image {path.name}")

    def check_snapshot(self, snapshot_id: str) -> None:
        """The snapshot is whole, to the last byte."""
        payload = self.data.snapshot(snapshot_id)
        try:
            check(payload)
        except DamagedData as error:
            raise Violation(f"snapshot {snapshot_id}: {error}") from error
        result = verified(payload, Depth.FULL)
        if result.damage:
            raise Violation(f"snapshot {snapshot_id} is damaged: {result.damage[:3]}")
        allowed = {"manifest.json", "memory.blake3", "devices", "overlay.raw",
                   "overlay.raw.blake3"}  # fmt: skip
        state = self.must("GET", f"/snapshots/{snapshot_id}").get("compression_state", "none")
        if state == "compressing":  # both may be there, and one that is half-made
            return
        allowed.add("memory.zst" if state == "compressed" else "memory")
        if extra := self._names(payload.directory) - allowed:
            raise Violation(f"snapshot {snapshot_id} has {sorted(extra)} left over")

    def _check_processes(self, wanted: int) -> None:
        deadline = time.monotonic() + 10  # a killed process takes a moment to go
        while len(pids := self.server.vmm_pids()) != wanted:
            if time.monotonic() > deadline:
                raise Violation(f"{len(pids)} VMMs run instead of {wanted}")
            time.sleep(0.01)

    def quiet(self) -> None:
        """Wait until no instance is in the making, or in the undoing."""
        deadline = time.monotonic() + 60
        while self.intents():
            if time.monotonic() > deadline:
                raise Violation(f"intents stay: {self.intents()}")
            time.sleep(0.01)

    def intents(self) -> list[Any]:
        """The journal, as it is on disk."""
        uri = f"file:{self.data.database}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            return list(database.execute("SELECT subject, verb, document FROM intents"))

    @staticmethod
    def _names(directory: Path) -> set[str]:
        return {path.name for path in directory.iterdir()}

    @staticmethod
    def _same(what: str, found: set[str], wanted: set[str]) -> None:
        if found != wanted:
            raise Violation(
                f"{what}: left over {sorted(found - wanted)}, missing {sorted(wanted - found)}"
            )


@contextlib.contextmanager
def running_world(directory: Path, **environment: str) -> Iterator[World]:
    """A world whose server runs; nothing of it is left afterwards."""
    world = World(directory, **environment)
    try:
        world.start()
        yield world
    finally:
        world.close()
