"""A real guest moves: it goes on on another server, which had neither its image nor a kernel."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypeman import Hypeman

from support.pattern import check, writing_guest
from support.server import Server, eventually_empty, run_in, running_server

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Server]:
    """Another server, with a data directory of its own and no kernel to make a boot pair from."""
    nowhere = {"STILLFRAME_KERNEL_DIR": str(tmp_path / "no-kernel")}
    with running_server(tmp_path / "data", environment=nowhere) as running:
        yield running
    eventually_empty(running.vmm_pids)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, (done.args, done.stdout, done.stderr)
    return done.stdout


def sums(client: Hypeman, instance_id: str) -> str:
    """SHA-256 of what lies in the guest's memory, as the guest itself reads it."""
    return run_in(client, instance_id, "sha256sum", "/dev/shm/noise", "/dev/shm/text")


def test_a_guest_goes_on_on_another_server_with_all_its_memory(
    server: Server, client: Hypeman, other: Server, pattern: Path, tmp_path: Path
) -> None:
    source = writing_guest(server, client, "mover", pattern)
    fill = (
        "dd if=/dev/urandom of=/dev/shm/noise bs=1M count=6 2>/dev/null && "
        "seq 1 300000 > /dev/shm/text && echo here > /root/where"
    )
    run_in(client, source, "sh", "-c", fill)
    expected, written = sums(client, source), check(client, source)
    snapshot = client.instances.snapshots.create(source, kind="Standby", name="moving")
    file = tmp_path / "moving.stillframe"
    succeeded(server.cli("snapshot", "export", snapshot.id, str(file), "--image"))
    client.instances.delete(source, graceful_shutdown=False)
    client.snapshots.delete(snapshot.id)

    arrived = json.loads(succeeded(other.cli("snapshot", "import", str(file), "--json")))
    assert succeeded(other.cli("snapshot", "compatibility", "moving")) == "can be forked here\n"
    there = other.client()
    forks = [there.snapshots.fork(arrived["id"], name=f"mover-{number}") for number in (1, 2)]
    for fork in forks:
        assert sums(there, fork.id) == expected
        assert run_in(there, fork.id, "cat", "/root/where").strip() == "here"
        assert run_in(there, fork.id, "hostname").strip() == fork.name
        assert check(there, fork.id) >= written  # its writers go on
    again = there.instances.snapshots.create(forks[0].id, kind="Standby")
    there.instances.delete(forks[0].id, graceful_shutdown=False)
    grandchild = there.snapshots.fork(again.id, name="mover-3")
    assert sums(there, grandchild.id) == expected


def test_damage_on_the_way_is_found_before_a_guest_runs(
    server: Server, client: Hypeman, other: Server, running: str, tmp_path: Path
) -> None:
    snapshot = client.instances.snapshots.create(running, kind="Standby", name="moving")
    file = tmp_path / "moving.stillframe"
    succeeded(server.cli("snapshot", "export", snapshot.id, str(file), "--image"))
    with file.open("r+b") as archive:
        archive.seek(file.stat().st_size // 2)
        (byte,) = archive.read(1)
        archive.seek(-1, 1)
        archive.write(bytes([byte ^ 1]))
    done = other.cli("snapshot", "import", str(file))
    assert done.returncode == 1
    assert "digest" in done.stderr
    assert list((other.data_dir / "snapshots").iterdir()) == []
    assert list((other.data_dir / "system").glob("*")) == []
