"""An engine that only remembers, and an app over it: for tests of the HTTP layer alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import jwt
import uvicorn
from fastapi import FastAPI

from stillframe.api.app import create_app
from stillframe.api.server import bind, serving
from stillframe.engine.interface import (
    CreateRequest,
    EngineInterface,
    ExecRequest,
    ForkOutcome,
    ForkRequest,
    ReadEntry,
    WaitResult,
    WarmStatus,
)
from stillframe.model.errors import NotFound, StillframeError
from stillframe.model.schedules import Schedule
from stillframe.model.states import InstanceState
from stillframe.model.values import (
    Hypervisor,
    Image,
    ImageStatus,
    Instance,
    PathInfo,
    Snapshot,
    SnapshotKind,
)
from stillframe.vmm.driver import DriverProbe
from support.keeping_double import DoubleArchive, KeepingDouble

SECRET = b"an-unguessable-secret-of-64-bytes" * 2
PRIVATE = Path("/srv/private-data")
MADE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def token(secret: bytes = SECRET, algorithm: str = "HS256", **claims: object) -> str:
    """A token that is good unless ``claims`` spoil it; a claim of None is left out."""
    every = {"sub": "tester", "iat": int(time.time()), "exp": int(time.time()) + 600, **claims}
    kept = {key: value for key, value in every.items() if value is not None}
    return jwt.encode(kept, secret, algorithm=algorithm)


def bearer(**claims: object) -> dict[str, str]:
    """The header for such a token."""
    return {"Authorization": f"Bearer {token(**claims)}"}  # type: ignore[arg-type]


def instance(name: str = "web", **changes: Any) -> Instance:
    """A Running instance whose id follows from its name."""
    made = Instance(
        id=(name.replace("-", "") + "x" * 24)[:24],
        name=name,
        image="docker.io/library/alpine:latest",
        image_digest="sha256:" + "a" * 64,
        state=InstanceState.RUNNING,
        created_at=MADE,
        hypervisor=Hypervisor.FAKE,
        memory_bytes=1024**3,
        overlay_bytes=10 * 1024**3,
        vcpus=2,
    )
    return replace(made, **changes)


def snapshot(source: Instance, **changes: Any) -> Snapshot:
    """A Standby snapshot of ``source``."""
    made = Snapshot(
        id="s" * 24,
        kind=SnapshotKind.STANDBY,
        source_instance_id=source.id,
        source_instance_name=source.name,
        source_hypervisor=source.hypervisor,
        created_at=MADE,
        size_bytes=4096,
        template=source,
        stored_bytes=1024,
        pause_ms=12.5,
        timings_ms={"pause": 12.5},
    )
    return replace(made, **changes)


def image(name: str = "docker.io/library/alpine:latest") -> Image:
    """A ready image."""
    return Image(name, "sha256:" + "a" * 64, ImageStatus.READY, MADE, size_bytes=1)


class DoubleSession:
    """A command that echoes stdin in capitals; end of file, or ``exit N`` on a line, ends it."""

    def __init__(self) -> None:
        self.closed = Event()
        self.sizes: list[tuple[int, int]] = []
        self.code = 0
        self._output: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        while (data := await self._output.get()) is not None:
            yield 1, data

    async def write_stdin(self, data: bytes) -> None:
        if data.startswith(b"exit "):
            self.code, data = int(data[5:]), b""
        await self._output.put(data.upper() or None)

    async def resize(self, rows: int, cols: int) -> None:
        self.sizes.append((rows, cols))
        await self._output.put(f"{rows}x{cols}".encode())

    async def signal(self, number: int) -> None:
        raise NotImplementedError

    async def wait(self) -> int:
        return self.code

    async def close(self) -> None:
        self.closed.set()


@dataclass
class DoubleEngine(KeepingDouble):
    """Answers from what the test put in; ``calls`` is what was asked of it.

    An error in ``failures`` under a method's name is raised by that method, one in
    ``failed_forks`` under a fork's name is the outcome of that fork.
    """

    instances: list[Instance] = field(default_factory=lambda: [instance()])
    snapshots: list[Snapshot] = field(default_factory=list)
    images: list[Image] = field(default_factory=lambda: [image()])
    schedules: dict[str, Schedule] = field(default_factory=dict)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    failures: dict[str, BaseException] = field(default_factory=dict)
    failed_forks: dict[str, StillframeError] = field(default_factory=dict)
    warm: WarmStatus = field(default_factory=lambda: WarmStatus(target=0, ready=0))
    lines: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    entries: list[ReadEntry] = field(default_factory=list)
    sessions: list[DoubleSession] = field(default_factory=list)
    probes: list[DriverProbe] = field(default_factory=list)
    archives: list[DoubleArchive] = field(default_factory=list)
    logs_closed: Event = field(default_factory=Event)

    def _note(self, name: str, /, *arguments: Any, **keywords: Any) -> None:
        self.calls.append((name, arguments, keywords))
        if name in self.failures:
            raise self.failures[name]

    def last(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the latest call of a method."""
        _, arguments, keywords = next(c for c in reversed(self.calls) if c[0] == name)
        return arguments, keywords

    def find_instance(self, reference: str) -> Instance:
        self._note("find_instance", reference)
        for known in self.instances:
            if reference in (known.id, known.name):
                return known
        raise NotFound("resource not found")

    def find_snapshot(self, reference: str) -> Snapshot:
        self._note("find_snapshot", reference)
        for known in self.snapshots:
            if reference == known.id:
                return known
        raise NotFound("resource not found")

    def find_image(self, reference: str) -> Image:
        self._note("find_image", reference)
        for known in self.images:
            if reference in (known.name, known.digest):
                return known
        raise NotFound("resource not found")

    def list_instances(self, **filters: Any) -> list[Instance]:
        self._note("list_instances", **filters)
        return self.instances

    def list_snapshots(self, **filters: Any) -> list[Snapshot]:
        self._note("list_snapshots", **filters)
        return self.snapshots

    def list_images(self, **filters: Any) -> list[Image]:
        self._note("list_images", **filters)
        return self.images

    async def create(self, request: CreateRequest) -> Instance:
        self._note("create", request)
        return instance(request.name, state=InstanceState.INITIALIZING)

    def logs(self, instance_id: str, **options: Any) -> AsyncIterator[str]:
        return self._lines(instance_id, **options)

    async def _lines(self, instance_id: str, **options: Any) -> AsyncIterator[str]:
        self._note("logs", instance_id, **options)
        try:
            for line in self.lines:
                yield line
            if options["follow"]:
                await asyncio.Event().wait()
        finally:
            self.logs_closed.set()

    async def wait(
        self, instance_id: str, *, state: InstanceState, timeout: timedelta
    ) -> WaitResult:
        self._note("wait", instance_id, state=state, timeout=timeout)
        return WaitResult(state, timed_out=False)

    async def exec(self, instance_id: str, request: ExecRequest) -> DoubleSession:
        self._note("exec", instance_id, request)
        self.sessions.append(DoubleSession())
        return self.sessions[-1]

    async def stat(self, instance_id: str, path: str, *, follow: bool) -> PathInfo:
        self._note("stat", instance_id, path, follow=follow)
        return PathInfo(path in self.files, is_file=True, mode=0o644, size=3)

    async def write_path(
        self, instance_id: str, path: str, data: AsyncIterator[bytes] | None, **options: Any
    ) -> int:
        self._note("write_path", instance_id, path, data is None, **options)
        self.files[path] = b"".join([chunk async for chunk in data]) if data else b""
        return len(self.files[path])

    async def read_path(
        self, instance_id: str, path: str, *, follow: bool
    ) -> AsyncIterator[ReadEntry]:
        self._note("read_path", instance_id, path, follow=follow)
        for entry in self.entries:
            yield entry

    async def snapshot(self, instance_id: str, **options: Any) -> Snapshot:
        self._note("snapshot", instance_id, **options)
        made = snapshot(self.find_instance(instance_id), name=options["name"], kind=options["kind"])
        self.snapshots.append(made)
        return made

    async def fork_snapshot(self, snapshot_id: str, request: ForkRequest) -> Instance:
        self._note("fork_snapshot", snapshot_id, request)
        return instance(request.name, state=request.target_state or InstanceState.RUNNING)

    async def fork_many(
        self, snapshot_id: str, requests: Sequence[ForkRequest]
    ) -> list[ForkOutcome]:
        self._note("fork_many", snapshot_id, requests)
        return [
            ForkOutcome(request.name, error=error)
            if (error := self.failed_forks.get(request.name))
            else ForkOutcome(request.name, await self.fork_snapshot(snapshot_id, request))
            for request in requests
        ]

    def warm_status(self, snapshot_id: str) -> WarmStatus:
        self._note("warm_status", snapshot_id)
        return self.warm

    async def set_warm(self, snapshot_id: str, count: int) -> WarmStatus:
        self._note("set_warm", snapshot_id, count)
        self.warm = replace(self.warm, target=count, filling=max(0, count - self.warm.ready))
        return self.warm

    def metrics(self) -> bytes:
        self._note("metrics")
        return b"# TYPE stillframe_snapshots gauge\nstillframe_snapshots 1.0\n"

    async def pull_image(self, name: str, **options: Any) -> Image:
        self._note("pull_image", name, **options)
        return image(name)

    def tag_image(self, reference: str, target: str) -> Image:
        self._note("tag_image", reference, target)
        return replace(self.find_image(reference), name=target)

    async def import_image(
        self, name: str, source: Path, *, tags: Mapping[str, str] | None = None
    ) -> Image:
        self._note("import_image", name, source, source.read_bytes(), tags=tags)
        return image(name)

    async def probe_drivers(self) -> list[DriverProbe]:
        self._note("probe_drivers")
        return self.probes

    def __getattr__(self, name: str) -> Any:
        """Every other verb: noted, and answered with the first instance."""
        if name.startswith("_"):
            raise AttributeError(name)

        async def verb(*arguments: Any, **keywords: Any) -> Any:
            self._note(name, *arguments, **keywords)
            return None if name.startswith("delete") else self.instances[0]

        return verb


def app_over(engine: DoubleEngine, **options: Any) -> FastAPI:
    """The real app over the double."""
    return create_app(
        cast(EngineInterface, engine),
        jwt_secret=SECRET,
        version="9.9",
        private_paths=[PRIVATE],
        **options,
    )


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app on a loopback port, in a thread of its own; yields the base URL."""
    listener = bind("127.0.0.1:0")
    server = uvicorn.Server(serving(app))
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
