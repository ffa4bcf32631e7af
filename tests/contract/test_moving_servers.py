"""A snapshot goes from one server to another by the command line, and is verified there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from hypeman import Hypeman

from support.contract import HYPERVISOR, Maker
from support.payloads import flip
from support.server import Server, eventually_empty, run_in, running_server


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Server]:
    """Another server, which has no image yet."""
    environment = {"STILLFRAME_DEFAULT_HYPERVISOR": HYPERVISOR}
    with running_server(tmp_path / "data", environment=environment) as running:
        yield running
    eventually_empty(running.vmm_pids)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, (done.args, done.stdout, done.stderr)
    return done.stdout


def failed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, (done.args, done.stdout, done.stderr)
    return done.stderr


def test_a_fork_goes_on_on_another_server(
    server: Server, other: Server, sdk: Hypeman, make: Maker, tmp_path: Path
) -> None:
    source = make()
    run_in(sdk, source.id, "set", "who", "source")
    sdk.instances.snapshots.create(source.id, kind="Standby", name="ready")
    file = tmp_path / "ready.stillframe"
    done = server.cli("snapshot", "export", "ready", str(file))
    assert done.stderr == f"exported {done.stderr.split()[1]} {done.stderr.split()[2]} to {file}\n"
    assert file.stat().st_size > 1000
    assert "exists" in failed(server.cli("snapshot", "export", "ready", str(file)))
    assert "image stillframe/base" in failed(other.cli("snapshot", "import", str(file)))
    succeeded(server.cli("snapshot", "export", "ready", str(file), "--image", "--force"))
    assert [path.name for path in tmp_path.glob("*.part")] == []
    made = json.loads(succeeded(other.cli("snapshot", "import", str(file), "--json")))
    assert (made["name"], made["source_instance_id"]) == ("ready", source.id)
    assert succeeded(other.cli("snapshot", "compatibility", "ready")) == "can be forked here\n"
    succeeded(other.cli("snapshot", "fork", "ready", "fork"))
    assert run_in(other.client(), "fork", "get", "who").strip() == "source"
    table = succeeded(other.cli("snapshot", "verify", "--all", "--depth", "full"))
    heading, row = table.splitlines()
    assert heading.split()[:3] == ["NAME", "ID", "RESULT"]
    assert row.split()[:3] == ["ready", made["id"], "intact"]
    assert "/s" in row


def test_damage_makes_verify_fail_and_says_where(server: Server, sdk: Hypeman, make: Maker) -> None:
    source = make()
    whole = sdk.instances.snapshots.create(source.id, kind="Standby", name="whole")
    hurt = sdk.instances.snapshots.create(source.id, kind="Standby", name="hurt")
    flip(server.data_dir / "snapshots" / hurt.id / "devices", 80)
    done = server.cli("snapshot", "verify", "--all")
    results = {line.split()[1]: line.split()[2] for line in done.stdout.splitlines()[1:]}
    assert results == {whole.id: "intact", hurt.id: "damaged"}
    assert "damaged: hurt: devices, " in failed(done)
    assert "devices" in failed(server.cli("snapshot", "export", "hurt", "-"))
    (found,) = json.loads(server.cli("snapshot", "verify", "hurt", "--json").stdout)
    assert found["intact"] is False
    assert succeeded(server.cli("snapshot", "verify", "whole")).count("intact") == 1
    assert server.cli("snapshot", "verify").returncode == 2


def test_a_refusal_reaches_a_client_that_still_sends(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as sink:
        sink.truncate(64 << 20)
    line = failed(server.cli("snapshot", "import", str(file)))
    assert line == "error: this is not a snapshot archive\n"
    assert list((server.data_dir / "snapshots").glob(".*")) == []
    assert "no such file" in failed(server.cli("snapshot", "import", str(tmp_path / "none")))


def test_a_connection_that_breaks_costs_nothing(
    server: Server, sdk: Hypeman, make: Maker, tmp_path: Path
) -> None:
    source = make()
    sdk.instances.snapshots.create(source.id, kind="Standby", name="ready")
    file = tmp_path / "ready.stillframe"
    succeeded(server.cli("snapshot", "export", "ready", str(file)))
    data, upload = file.read_bytes(), "u" * 24
    _send_a_part(server, "/snapshots/import?name=lost", data)
    _send_a_part(server, f"/snapshots/import?name=found&upload={upload}", data)
    headers = {"Authorization": f"Bearer {server.token()}"}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        path = f"/snapshots/import/{upload}"
        eventually_empty(lambda: [] if http.get(path).json().get("offset") else [path])
        offset = http.get(path).json()["offset"]
        query = {"upload": upload, "offset": offset}
        made = http.post("/snapshots/import", params=query, content=data[offset:])
        assert (made.status_code, made.json()["name"]) == (201, "found")
    snapshots = server.data_dir / "snapshots"
    eventually_empty(lambda: list(snapshots.glob(".*")))
    assert {s.name for s in sdk.snapshots.list()} == {"ready", "found"}


def _send_a_part(server: Server, path: str, data: bytes) -> None:
    """Begin to send a body and hang up before its end."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port))
    connection.putrequest("POST", path)
    connection.putheader("Authorization", f"Bearer {server.token()}")
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders()
    connection.send(data[: len(data) - 40])
    connection.close()
