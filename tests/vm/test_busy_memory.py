"""Memory of real guests that write to it all the time: not a page may be missing, torn or stale."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypeman import Hypeman

from support.pattern import check, writing_guest
from support.server import Server, eventually_empty, run_in, running_server

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("vcpus", [1, 4])
def test_five_generations_of_a_guest_that_writes_all_the_time(
    server: Server, client: Hypeman, name: str, pattern: Path, vcpus: int
) -> None:
    parent = writing_guest(server, client, name, pattern, vcpus)
    for generation in range(5):
        written = check(client, parent)
        snapshot = client.instances.snapshots.create(parent, kind="Standby")
        image = server.data_dir / "snapshots" / snapshot.id / "memory"
        stored = sha256(image)
        assert check(client, parent) >= written  # the source runs on, unharmed
        fork = client.snapshots.fork(snapshot.id, name=f"{name}-{generation}")
        assert check(client, fork.id) >= written
        client.instances.delete(parent, graceful_shutdown=False)
        assert check(client, fork.id) > written
        assert sha256(image) == stored
        client.snapshots.delete(snapshot.id)
        parent = fork.id


def test_snapshots_of_one_busy_guest_each_hold_their_own_moment(
    server: Server, client: Hypeman, name: str, pattern: Path
) -> None:
    source = writing_guest(server, client, name, pattern)
    moments = []
    for _ in range(3):
        before = check(client, source)
        snapshot = client.instances.snapshots.create(source, kind="Standby")
        moments.append((before, snapshot.id, check(client, source)))
    # The middle one goes: the next capture has nothing to build on but what the VMM maps.
    client.snapshots.delete(moments[2][1])
    again = client.instances.snapshots.create(source, kind="Standby")
    moments[2] = (moments[2][2], again.id, check(client, source))
    for number, (before, snapshot_id, after) in enumerate(moments):
        fork = client.snapshots.fork(snapshot_id, name=f"{name}-{number}")
        # How far a fork has come by its first check is its own affair; where it began is not.
        assert check(client, fork.id) >= before
        client.instances.delete(fork.id, graceful_shutdown=False)
        assert before < after


def test_standby_and_restore_of_a_guest_that_writes_all_the_time(
    server: Server, client: Hypeman, name: str, pattern: Path
) -> None:
    instance = writing_guest(server, client, name, pattern)
    for _ in range(2):
        written = check(client, instance)
        client.instances.standby(instance)
        client.instances.restore(instance)
        assert check(client, instance) >= written


@pytest.fixture
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose VMMs have no tracking of writes, as on Linux before 6.7."""
    data_dir = tmp_path_factory.mktemp("plain") / "data"
    nowhere = {"STILLFRAME_TRACKER_LIBRARY": str(data_dir / "nowhere.so")}
    with running_server(data_dir, environment=nowhere) as running:
        yield running
    eventually_empty(running.vmm_pids)


def test_without_tracking_of_writes_everything_is_captured_all_the_same(
    plain_server: Server, name: str, pattern: Path
) -> None:
    client = plain_server.client()
    source = writing_guest(plain_server, client, name, pattern)
    for number in range(2):
        written = check(client, source)
        snapshot = client.instances.snapshots.create(source, kind="Standby")
        fork = client.snapshots.fork(snapshot.id, name=f"{name}-{number}")
        assert check(client, fork.id) >= written
        assert check(client, source) > written
        client.instances.delete(fork.id, graceful_shutdown=False)


def post(client: Hypeman, path: str, body: dict[str, Any]) -> Any:
    return client.post(path, cast_to=object, body=body)


def test_warm_and_cold_forks_of_one_call_all_go_on(
    server: Server, client: Hypeman, name: str, pattern: Path
) -> None:
    source = writing_guest(server, client, name, pattern)
    written = check(client, source)
    snapshot = client.instances.snapshots.create(source, kind="Standby")
    client.instances.delete(source, graceful_shutdown=False)
    warmed = server.cli("snapshot", "warm", snapshot.id, "2", "--wait")
    assert warmed.returncode == 0, warmed.stderr
    answer = post(
        client, f"/snapshots/{snapshot.id}/forks", {"count": 4, "name_prefix": f"{name}-fork"}
    )
    assert (answer["succeeded"], answer["failed"]) == (4, 0)
    forks = [outcome["instance"] for outcome in answer["outcomes"]]
    assert sum("load" not in fork["timings_ms"] for fork in forks) == 2
    for fork in forks:
        assert check(client, fork["id"]) >= written
    names = {run_in(client, fork["id"], "hostname").strip() for fork in forks}
    assert names == {f"{name}-fork-{number}" for number in (1, 2, 3, 4)}


def test_a_disk_written_during_the_snapshot_is_whole_and_of_its_moment(
    server: Server, client: Hypeman, running: str, name: str, tmp_path: Path
) -> None:
    writer = (
        "mkdir /root/d; setsid sh -c 'n=0; while :; do n=$((n+1)); "
        "for i in 1 2 3 4 5 6 7 8; do echo $n-$i; done > /root/d/$n; sync /root/d/$n; done' "
        "</dev/null >/dev/null 2>&1 & until [ -e /root/d/20 ]; do usleep 20000; done"
    )
    run_in(client, running, "sh", "-c", writer)
    snapshot = client.instances.snapshots.create(running, kind="Standby")
    forks = [client.snapshots.fork(snapshot.id, name=f"{name}-{n}") for n in range(2)]
    whole = (
        "cd /root/d; echo 3 > /proc/sys/vm/drop_caches; last=$(ls | sort -n | tail -1); n=0; "
        "while [ $((n=n+1)) -lt $last ]; do "
        '[ "$(wc -l < $n)" = 8 ] && [ "$(tail -1 $n)" = $n-8 ] || echo bad $n; done; echo $last'
    )
    for fork in forks:
        last = run_in(client, fork.id, "sh", "-c", whole).strip()
        assert last.isdecimal(), last
        assert int(last) >= 20
    # The captured disk by itself is what a power cut at that moment would have left.
    disk = tmp_path / "disk"
    shutil.copy(server.data_dir / "snapshots" / snapshot.id / "overlay.raw", disk)
    repaired = subprocess.run(["e2fsck", "-fp", str(disk)], capture_output=True, check=False)
    assert repaired.returncode in (0, 1), repaired.stdout.decode()
    again = subprocess.run(["e2fsck", "-fn", str(disk)], capture_output=True, check=False)
    assert again.returncode == 0, again.stdout.decode()
