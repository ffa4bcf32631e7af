"""What the command line asks of the server: one request for each option of the API."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from stillframe.cli.client import Client, guest_command
from stillframe.cli.commands import exec as exec_command
from stillframe.cli.main import app
from stillframe.model.errors import InvalidRequest

SNAPSHOT = {
    "id": "s1", "name": "ready", "source_instance_id": "i1", "source_instance_name": "web",
}  # fmt: skip
ANSWER = {
    "id": "i1", "name": "web", "state": "Stopped", "digest": "sha256:" + "a" * 64,
    "status": "ready", "created_at": "2026-01-02T03:04:05Z",
}  # fmt: skip


class Asked:
    """Stands in for the server: remembers the requests that would change something."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []

    def request(self, method: str, path: str, **options: Any) -> Any:
        if (method, path) == ("GET", "/snapshots"):
            return [SNAPSHOT]
        self.requests.append((method, path, options.get("body")))
        return ANSWER

    def run(self, *arguments: str, input: str | None = None) -> Result:
        done = CliRunner().invoke(app, ["--url", "http://server", *arguments], input=input)
        assert done.exit_code == 0, done.output
        return done


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(
        Client, "request", lambda _, *args, **options: asked.request(*args, **options)
    )
    return asked


RUN = ("run", "-n", "web", "--no-wait", "stillframe/base")


@pytest.mark.parametrize(
    ("arguments", "path", "body"),
    [
        ((*RUN, "--", "sleep", "60"), "/instances", {"cmd": ["sleep", "60"]}),
        ((*RUN, "sh", "--", "x"), "/instances", {"cmd": ["sh", "--", "x"]}),
        (
            ("run", "--compress", "zstd:3", "--compress-delay", "1h", *RUN[1:]),
            "/instances",
            {
                "snapshot_policy": {
                    "compression": {"enabled": True, "algorithm": "zstd", "level": 3},
                    "standby_compression_delay": "1h",
                }
            },
        ),
        (("run", "--expires", "72h", *RUN[1:]), "/instances", {"ttl": "72h"}),
        (
            ("start", "web", "--entrypoint", "/bin/sh", "--cmd", "-c 'sleep 60'"),
            "/instances/web/start",
            {"entrypoint": ["/bin/sh"], "cmd": ["-c", "sleep 60"]},
        ),
        (("start", "web"), "/instances/web/start", {}),
        (
            ("standby", "web", "--compress-delay", "30m"),
            "/instances/web/standby",
            {"compression_delay": "30m"},
        ),
        (
            ("edit", "web", "--expires", "2030-01-01T00:00:00Z"),
            "/instances/web",
            {"expires_at": "2030-01-01T00:00:00Z"},
        ),
        (("edit", "web", "--expires", "never"), "/instances/web", {"ttl": "0s"}),
        (("stats", "web"), "/instances/web/stats", None),
        (
            ("snapshot", "fork", "ready", "one", "--hypervisor", "firecracker"),
            "/snapshots/s1/fork",
            {"name": "one", "target_hypervisor": "firecracker"},
        ),
        (
            ("snapshot", "restore", "ready", "--hypervisor", "qemu"),
            "/instances/i1/snapshots/s1/restore",
            {"target_hypervisor": "qemu"},
        ),
        (
            ("image", "pull", "app", "--platform", "linux/amd64", "--tag", "a=b"),
            "/images",
            {"name": "app", "platform": "linux/amd64", "tags": {"a": "b"}},
        ),
        (("image", "tag", "app", "team/app:1"), "/images/app/tag", {"target": "team/app:1"}),
    ],
)
def test_an_option_becomes_its_field(
    asked: Asked, arguments: tuple[str, ...], path: str, body: dict[str, Any] | None
) -> None:
    asked.run(*arguments)
    ((_, where, sent),) = asked.requests
    if arguments[0] == "run":
        sent = {key: value for key, value in sent.items() if key not in ("name", "image")}
    assert (where, sent) == (path, body)


def test_a_private_image_is_pulled_without_its_password_on_the_command_line(asked: Asked) -> None:
    pull = ("image", "pull", "app", "--password-stdin")
    asked.run(*pull, "--username", "me", input="secret\n")
    asked.run(*pull, input="a-token\n")
    assert [body["credentials"] for _, _, body in asked.requests] == [
        {"username": "me", "password": "secret"},
        {"registry_token": "a-token"},
    ]
    nobody = CliRunner().invoke(app, ["--url", "http://server", "image", "pull", "app", "-u", "me"])
    assert nobody.exit_code == 2
    assert "--password-stdin" in nobody.output


def test_the_dashes_before_a_command_are_not_part_of_it() -> None:
    assert guest_command(["--", "ls", "--", "-l"]) == ["ls", "--", "-l"]
    assert guest_command(["ls"]) == ["ls"]
    assert guest_command(["--"]) == guest_command(None) == []


@pytest.mark.parametrize("words", [["ls", "-l"], ["--", "ls", "-l"]])
def test_exec_takes_a_command_with_and_without_dashes(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    sent: list[str] = []

    class Socket:
        def __enter__(self) -> Socket:
            return self

        def __exit__(self, *_: object) -> None: ...

        def send(self, frame: str | bytes) -> None:
            sent.append(str(frame))

    monkeypatch.setattr(Client, "websocket", lambda *_: Socket())
    monkeypatch.setattr(exec_command, "_receive", lambda *_: 0)
    assert CliRunner().invoke(app, ["--url", "http://server", "exec", "web", *words]).exit_code == 0
    assert '"command": ["ls", "-l"]' in sent[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--url", "http://127.0.0.1:70000"), "is not the address of a server"),
        (("--url", "http://["), "is not the address of a server"),
        (("--url", "localhost:1"), "is not the address of a server"),
        (("--url", "http://127.0.0.1:1", "--token", "hälfte"), "the token has characters"),
    ],
)
@pytest.mark.parametrize("command", [("ps",), ("exec", "web", "true")])
def test_what_cannot_be_sent_is_one_line(
    options: tuple[str, ...], command: tuple[str, ...], message: str
) -> None:
    done = CliRunner().invoke(app, [*options, *command])
    assert isinstance(done.exception, InvalidRequest)
    assert message in done.exception.message
    assert "hälfte" not in done.exception.message


def test_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stillframe.cli.main", "--url", "http://h:99999", "exec", "web"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
