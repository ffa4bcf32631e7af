"""The command line against a small HTTP server that answers like ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest

from stillframe.cli.client import error_from_answer, parse_pairs
from stillframe.cli.commands.instances import compression_body
from stillframe.model.errors import InvalidRequest, InvalidState, StorageFull

SECRET = "s" * 64


def instance(name: str, id: str, state: str = "Running") -> dict[str, Any]:
    return {
        "id": id, "name": name, "image": "stillframe/base", "state": state, "vcpus": 2,
        "size": "1.0 GB", "hypervisor": "qemu", "created_at": "2026-01-02T03:04:05Z",
        "expires_at": None,
    }  # fmt: skip


def snapshot(id: str, name: str, source: str) -> dict[str, Any]:
    return {
        "id": id, "kind": "Standby", "name": name, "source_instance_id": f"id-{source}",
        "source_instance_name": source, "source_hypervisor": "qemu", "size_bytes": 2**30,
        "created_at": "2026-01-02T03:04:05Z",
    }  # fmt: skip


class Stub:
    """Answers by (method, path without query), and what it was asked.

    A list of answers is given one after the other.
    """

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], tuple[int, Any] | list[tuple[int, Any]]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.tokens: list[str] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                stub.asked.append((self.command, self.path, body))
                stub.tokens.append(self.headers["authorization"].removeprefix("Bearer "))
                path = self.path.partition("?")[0]
                missing = (404, {"code": "not_found", "message": "resource not found"})
                answer = stub.answers.get((self.command, path), missing)
                status, value = answer.pop(0) if isinstance(answer, list) else answer
                data = b"" if value is None else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    thread = threading.Thread(target=stub.server.serve_forever)
    thread.start()
    yield stub
    stub.server.shutdown()
    thread.join()
    stub.server.server_close()


def stillframe(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STILLFRAME_", "HYPEMAN_"))}
    return subprocess.run(
        [sys.executable, "-m", "stillframe.cli.main", *arguments],
        env={**clean, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def on(stub: Stub, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"STILLFRAME_URL": stub.url, "STILLFRAME_TOKEN": "t"}
    return stillframe(*arguments, environment=environment)


def test_ps_prints_plain_columns_when_nobody_watches(stub: Stub) -> None:
    stub.answers["GET", "/instances"] = (200, [instance("web", "a" * 24)])
    done = on(stub, "ps")
    assert done.returncode == 0, done.stderr
    heading, row = done.stdout.splitlines()
    assert heading.split()[:3] == ["NAME", "ID", "STATE"]
    assert row.split()[:3] == ["web", "a" * 24, "Running"]
    assert "\x1b" not in done.stdout


def test_ps_json_is_the_servers_answer(stub: Stub) -> None:
    answer = [instance("web", "a" * 24)]
    stub.answers["GET", "/instances"] = (200, answer)
    assert json.loads(on(stub, "ps", "--json").stdout) == answer


def test_filters_reach_the_server_as_deep_objects(stub: Stub) -> None:
    stub.answers["GET", "/instances"] = (200, [])
    assert on(stub, "ps", "--state", "Standby", "--tag", "team=a b").returncode == 0
    assert stub.asked[0][1] == "/instances?tags%5Bteam%5D=a+b&state=Standby"


def test_an_error_is_one_line_with_its_hint(stub: Stub) -> None:
    stub.answers["POST", "/instances/web/standby"] = (
        409,
        {
            "code": "invalid_state",
            "message": "cannot standby: instance is Stopped, must be Running",
            "details": [{"code": "hint", "message": "start it first"}],
        },
    )
    done = on(stub, "standby", "web")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: cannot standby: instance is Stopped, must be Running (hint: start it first)\n"
    )


def test_wrong_usage_exits_with_two(stub: Stub) -> None:
    assert on(stub, "wait", "web", "--state", "Dancing").returncode == 2
    assert on(stub, "rm").returncode == 2
    assert stub.asked == []


def test_an_unreachable_server_is_explained() -> None:
    done = stillframe("--url", "http://127.0.0.1:1", "--token", "t", "ps")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot talk to http://127.0.0.1:1")
    assert "(hint:" in done.stderr


def test_run_waits_until_the_instance_runs(stub: Stub) -> None:
    made = instance("web", "a" * 24, "Initializing")
    stub.answers["POST", "/instances"] = (201, made)
    stub.answers["GET", f"/instances/{'a' * 24}/wait"] = (
        200, {"state": "Running", "timed_out": False}
    )  # fmt: skip
    stub.answers["GET", f"/instances/{'a' * 24}"] = (200, instance("web", "a" * 24))
    limits = ("--disk-io", "100MB/s", "--bandwidth-down", "1Gbps", "--bandwidth-up", "8Mbps")
    done = on(stub, "run", "-n", "web", "-e", "A=1", *limits, "stillframe/base", "sleep", "-x")
    assert done.returncode == 0, done.stderr
    assert stub.asked[0][2] == {
        "name": "web", "image": "stillframe/base", "env": {"A": "1"}, "cmd": ["sleep", "-x"],
        "disk_io_bps": "100MB/s",
        "network": {"bandwidth_download": "1Gbps", "bandwidth_upload": "8Mbps"},
    }  # fmt: skip
    assert done.stdout.splitlines()[1].split() == ["web", "a" * 24, "Running"]


def test_run_fails_when_the_instance_stops_instead(stub: Stub) -> None:
    stub.answers["POST", "/instances"] = (201, instance("web", "a" * 24, "Initializing"))
    stub.answers["GET", f"/instances/{'a' * 24}/wait"] = (
        200, {"state": "Stopped", "timed_out": False}
    )  # fmt: skip
    done = on(stub, "run", "-n", "web", "stillframe/base")
    assert done.returncode == 1
    assert "is Stopped and will not become Running" in done.stderr


@pytest.mark.parametrize("reference", ["s1" + "a" * 22, "nightly", "s1"])
def test_snapshots_go_by_id_name_and_prefix(stub: Stub, reference: str) -> None:
    wanted = "s1" + "a" * 22
    stub.answers["GET", "/snapshots"] = (
        200, [snapshot(wanted, "nightly", "web"), snapshot("s2" + "a" * 22, "other", "web")]
    )  # fmt: skip
    stub.answers["DELETE", f"/snapshots/{wanted}"] = (204, None)
    done = on(stub, "snapshot", "rm", reference)
    assert done.returncode == 0, done.stderr
    assert stub.asked[-1][:2] == ("DELETE", f"/snapshots/{wanted}")


def test_a_snapshot_name_of_two_sources_is_ambiguous(stub: Stub) -> None:
    stub.answers["GET", "/snapshots"] = (
        200, [snapshot("s1", "nightly", "web"), snapshot("s2", "nightly", "db")]
    )  # fmt: skip
    done = on(stub, "snapshot", "rm", "nightly")
    assert done.returncode == 1
    assert "s1, s2" in done.stderr
    assert [method for method, _, _ in stub.asked] == ["GET"]


def outcomes(*names: str, failed: str = "") -> dict[str, Any]:
    """The server's answer to many forks; the one named ``failed`` could not be made."""
    error = {
        "code": "conflict", "message": "taken", "details": [{"code": "hint", "message": "rename"}],
    }  # fmt: skip
    made = [
        {"name": n, "error": error} if n == failed else {"name": n, "instance": instance(n, n * 3)}
        for n in names
    ]
    return {"outcomes": made, "succeeded": len(made) - bool(failed), "failed": int(bool(failed))}


@pytest.fixture
def nightly(stub: Stub) -> Stub:
    """The stub with a snapshot ``nightly`` of ``web``, whose id is s1."""
    stub.answers["GET", "/snapshots"] = (200, [snapshot("s1", "nightly", "web")])
    return stub


def test_one_fork_is_the_contracts_request(nightly: Stub) -> None:
    nightly.answers["POST", "/snapshots/s1/fork"] = (201, instance("one", "b" * 24))
    done = on(nightly, "snapshot", "fork", "nightly", "one", "--state", "Running", "--tag", "a=b",
              "--env", "K=V", "--env", "L=")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert nightly.asked[-1][2] == {
        "name": "one", "target_state": "Running", "tags": {"a": "b"}, "env": {"K": "V", "L": ""},
    }  # fmt: skip
    assert done.stdout.splitlines()[1].split() == ["one", "b" * 24, "Running"]
    shown = json.loads(on(nightly, "snapshot", "fork", "nightly", "one", "--json").stdout)
    assert shown == [{"name": "one", "instance": instance("one", "b" * 24)}]
    assert nightly.asked[-1][2] == {"name": "one"}


def test_a_fork_for_each_name_in_one_request(nightly: Stub) -> None:
    nightly.answers["POST", "/snapshots/s1/forks"] = (201, outcomes("one", "two"))
    done = on(nightly, "snapshot", "fork", "nightly", "one", "two", "--state", "Stopped")
    assert done.returncode == 0, done.stderr
    assert [row.split()[0] for row in done.stdout.splitlines()] == ["NAME", "one", "two"]
    assert [body for _, _, body in nightly.asked[1:]] == [
        {"count": 2, "overrides": [{"name": "one"}, {"name": "two"}], "target_state": "Stopped"}
    ]


@pytest.mark.parametrize(
    ("options", "prefix"), [((), "web"), (("--prefix", "job"), "job")], ids=["source", "given"]
)
def test_forks_by_number(nightly: Stub, options: tuple[str, ...], prefix: str) -> None:
    nightly.answers["POST", "/snapshots/s1/forks"] = (201, outcomes("x", "y", "z"))
    done = on(nightly, "snapshot", "fork", "s1", "--count", "3", *options, "--tag", "a=b", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == outcomes("x", "y", "z")["outcomes"]
    assert nightly.asked[-1][2] == {"count": 3, "name_prefix": prefix, "tags": {"a": "b"}}


def test_forks_that_failed_are_told_and_the_others_shown(nightly: Stub) -> None:
    nightly.answers["POST", "/snapshots/s1/forks"] = (201, outcomes("a", "b", "c", failed="b"))
    done = on(nightly, "snapshot", "fork", "nightly", "a", "b", "c")
    assert done.returncode == 1
    assert done.stderr == "error: b: taken (hint: rename)\n"
    assert [row.split() for row in done.stdout.splitlines()[1:]] == [
        ["a", "aaa", "Running"], ["b", "-", "failed"], ["c", "ccc", "Running"]
    ]  # fmt: skip
    done = on(nightly, "snapshot", "fork", "nightly", "a", "b", "c", "--json")
    assert done.returncode == 1
    assert ["instance" in outcome for outcome in json.loads(done.stdout)] == [True, False, True]


def test_no_fork_made_tells_why_for_each(nightly: Stub) -> None:
    details = [{"code": "conflict", "message": f"web-{n}: taken: (hint: rename)"} for n in (1, 2)]
    refusal = {"code": "conflict", "message": "no fork was made: taken", "details": details}
    nightly.answers["POST", "/snapshots/s1/forks"] = (409, refusal)
    done = on(nightly, "snapshot", "fork", "nightly", "--count", "2", "--json")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: web-1: taken: (hint: rename)", "error: web-2: taken: (hint: rename)"
    ]  # fmt: skip
    assert json.loads(done.stdout) == [
        {"name": f"web-{n}", "error": {"code": "conflict", "message": "taken: (hint: rename)"}}
        for n in (1, 2)
    ]


def test_a_refused_request_for_forks_is_one_line(nightly: Stub) -> None:
    details = [{"code": "body.count", "message": "too many"}]
    refusal = {"code": "Bad Request", "message": "body.count: too many", "details": details}
    nightly.answers["POST", "/snapshots/s1/forks"] = (400, refusal)
    done = on(nightly, "snapshot", "fork", "nightly", "--count", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: body.count: too many\n"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("one", "--count", "2"),
        ("one", "--prefix", "p"),
        ("--count", "0"),
        ("--count", "1001"),
        ("--prefix", "p"),
    ],
)
def test_names_and_a_count_exclude_each_other(nightly: Stub, arguments: tuple[str, ...]) -> None:
    assert on(nightly, "snapshot", "fork", "nightly", *arguments).returncode == 2
    assert nightly.asked == []


def warm(target: int, ready: int, filling: int = 0, **more: str) -> tuple[int, dict[str, Any]]:
    """An answer about warm forks, which hold 1 MiB each."""
    memory = ready * 2**20
    return 200, {
        "target": target, "ready": ready, "filling": filling, "memory_bytes": memory, **more
    }  # fmt: skip


def test_warm_forks_are_shown_and_set(nightly: Stub) -> None:
    nightly.answers["GET", "/snapshots/s1/warm"] = warm(3, 2, 1)
    done = on(nightly, "snapshot", "warm", "nightly")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split() == ["3", "2", "1", "2.0", "MB", "-"]
    nightly.answers["PUT", "/snapshots/s1/warm"] = warm(0, 0)
    done = on(nightly, "snapshot", "warm", "s1", "0", "--json")
    assert json.loads(done.stdout) == warm(0, 0)[1]
    assert nightly.asked[-1] == ("PUT", "/snapshots/s1/warm", {"count": 0})
    assert on(nightly, "snapshot", "warm", "s1", "1001").returncode == 2


def test_warm_waits_until_all_are_ready(nightly: Stub) -> None:
    nightly.answers["PUT", "/snapshots/s1/warm"] = warm(2, 0, 2)
    nightly.answers["GET", "/snapshots/s1/warm"] = [warm(2, 1, 1, limited_by="busy"), warm(2, 2)]
    done = on(nightly, "snapshot", "warm", "nightly", "2", "--wait", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == warm(2, 2)[1]
    assert [method for method, _, _ in nightly.asked] == ["GET", "PUT", "GET", "GET"]


def test_warm_ends_its_wait_when_there_will_be_no_more(nightly: Stub) -> None:
    limited = warm(5, 2, limited_by="the memory budget is used up")
    nightly.answers["GET", "/snapshots/s1/warm"] = [warm(5, 1, 1), limited]
    done = on(nightly, "snapshot", "warm", "nightly", "--wait")
    assert done.returncode == 1
    assert done.stderr == "error: 2 of 5 forks are ready: the memory budget is used up\n"
    assert "the memory budget is used up" in done.stdout


def test_the_local_server_is_found_by_its_data_directory(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "jwt-secret").write_text(SECRET + "\n")
    (tmp_path / "server.json").write_text(json.dumps({"url": stub.url}))
    stub.answers["GET", "/instances"] = (200, [])
    done = stillframe("--data-dir", str(tmp_path), "ps")
    assert done.returncode == 0, done.stderr
    claims = jwt.decode(stub.tokens[0], SECRET, algorithms=["HS256"])
    assert claims["sub"] == "cli"
    assert claims["exp"] - claims["iat"] == 600


def test_token_carries_the_permissions_asked_for(tmp_path: Path) -> None:
    (tmp_path / "jwt-secret").write_text(SECRET)
    done = stillframe(
        "--data-dir", str(tmp_path), "token", "--lifetime", "1h", "-p", "snapshot:read"
    )
    claims = jwt.decode(done.stdout.strip(), SECRET, algorithms=["HS256"])
    assert claims["permissions"] == ["snapshot:read"]
    assert claims["exp"] - claims["iat"] == 3600


def test_token_without_a_server_says_what_to_do(tmp_path: Path) -> None:
    done = stillframe("--data-dir", str(tmp_path), "token")
    assert done.returncode == 1
    assert "stillframe serve" in done.stderr


def test_answers_become_errors_of_their_class() -> None:
    full = error_from_answer(507, b'{"code":"storage_full","message":"full"}')
    assert isinstance(full, StorageFull)
    odd = error_from_answer(502, b"<html>bad gateway</html>")
    assert "bad gateway" in odd.message
    conflict = error_from_answer(409, b'{"code":"invalid_state","message":"no"}')
    assert conflict.code == InvalidState.default_code


def test_compression_words() -> None:
    assert compression_body("lz4:3") == {"enabled": True, "algorithm": "lz4", "level": 3}
    assert compression_body("none") == {"enabled": False}
    with pytest.raises(InvalidRequest):
        compression_body("gzip")


def test_pairs_need_an_equals_sign() -> None:
    assert parse_pairs(["a=b=c"], "--env") == {"a": "b=c"}
    with pytest.raises(InvalidRequest, match="KEY=VALUE"):
        parse_pairs(["a"], "--env")
