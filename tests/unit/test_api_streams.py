"""exec, cp and logs over a real socket: frames, errors, and clients that go."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypeman import Hypeman
from hypeman.lib.cp import CopyProtocolError, cp_from_instance, cp_to_instance
from hypeman.lib.exec import exec as sdk_exec
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from stillframe.api.routes import exec as routes
from stillframe.api.server import bind
from stillframe.cli.client import Client
from stillframe.engine.interface import ReadEntry
from stillframe.model.errors import GuestFailure, NotFound
from stillframe.model.states import InstanceState
from support.api_double import (
    DoubleEngine,
    DoubleSession,
    app_over,
    bearer,
    instance,
    served,
    token,
)


@pytest.fixture
def engine() -> DoubleEngine:
    return DoubleEngine()


@pytest.fixture
def url(engine: DoubleEngine) -> Iterator[str]:
    with served(app_over(engine)) as url:
        yield url


@pytest.fixture
def sdk(url: str) -> Iterator[Hypeman]:
    with Hypeman(api_key=token(), base_url=url) as sdk:
        yield sdk


def dial(url: str, path: str) -> ClientConnection:
    address = url.replace("http", "ws") + path
    return connect(address, additional_headers=bearer(), open_timeout=10)


async def _bytes(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def _entry(path: str, kind: str, data: bytes = b"", target: str | None = None) -> ReadEntry:
    mode = 0o4755 if kind == "file" else 0o755
    return ReadEntry(path, mode, kind, target, len(data), 1_700_000_000, 0, 0, _bytes(data))


def test_the_sdk_runs_a_command(sdk: Hypeman, engine: DoubleEngine) -> None:
    result = sdk_exec(
        sdk, "web", ["cat"], env={"A": "1"}, cwd="/tmp", stdin=iter([b"hi", b"exit 7"])
    )
    assert (result.output, result.exit_code) == (b"HI", 7)
    request = engine.last("exec")[0][1]
    assert (request.command, request.env, request.cwd) == (("cat",), {"A": "1"}, "/tmp")
    assert engine.sessions[0].closed.is_set()


def test_resizes_reach_a_terminal_in_order(sdk: Hypeman) -> None:
    result = sdk_exec(
        sdk, "web", ["sh"], tty=True, rows=24, cols=80, resize=[(30, 100)], stdin=b"exit 0"
    )
    assert result.exit_code == 0


def test_frames_are_exactly_the_contracts(url: str) -> None:
    with dial(url, "/instances/web/exec") as stream:
        stream.send(json.dumps({"tty": True}))
        stream.send(json.dumps({"resize": {"rows": 30, "cols": 100}}))
        assert stream.recv(10) == b"30x100"
        stream.send('{"text": "is stdin"}')
        assert stream.recv(10) == b'{"TEXT": "IS STDIN"}'
        stream.send(b"x" * 100_000)
        assert len(stream.recv(10)) == 32 * 1024
        for _ in range(3):
            stream.recv(10)
        stream.send(b"")
        assert stream.recv(10) == '{"exitCode":0}'


@pytest.mark.parametrize("tty", [True, False])
def test_a_size_that_no_terminal_has_is_dropped_and_never_typed(url: str, tty: bool) -> None:
    with dial(url, "/instances/web/exec") as stream:
        stream.send(json.dumps({"tty": tty}))
        for size in (
            {"rows": 0, "cols": 80},
            {"rows": 24, "cols": 65536},
            {"rows": "24", "cols": 80},
            {"rows": True, "cols": 80},
            {"rows": 24},
            {},
        ):
            stream.send(json.dumps({"resize": size}))
        stream.send(json.dumps({"resize": {"rows": 30, "cols": 100, "x": 1}, "width": 640}))
        stream.send('{"resize": "is stdin"}')
        if tty:
            assert stream.recv(10) == b"30x100"
        assert stream.recv(10) == b'{"RESIZE": "IS STDIN"}'


def test_the_sdk_sends_all_of_stdin_in_one_message(sdk: Hypeman) -> None:
    result = sdk_exec(sdk, "web", ["cat"], stdin=iter([b"x" * (3 << 20), b"exit 0"]))
    assert (result.output, result.exit_code) == (b"X" * (3 << 20), 0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings of both libraries, where nothing is said of them, at once instead of after 20 s."""
    hasty_client = partial(connect, ping_interval=0.1, ping_timeout=0.1)
    monkeypatch.setattr("websockets.sync.client.connect", hasty_client)
    hasty_server = partial(uvicorn.Config, ws_ping_interval=0.1, ws_ping_timeout=0.1)
    monkeypatch.setattr(uvicorn, "Config", hasty_server)


def test_a_command_that_does_not_take_its_stdin_is_not_cut_off(
    impatient: None, sdk: Hypeman, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much waits as the server takes, so that it reads no answer to a ping either."""
    write_stdin = DoubleSession.write_stdin

    async def busy_at_first(session: DoubleSession, data: bytes) -> None:
        monkeypatch.setattr(DoubleSession, "write_stdin", write_stdin)
        await asyncio.sleep(0.8)
        await write_stdin(session, data)

    answering: Any = partial(connect, ping_interval=None)
    monkeypatch.setattr(DoubleSession, "write_stdin", busy_at_first)
    stdin = [b"x" * (1 << 20)] * 6
    result = sdk_exec(sdk, "web", ["cat"], stdin=iter([*stdin, b"exit 7"]), connector=answering)
    assert (len(result.output), result.exit_code) == (6 << 20, 7)


def test_a_client_that_does_not_take_output_is_not_cut_off(impatient: None, url: str) -> None:
    """``stillframe exec … | less``: the answer to a ping would wait behind the output."""
    with Client(url=url, token=token()).websocket("/instances/web/exec") as stream:
        stream.send(json.dumps({"command": ["cat"]}))
        for _ in range(8):
            stream.send(b"x" * (1 << 20))
        stream.send(b"exit 7")
        time.sleep(0.8)  # a person reads the first page
        frames = list(iter(lambda: stream.recv(10), '{"exitCode":7}'))
    assert sum(map(len, frames)) == 8 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="names of Linux")
def test_the_kernel_finds_peers_that_are_gone() -> None:
    with bind("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, probes = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
    assert idle + interval * probes <= 600  # the kernel's own: more than two hours


@pytest.mark.parametrize(
    "first", ["nonsense", "[]", '{"command":"ls"}', '{"timeout":-1}', '{"command":["a\\u0000"]}']
)
def test_a_bad_first_frame_is_an_error_frame(url: str, engine: DoubleEngine, first: str) -> None:
    with dial(url, "/instances/web/exec") as stream:
        stream.send(first)
        assert list(json.loads(stream.recv(10))) == ["error"]
    assert not engine.sessions


def test_a_command_that_cannot_start_is_127(sdk: Hypeman, engine: DoubleEngine) -> None:
    engine.failures["exec"] = GuestFailure("no such file: /bin/nope")
    result = sdk_exec(sdk, "web", ["/bin/nope"])
    assert (result.output, result.exit_code) == (b"Error: no such file: /bin/nope\r\n", 127)


@pytest.mark.parametrize("endpoint", ["exec", "cp"])
def test_an_instance_that_does_not_run_is_refused_before_the_upgrade(
    url: str, engine: DoubleEngine, endpoint: str
) -> None:
    engine.instances = [instance(state=InstanceState.STANDBY)]
    with pytest.raises(InvalidStatus) as refused:
        dial(url, f"/instances/web/{endpoint}")
    body = json.loads(refused.value.response.body)
    assert (refused.value.response.status_code, body["code"]) == (409, "invalid_state")
    assert body["message"] == "instance must be running (current state: Standby)"
    with pytest.raises(InvalidStatus) as missing:
        dial(url, f"/instances/none/{endpoint}")
    assert missing.value.response.status_code == 404


def test_a_client_that_goes_hangs_up_on_its_command(url: str, engine: DoubleEngine) -> None:
    with dial(url, "/instances/web/exec") as stream:
        stream.send(json.dumps({"command": ["cat"]}))
        stream.send(b"a")
        assert stream.recv(10) == b"A"
    assert engine.sessions[0].closed.wait(10)


def test_the_sdk_copies_in_and_out(sdk: Hypeman, engine: DoubleEngine, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.bin").write_bytes(b"z" * 100_000)
    cp_to_instance(sdk, "web", source, "/data")
    assert engine.files == {"/data": b"", "/data/a.bin": b"z" * 100_000}
    engine.entries = [
        _entry("", "dir"),
        _entry("a.bin", "file", b"q" * 70_000),
        _entry("link", "link", target="a.bin"),
        _entry("sub", "dir"),
    ]
    cp_from_instance(sdk, "web", "/data", tmp_path / "out")
    assert (tmp_path / "out/a.bin").read_bytes() == b"q" * 70_000
    assert (tmp_path / "out/a.bin").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "out/link").readlink() == Path("a.bin")
    assert (tmp_path / "out/sub").is_dir()


def test_an_empty_tree_arrives_as_an_empty_directory(sdk: Hypeman, tmp_path: Path) -> None:
    cp_from_instance(sdk, "web", "/var/empty", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_sdk_sees_why_a_copy_failed(sdk: Hypeman, engine: DoubleEngine, tmp_path: Path) -> None:
    engine.failures["write_path"] = GuestFailure("No space left on device")
    (tmp_path / "big").write_bytes(b"x" * 500_000)
    with pytest.raises(CopyProtocolError, match="No space left on device"):
        cp_to_instance(sdk, "web", tmp_path / "big", "/big")
    engine.failures["read_path"] = GuestFailure("no such file")
    with pytest.raises(CopyProtocolError, match="no such file"):
        cp_from_instance(sdk, "web", "/none", tmp_path / "out")


def test_an_upload_broken_off_never_counts_as_written(url: str, engine: DoubleEngine) -> None:
    with dial(url, "/instances/web/cp") as stream:
        stream.send(json.dumps({"direction": "to", "guest_path": "/f"}))
        stream.send(b"half")
    with dial(url, "/instances/web/cp") as stream:
        stream.send(json.dumps({"direction": "stat", "guest_path": "/f"}))
        answer = json.loads(stream.recv(10))
    assert (answer["type"], answer["exists"]) == ("stat", False)


def test_cp_refuses_a_bad_first_frame(url: str) -> None:
    for first in ("{", '{"direction":"up","guest_path":"/"}', '{"direction":"to"}'):
        with dial(url, "/instances/web/cp") as stream:
            stream.send(first)
            assert json.loads(stream.recv(10))["type"] == "error"


def test_logs_are_one_json_string_per_event(sdk: Hypeman, url: str, engine: DoubleEngine) -> None:
    engine.lines = ["one", 'two "quoted"', "drei \u2028 ü"]
    assert list(sdk.instances.logs("web", tail=3, source="vmm")) == engine.lines
    assert engine.last("logs")[1] == {"source": "vmm", "tail": 3, "follow": False}
    answer = httpx.get(f"{url}/instances/web/logs", headers=bearer())
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.text.startswith('data: "one"\n\n')
    bad = httpx.get(f"{url}/instances/web/logs?source=kernel", headers=bearer())
    assert (bad.status_code, bad.json()["code"]) == (400, "Bad Request")


def test_a_missing_log_is_a_404(url: str, engine: DoubleEngine) -> None:
    engine.failures["logs"] = NotFound("no app log yet", code="log_not_found")
    answer = httpx.get(f"{url}/instances/web/logs", headers=bearer())
    assert (answer.status_code, answer.json()["code"]) == (404, "log_not_found")


def test_a_client_that_goes_while_its_stdin_is_not_taken_hangs_up_all_the_same(
    url: str, engine: DoubleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(DoubleSession, "write_stdin", never)
    monkeypatch.setattr(routes, "_ASK_SECONDS", 0.05)
    monkeypatch.setattr(routes, "_STDIN_BUFFER_BYTES", 100_000)
    with dial(url, "/instances/web/exec") as stream:
        stream.send(json.dumps({"command": ["sleep", "infinity"]}))
        for _ in range(4):
            stream.send(bytes(60_000))
        stream.socket.shutdown(socket.SHUT_RDWR)
    (session,) = engine.sessions
    assert session.closed.wait(30)


def test_a_follower_that_goes_lets_the_log_go(url: str, engine: DoubleEngine) -> None:
    engine.lines = ["first"]
    with httpx.stream("GET", f"{url}/instances/web/logs?follow=true", headers=bearer()) as answer:
        assert next(answer.iter_lines()) == 'data: "first"'
    assert engine.logs_closed.wait(10)


def test_a_silent_log_is_followed_at_once(url: str) -> None:
    with httpx.stream("GET", f"{url}/instances/web/logs?follow=true", headers=bearer()) as answer:
        assert answer.status_code == 200
