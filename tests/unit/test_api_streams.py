"""exec, cp and logs over a real socket: frames, errors, and clients that go."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from hypeman import Hypeman
from hypeman.lib.cp import CopyProtocolError, cp_from_instance, cp_to_instance
from hypeman.lib.exec import exec as sdk_exec
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from stillframe.engine.interface import ReadEntry
from stillframe.model.errors import GuestFailure, NotFound
from stillframe.model.states import InstanceState
from support.api_double import DoubleEngine, app_over, bearer, instance, served, token


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
    with dial(url, "/instances/web/exec") as socket:
        socket.send(json.dumps({"tty": True}))
        socket.send(json.dumps({"resize": {"rows": 30, "cols": 100}}))
        assert socket.recv(10) == b"30x100"
        socket.send('{"text": "is stdin"}')
        assert socket.recv(10) == b'{"TEXT": "IS STDIN"}'
        socket.send(b"x" * 100_000)
        assert len(socket.recv(10)) == 32 * 1024
        for _ in range(3):
            socket.recv(10)
        socket.send(b"")
        assert socket.recv(10) == '{"exitCode":0}'


@pytest.mark.parametrize(
    "first", ["nonsense", "[]", '{"command":"ls"}', '{"timeout":-1}', '{"command":["a\\u0000"]}']
)
def test_a_bad_first_frame_is_an_error_frame(url: str, engine: DoubleEngine, first: str) -> None:
    with dial(url, "/instances/web/exec") as socket:
        socket.send(first)
        assert list(json.loads(socket.recv(10))) == ["error"]
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
    with dial(url, "/instances/web/exec") as socket:
        socket.send(json.dumps({"command": ["cat"]}))
        socket.send(b"a")
        assert socket.recv(10) == b"A"
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
    with dial(url, "/instances/web/cp") as socket:
        socket.send(json.dumps({"direction": "to", "guest_path": "/f"}))
        socket.send(b"half")
    with dial(url, "/instances/web/cp") as socket:
        socket.send(json.dumps({"direction": "stat", "guest_path": "/f"}))
        answer = json.loads(socket.recv(10))
    assert (answer["type"], answer["exists"]) == ("stat", False)


def test_cp_refuses_a_bad_first_frame(url: str) -> None:
    for first in ("{", '{"direction":"up","guest_path":"/"}', '{"direction":"to"}'):
        with dial(url, "/instances/web/cp") as socket:
            socket.send(first)
            assert json.loads(socket.recv(10))["type"] == "error"


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


def test_a_follower_that_goes_lets_the_log_go(url: str, engine: DoubleEngine) -> None:
    engine.lines = ["first"]
    with httpx.stream("GET", f"{url}/instances/web/logs?follow=true", headers=bearer()) as answer:
        assert next(answer.iter_lines()) == 'data: "first"'
    assert engine.logs_closed.wait(10)


def test_a_silent_log_is_followed_at_once(url: str) -> None:
    with httpx.stream("GET", f"{url}/instances/web/logs?follow=true", headers=bearer()) as answer:
        assert answer.status_code == 200
