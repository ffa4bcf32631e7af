"""Faults of VMMs and of the host, of the catalogue (F26, F27, F30-F32, F36, F40), each by its id.

Of the others from F25 to F40, F25 and F39 are in test_engine.py, F29 in test_process.py, F35 in
test_schedule_clock.py, F37 in test_probes.py, F38 in test_moving.py; F28 is in the conformance
suite, where a loaded VM is asked whether it stands still. F33 and F34 have no place here: nothing
is taken from a pool of addresses, ports or context ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ForkRequest
from stillframe.host import process
from stillframe.host.capture import MemoryCapture
from stillframe.host.orphans import processes_naming
from stillframe.host.sockets import bind_unix
from stillframe.model.errors import HostFailure, StillframeError, VmmFailure
from stillframe.model.states import InstanceState
from stillframe.model.values import SnapshotKind
from stillframe.vmm.fake import driver as fake
from stillframe.vmm.firecracker import api as fire
from stillframe.vmm.qemu import qmp
from stillframe.vmm.qemu.qmp import QmpConnection
from stillframe.vmm.unix_http import Call, UnixHttp
from support.descriptors import few_descriptors
from support.engine import ask, running, traces

LIVE = SnapshotKind.STANDBY
GREETING = b'{"QMP": {"version": {"qemu": {"major": 9}}, "capabilities": []}}\r\n'
PIECE = 1 << 16
MUCH, FAR_TOO_MUCH = 32 << 20, 100 << 20


async def remembering(engine: Engine, name: str = "source") -> tuple[str, int]:
    """The id and pid of a Running instance that remembers its name."""
    instance = await running(engine, name)
    assert instance.process is not None
    await ask(engine, instance.id, "set", "who", name)
    return instance.id, instance.process.pid


# -- VMMs that hang, lie or die -------------------------------------------------------------------
async def test_f26_a_vmm_that_hangs_fails_its_snapshot_and_goes_on_when_it_wakes(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, pid = await remembering(engine)
    other, _ = await remembering(engine, "other")
    before = traces(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(fake, "_DEADLINE", 0.5)
        taking = asyncio.ensure_future(engine.snapshot(source, kind=LIVE))
        assert await ask(engine, other, "get", "who") == "other"  # nobody else waits for it
        with pytest.raises(VmmFailure, match="did not answer"):
            await taking
    assert sorted(traces(tmp_path)) == sorted(before)
    assert engine.context.records.intents == {}
    os.kill(pid, signal.SIGCONT)
    # It hears "pause" now: a guest that nobody told to go on would stand still for good.
    async with asyncio.timeout(60):
        assert await ask(engine, source, "get", "who") == "source"
    await engine.snapshot(source, kind=LIVE)


async def send(writer: asyncio.StreamWriter, answer: bytes) -> int:
    """Send until all is sent or nobody takes it any more; about how many bytes were taken."""
    sent = 0
    with contextlib.suppress(OSError):
        for start in range(0, len(answer), PIECE):
            writer.write(answer[start : start + PIECE])
            await writer.drain()
            sent += PIECE
    return sent


@contextlib.asynccontextmanager
async def qemu_that(answers: bytes | None) -> AsyncIterator[tuple[QmpConnection, list[int]]]:
    """A QMP conversation in which all that comes after the negotiation is ``answers``.

    None is silence. The list gets how many bytes of it were taken before the end.
    """
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    taken: list[int] = []

    async def serve() -> None:
        writer.write(GREETING)
        assert json.loads(await reader.read(PIECE))["execute"] == "qmp_capabilities"
        writer.write(b'{"return": {}}\r\n')
        await reader.read(PIECE)
        if answers is not None:
            taken.append(await send(writer, answers))
            writer.close()

    served = asyncio.create_task(serve())
    connection = QmpConnection("pid 1", lambda _: None)
    try:
        await connection.open(ours)
        yield connection, taken
    finally:
        await connection.close()
        await asyncio.wait([served])
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    "answer",
    [
        b'{"return": {"status": "runn',
        b"no JSON at all\r\n",
        b"[1, 2]\r\n",
        b"\xff\xfe\r\n",
        b"",
        b'{"id": "none of ours", "return": {}}\r\n',
        b"x" * FAR_TOO_MUCH,
    ],
    ids=["cut", "no JSON", "no object", "no text", "nothing", "a stranger's", "100 MB"],
)
async def test_f27_what_is_no_answer_of_qemu_is_an_error_and_takes_no_memory(
    answer: bytes,
) -> None:
    async with qemu_that(answer) as (connection, taken):
        async with asyncio.timeout(60):
            with pytest.raises(VmmFailure):
                await connection.execute("query-status")
    assert sum(taken) < MUCH  # the rest was never read


async def test_f26_a_qemu_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with qemu_that(None) as (connection, _):
        monkeypatch.setattr(qmp, "_COMMAND_DEADLINE", 0.3)
        with pytest.raises(VmmFailure, match="did not answer query-status"):
            await connection.execute("query-status")


@contextlib.asynccontextmanager
async def vmm_that(answers: bytes, path: Path) -> AsyncIterator[list[int]]:
    """An HTTP server at ``path`` whose every answer is ``answers``; how many bytes it got off."""
    sent: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        sent.append(await send(writer, answers))
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield sent
    finally:
        server.close()
        await server.wait_closed()


def http(body: bytes, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body


@pytest.mark.parametrize(
    "answer",
    [
        http(b'{"state": "Runn', length=40),
        http(b"no JSON at all"),
        http(b"\xff\xfe"),
        b"HTTP/1.1 2",
        b"",
        http(b"x" * FAR_TOO_MUCH),
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * FAR_TOO_MUCH,
    ],
    ids=["cut", "no JSON", "no text", "half a head", "nothing", "100 MB", "100 MB of head"],
)
async def test_f27_what_is_no_answer_of_a_vmm_with_http_is_an_error_and_takes_no_memory(
    tmp_path: Path, answer: bytes
) -> None:
    path = tmp_path / "api.sock"
    async with vmm_that(answer, path) as sent:
        talk = UnixHttp(path, "the VMM")
        try:
            async with asyncio.timeout(60):
                with pytest.raises(VmmFailure):
                    await talk.call(Call("GET", "/"))
        finally:
            await talk.close()
    assert sum(sent) < MUCH  # the rest was never read


async def test_f30_sockets_that_nobody_listens_at_hinder_no_start(engine: Engine) -> None:
    source, _ = await remembering(engine)
    await engine.standby(source)
    directory = engine.context.data.instance(source).directory
    for name in ("control.sock", "agent.sock"):
        bind_unix(directory / name).close()
    await engine.restore(source)
    assert await ask(engine, source, "get", "who") == "source"


def test_f31_no_vmm_waits_for_anybody_to_bring_it_its_memory() -> None:
    for version in ((1, 12, 0), (1, 16, 1)):
        body = fire.load_snapshot(version, "state", "memory", vsock_path="v").body or {}
        assert body["mem_backend"] == {"backend_type": "File", "backend_path": "memory"}


async def test_f32_of_many_forks_those_that_the_kernel_kills_leave_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel ends a process for want of memory by SIGKILL, whenever it likes."""
    source, _ = await remembering(engine)
    snapshot = await engine.snapshot(source, kind=LIVE)
    spawn, count = fake._spawn, iter(range(100))

    def killed(*arguments: Any) -> Any:
        started = spawn(*arguments)
        if next(count) % 2:
            os.kill(started.identity.pid, signal.SIGKILL)
        return started

    with monkeypatch.context() as patch:
        patch.setattr(fake, "_spawn", killed)
        requests = [ForkRequest(f"fork-{number}") for number in range(4)]
        outcomes = await engine.fork_many(snapshot.id, requests)
    alive = [outcome.instance for outcome in outcomes if outcome.instance is not None]
    assert len(alive) == 2
    assert {type(o.error) for o in outcomes if o.instance is None} == {VmmFailure}
    for fork in alive:
        assert await ask(engine, fork.id, "get", "who") == "source"
    kept = {source, *(fork.id for fork in alive)}
    assert {path.name for path in (tmp_path / "instances").iterdir()} == kept
    assert len([trace for trace in traces(tmp_path) if trace.startswith("pid")]) == 3
    assert {instance.id for instance in engine.list_instances()} == kept


# -- the host ------------------------------------------------------------------------------------
@pytest.mark.parametrize("spare", [1, 3, 6, 9])
async def test_f36_without_descriptors_a_fork_is_refused_and_leaves_nothing(
    engine: Engine, tmp_path: Path, spare: int
) -> None:
    source, _ = await remembering(engine)
    snapshot = await engine.snapshot(source, kind=LIVE)
    before = traces(tmp_path)
    refused = True
    with few_descriptors(spare):
        try:
            await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
        except StillframeError:
            pass
        else:
            refused = False
    if refused:
        assert sorted(traces(tmp_path)) == sorted(before)
        assert engine.context.records.intents == {}
        await engine.fork_snapshot(snapshot.id, ForkRequest("fork"))
    assert await ask(engine, engine.find_instance("fork").id, "get", "who") == "source"


async def test_f36_a_program_that_cannot_be_watched_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", none_left)
    with pytest.raises(HostFailure, match="Too many open files"):
        process.spawn(["sh", "-c", "sleep 600", str(tmp_path / "mark")], output=tmp_path / "log")
    assert processes_naming(tmp_path) == []


async def test_f36_without_processes_a_create_is_refused_and_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.context.images.ensure("stillframe/base")
    before = traces(tmp_path)

    def none_left(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", none_left)
        with pytest.raises(HostFailure, match="Resource temporarily unavailable"):
            await engine.create(CreateRequest("source", "stillframe/base"))
    assert traces(tmp_path) == before
    assert engine.context.records.intents == {}
    await running(engine)


# -- the guest -----------------------------------------------------------------------------------
@pytest.mark.parametrize("at", ["ahead", "still"])
async def test_f40_a_guest_that_reboots_or_dies_during_its_snapshot_fails_it(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """It reboots while it runs, and then boots again; in the pause only its VMM can end."""
    source, pid = await remembering(engine)
    loop = asyncio.get_running_loop()
    known: Callable[[MemoryCapture], object] = getattr(MemoryCapture, at)

    def ends(capture: MemoryCapture) -> object:
        if at == "ahead":
            with contextlib.suppress(StillframeError):
                asyncio.run_coroutine_threadsafe(ask(engine, source, "reboot"), loop).result(30)
        else:
            os.kill(pid, signal.SIGKILL)
        return known(capture)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryCapture, at, ends)
        with pytest.raises(HostFailure):
            await engine.snapshot(source, kind=LIVE)
    assert list((tmp_path / "snapshots").iterdir()) == []
    assert engine.context.records.intents == {}
    wanted = InstanceState.RUNNING if at == "ahead" else InstanceState.STOPPED
    async with asyncio.timeout(60):
        with engine.context.listening(source) as changed:
            while (found := engine.find_instance(source)).state is not wanted or (
                found.process is not None and found.process.pid == pid
            ):
                await changed.wait()
                changed.clear()
    if wanted is InstanceState.STOPPED:
        await engine.start(source)
    await engine.delete(source, graceful=False)
    assert traces(tmp_path) == []
