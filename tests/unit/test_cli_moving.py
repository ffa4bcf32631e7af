"""Exports and imports by the command line over a connection that breaks."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner, Result

from stillframe.cli.client import Client
from stillframe.cli.main import app
from stillframe.model.errors import HostFailure, StillframeError
from stillframe.model.units import is_id

DATA = bytes(range(256)) * 5000
TAG = "5" * 32
SNAPSHOT = {
    "id": "s" * 24, "name": "ready", "kind": "Standby", "source_instance_name": "web",
    "size_bytes": 4096, "created_at": "2026-01-02T03:04:05Z",
}  # fmt: skip


class Shaky:
    """A server that hangs up after ``patience`` bytes of an archive, either way.

    ``wrong`` is the answer to whoever comes back. ``tag`` names the archive; whoever goes on with
    another is refused. With ``away`` it hangs up on every request after the first break.
    """

    def __init__(self, patience: int = 400_000) -> None:
        self.patience, self.wrong, self.tag = patience, False, TAG
        self.away, self.broken = False, False
        self.received = bytearray()
        self.upload, self.whole = "", False
        self.asked: list[tuple[str, dict[str, str], str | None]] = []
        shaky = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def query(self) -> dict[str, str]:
                url = urlsplit(self.path)
                values = {key: value[0] for key, value in parse_qs(url.query).items()}
                shaky.asked.append((url.path, values, self.headers.get("if-match")))
                return values

            def answer(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                query = self.query()
                path = urlsplit(self.path).path
                if shaky.away and shaky.broken:
                    self.close_connection = True
                elif path == "/snapshots":
                    self.answer(200, [SNAPSHOT])
                elif path.startswith("/snapshots/import/"):
                    upload = path.rpartition("/")[2]
                    if upload == shaky.upload:
                        self.answer(200, shaky.status())
                    else:
                        self.answer(404, {"code": "not_found", "message": "no such upload"})
                elif self.headers.get("if-match") not in (None, f'"{shaky.tag}"'):
                    self.answer(409, {"code": "conflict", "message": "another one by now"})
                elif shaky.wrong and query["offset"] != "0":
                    self.answer(500, {"code": "damaged", "message": "memory is damaged"})
                else:
                    self.archive(DATA[int(query["offset"]) :])

            def archive(self, rest: bytes) -> None:
                self.send_response(200)
                self.send_header("content-length", str(len(rest)))
                self.send_header("etag", f'"{shaky.tag}"')
                self.end_headers()
                self.wfile.write(rest[: shaky.patience])
                shaky.broken = len(rest) > shaky.patience
                self.close_connection = True

            def do_POST(self) -> None:
                query = self.query()
                assert is_id(query["upload"])
                if query["upload"] != shaky.upload:
                    shaky.upload, shaky.whole = query["upload"], False
                    shaky.received.clear()
                offset = int(query["offset"])
                assert offset == len(shaky.received)
                until = offset + shaky.patience
                while length := int(self.rfile.readline(), 16):
                    shaky.received += self.rfile.read(length)
                    self.rfile.readline()
                    if len(shaky.received) > until:
                        self.close_connection = shaky.broken = True
                        return
                shaky.whole = True
                self.answer(201, SNAPSHOT)

            def log_message(self, format: str, *args: object) -> None:
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def status(self) -> dict[str, Any]:
        """What it says of the one upload it knows."""
        whole = {"snapshot_id": SNAPSHOT["id"]} if self.whole else {}
        return {"offset": len(self.received), **whole}

    def paths(self, path: str) -> list[tuple[dict[str, str], str | None]]:
        """The queries and tags of the requests for a path."""
        return [(query, tag) for asked, query, tag in self.asked if asked == path]


@pytest.fixture
def shaky() -> Iterator[Shaky]:
    shaky = Shaky()
    thread = threading.Thread(target=shaky.server.serve_forever)
    thread.start()
    yield shaky
    shaky.server.shutdown()
    thread.join()
    shaky.server.server_close()


def run(shaky: Shaky, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--url", shaky.url, "--token", "t", "snapshot", *arguments])


def test_one_that_cannot_be_verified_does_not_keep_the_others_from_it(
    shaky: Shaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answering(_: Client, method: str, path: str, **__: object) -> Any:
        if method == "GET":
            return [{"id": name * 24, "name": name} for name in "abc"]
        asked.append(path.split("/")[2][0])
        if asked[-1] == "b":
            raise HostFailure("could not read the snapshot: Too many open files")
        return {
            "snapshot_id": asked[-1] * 24, "intact": True, "checked_bytes": 1, "seconds": 1.0,
            "bytes_per_second": 1.0, "damaged_bytes": 0, "damage": [],
        }  # fmt: skip

    monkeypatch.setattr(Client, "request", answering)
    done = run(shaky, "verify", "--all")
    assert asked == ["a", "b", "c"]
    assert done.exit_code == 1
    assert done.stdout.count("intact") == 2
    assert "damaged:" not in done.output
    assert done.stderr == (
        "error: b was not verified: could not read the snapshot: Too many open files\n"
    )


def test_an_export_goes_on_where_it_broke(shaky: Shaky, tmp_path: Path) -> None:
    file = tmp_path / "archive"
    done = run(shaky, "export", "ready", str(file), "--image")
    assert done.exit_code == 0, done.output
    assert file.read_bytes() == DATA
    asked = shaky.paths(f"/snapshots/{SNAPSHOT['id']}/export")
    assert len(asked) == 4
    assert asked[0] == ({"image": "true", "offset": "0"}, None)
    assert {tag for _, tag in asked[1:]} == {f'"{TAG}"'}
    assert [int(query["offset"]) for query, _ in asked] == [0, 400_000, 800_000, 1_200_000]


def test_what_the_server_says_of_damage_is_told_and_nothing_is_left(
    shaky: Shaky, tmp_path: Path
) -> None:
    shaky.wrong = True
    done = run(shaky, "export", "ready", str(tmp_path / "archive"))
    assert isinstance(done.exception, StillframeError)
    assert done.exception.message == "memory is damaged"
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_gets_nowhere_ends(shaky: Shaky, tmp_path: Path) -> None:
    shaky.patience = 0
    done = run(shaky, "export", "ready", str(tmp_path / "archive"))
    assert isinstance(done.exception, HostFailure)
    assert list(tmp_path.iterdir()) == []
    assert len(shaky.paths(f"/snapshots/{SNAPSHOT['id']}/export")) == 1


def test_another_call_goes_on_with_an_export(shaky: Shaky, tmp_path: Path) -> None:
    file = tmp_path / "archive"
    shaky.away = True
    broken = run(shaky, "export", "ready", str(file))
    assert isinstance(broken.exception, HostFailure)
    (part,) = tmp_path.iterdir()
    assert part.name in broken.stderr
    assert part.read_bytes() == DATA[:400_000]
    shaky.away, shaky.patience = False, len(DATA)
    done = run(shaky, "export", "ready", str(file))
    assert done.exit_code == 0, (done.output, done.exception)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == DATA
    last, tag = shaky.paths(f"/snapshots/{SNAPSHOT['id']}/export")[-1]
    assert (last["offset"], tag) == ("400000", f'"{TAG}"')


def test_an_export_of_what_has_changed_begins_anew(shaky: Shaky, tmp_path: Path) -> None:
    file = tmp_path / "archive"
    (tmp_path / f"archive.{'6' * 32}.part").write_bytes(b"of another archive")
    done = run(shaky, "export", "ready", str(file))
    assert done.exit_code == 0, (done.output, done.exception)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == DATA


def test_an_export_that_came_whole_is_given_its_name(shaky: Shaky, tmp_path: Path) -> None:
    file = tmp_path / "archive"
    (tmp_path / f"archive.{TAG}.part").write_bytes(DATA)  # killed before the last step
    assert run(shaky, "export", "ready", str(file)).exit_code == 0
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == DATA


def test_two_exports_do_not_write_to_one_file(shaky: Shaky, tmp_path: Path) -> None:
    part = tmp_path / f"archive.{TAG}.part"
    part.write_bytes(DATA[:7])
    with part.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = run(shaky, "export", "ready", str(tmp_path / "archive"))
    assert isinstance(done.exception, HostFailure)
    assert part.read_bytes() == DATA[:7]


def test_another_call_goes_on_with_an_import(shaky: Shaky, tmp_path: Path) -> None:
    file = tmp_path / "archive"
    file.write_bytes(DATA * 3)
    shaky.away = True
    broken = run(shaky, "import", str(file), "--name", "copy")
    assert isinstance(broken.exception, HostFailure)
    assert broken.exception.hint == "the same command goes on where it broke"
    come = len(shaky.received)
    assert 0 < come < len(DATA) * 3
    shaky.away, shaky.patience = False, len(DATA) * 3
    done = run(shaky, "import", str(file), "--name", "copy")
    assert done.exit_code == 0, (done.output, done.exception)
    assert bytes(shaky.received) == DATA * 3
    queries = [query for query, _ in shaky.paths("/snapshots/import")]
    assert [query["offset"] for query in queries] == ["0", str(come)]
    assert len({query["upload"] for query in queries}) == 1


def test_an_archive_can_be_imported_twice(shaky: Shaky, tmp_path: Path) -> None:
    file = tmp_path / "archive"
    file.write_bytes(DATA)
    shaky.patience = len(DATA)
    for _ in range(2):
        assert run(shaky, "import", str(file)).exit_code == 0
    queries = [query for query, _ in shaky.paths("/snapshots/import")]
    assert [query["offset"] for query in queries] == ["0", "0"]
    assert len({query["upload"] for query in queries}) == 2


def test_an_import_goes_on_where_it_broke(shaky: Shaky, tmp_path: Path) -> None:
    file = tmp_path / "archive"
    file.write_bytes(DATA * 3)
    done = run(shaky, "import", str(file), "--name", "copy", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert bytes(shaky.received) == DATA * 3
    asked = [query for query, _ in shaky.paths("/snapshots/import")]
    assert len(asked) > 1
    assert {query["name"] for query in asked} == {"copy"}
    assert len({query["upload"] for query in asked}) == 1


def test_stdin_and_stdout_will_do(shaky: Shaky) -> None:
    shaky.patience = len(DATA) * 2
    done = run(shaky, "export", "ready", "-")
    assert done.stdout_bytes == DATA
    sent = CliRunner().invoke(
        app, ["--url", shaky.url, "--token", "t", "snapshot", "import", "-"], input=DATA
    )
    assert sent.exit_code == 0, sent.exception
    assert bytes(shaky.received) == DATA
