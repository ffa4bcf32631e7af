"""What Stillframe is for: real guests, frozen, branched and rolled back."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from hypeman import APIStatusError, Hypeman

from support.server import Server, reboot_in, run_in, wait_running

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

COUNT = """
token=$(cat /proc/sys/kernel/random/uuid); n=0
while :; do
  n=$((n+1)); echo "$n $token" > /run/count.new; mv /run/count.new /run/count; usleep 20000
done
"""


def start_counting(client: Hypeman, instance_id: str) -> None:
    run_in(client, instance_id, "sh", "-c", f"setsid sh -c '{COUNT}' >/dev/null 2>&1 &")
    run_in(client, instance_id, "sh", "-c", "until [ -s /run/count ]; do usleep 20000; done")


def count(client: Hypeman, instance_id: str) -> tuple[int, str]:
    """The counter of the guest's workload, and the token that only its memory holds."""
    number, token = run_in(client, instance_id, "cat", "/run/count").split()
    return int(number), token


def test_a_live_snapshot_forks_into_guests_that_go_on_and_part(
    client: Hypeman, running: str, name: str
) -> None:
    start_counting(client, running)
    before, token = count(client, running)
    snapshot = client.instances.snapshots.create(running, kind="Standby", name="live")
    after, _ = count(client, running)
    assert client.instances.get(running).state == "Running"
    assert after > before

    forks = [client.snapshots.fork(snapshot.id, name=f"{name}-{n}") for n in range(3)]
    for fork in forks:
        assert fork.state == "Running"
        number, its_token = count(client, fork.id)
        assert its_token == token
        assert number >= before
        run_in(client, fork.id, "sh", "-c", f"echo {fork.id} > /root/mine")
    for fork in forks:
        assert run_in(client, fork.id, "cat", "/root/mine").strip() == fork.id
        assert run_in(client, fork.id, "hostname").strip() == fork.name
    assert run_in(client, running, "sh", "-c", "ls /root").strip() == ""
    later, same = count(client, running)
    assert (later > after, same) == (True, token)


def test_two_siblings_never_share_random_numbers(client: Hypeman, running: str, name: str) -> None:
    run_in(client, running, "sh", "-c", "head -c 64 /dev/urandom | sha256sum")
    snapshot = client.instances.snapshots.create(running, kind="Standby")
    draw = "head -c 32 /dev/urandom | sha256sum; cat /etc/machine-id"
    drawn = []
    for number in range(2):
        fork = client.snapshots.fork(snapshot.id, name=f"{name}-{number}")
        drawn += run_in(client, fork.id, "sh", "-c", draw).split("\n")[:2]
    drawn += run_in(client, running, "sh", "-c", draw).split("\n")[:2]
    assert len(set(drawn)) == 6


def test_the_clock_of_a_fork_is_right(client: Hypeman, running: str, name: str) -> None:
    snapshot = client.instances.snapshots.create(running, kind="Standby")
    time.sleep(3)
    fork = client.snapshots.fork(snapshot.id, name=f"{name}-fork")
    earliest = int(time.time())
    told = int(run_in(client, fork.id, "date", "+%s"))
    assert earliest - 1 <= told <= int(time.time()) + 1


def test_five_generations_keep_their_memory(
    client: Hypeman, running: str, name: str, server: Server
) -> None:
    fill = "dd if=/dev/urandom of=/dev/shm/data bs=1M count=24 2>/dev/null; sha256sum /dev/shm/data"
    digest = run_in(client, running, "sh", "-c", fill)
    parent = running
    for generation in range(5):
        snapshot = client.instances.snapshots.create(parent, kind="Standby")
        image = server.data_dir / "snapshots" / snapshot.id / "memory"
        stored = hashlib.sha256(image.read_bytes()).hexdigest()
        fork = client.snapshots.fork(snapshot.id, name=f"{name}-{generation}")
        assert run_in(client, fork.id, "sha256sum", "/dev/shm/data") == digest
        run_in(client, fork.id, "sh", "-c", f"echo {generation} >> /dev/shm/history")
        assert hashlib.sha256(image.read_bytes()).hexdigest() == stored
        client.instances.delete(parent, graceful_shutdown=False)
        client.snapshots.delete(snapshot.id)
        parent = fork.id
    assert run_in(client, parent, "cat", "/dev/shm/history").split() == list("01234")
    assert run_in(client, parent, "sha256sum", "/dev/shm/data") == digest


def test_standby_and_restore_keep_memory_and_disk(client: Hypeman, running: str) -> None:
    start_counting(client, running)
    run_in(client, running, "sh", "-c", "echo kept > /root/file; sync")
    before, token = count(client, running)
    asleep = client.instances.standby(running)
    assert (asleep.state, asleep.has_snapshot) == ("Standby", True)
    assert client.instances.restore(running).state == "Running"
    number, same = count(client, running)
    assert (number >= before, same) == (True, token)
    assert run_in(client, running, "cat", "/root/file").strip() == "kept"


def test_a_standby_instance_is_snapshotted_without_waking(
    client: Hypeman, running: str, name: str
) -> None:
    start_counting(client, running)
    _, token = count(client, running)
    client.instances.standby(running)
    snapshot = client.instances.snapshots.create(running, kind="Standby")
    assert client.instances.get(running).state == "Standby"
    client.instances.delete(running)
    fork = client.snapshots.fork(snapshot.id, name=f"{name}-fork")
    assert count(client, fork.id)[1] == token


def test_restore_in_place_rolls_memory_and_disk_back(client: Hypeman, running: str) -> None:
    start_counting(client, running)
    run_in(client, running, "sh", "-c", "echo old > /root/file; sync")
    number, token = count(client, running)
    snapshot = client.instances.snapshots.create(running, kind="Standby")
    run_in(client, running, "sh", "-c", "echo new > /root/file; sync; sleep 1")
    client.instances.standby(running)
    back = client.instances.snapshots.restore(snapshot.id, id=running)
    assert back.state == "Running"
    again, same = count(client, running)
    assert same == token
    assert again >= number
    assert run_in(client, running, "cat", "/root/file").strip() == "old"


def test_a_stopped_snapshot_carries_the_disk_only(client: Hypeman, running: str, name: str) -> None:
    run_in(client, running, "sh", "-c", "echo disk > /root/file; sync")
    client.instances.stop(running)
    snapshot = client.instances.snapshots.create(running, kind="Stopped")
    fork = client.snapshots.fork(snapshot.id, name=f"{name}-fork")
    assert fork.state == "Stopped"
    client.instances.start(fork.id)
    wait_running(client, fork.id)
    assert run_in(client, fork.id, "cat", "/root/file").strip() == "disk"


def test_a_reboot_inside_a_fork_boots_the_same_disk_again(
    client: Hypeman, running: str, name: str
) -> None:
    run_in(client, running, "sh", "-c", "echo disk > /root/file; sync")
    snapshot = client.instances.snapshots.create(running, kind="Standby")
    fork = client.snapshots.fork(snapshot.id, name=f"{name}-fork")
    reboot_in(client, fork.id)
    assert run_in(client, fork.id, "cat", "/root/file").strip() == "disk"


def seconds_to_write(client: Hypeman, instance_id: str, megabytes: int) -> float:
    """How long a guest takes to write so much to its disk, past its cache."""
    began = time.monotonic()
    write = f"dd if=/dev/zero of=/root/much bs=1M count={megabytes} oflag=direct 2>&1"
    run_in(client, instance_id, "sh", "-c", write)
    return time.monotonic() - began


def test_a_disk_keeps_its_limit_in_forks_and_after_standby(
    client: Hypeman, running: str, name: str
) -> None:
    limited = client.instances.create(
        name=f"{name}-limited", image="stillframe/base", size="256MB", overlay_size="1GB",
        vcpus=1, disk_io_bps="2MB/s",
    )  # fmt: skip
    wait_running(client, limited.id)
    least = 8 / 2 - 1  # seconds; the first tenth's worth passes at once
    spent = seconds_to_write(client, limited.id, 8)
    assert spent >= least
    assert seconds_to_write(client, running, 8) < spent
    snapshot = client.instances.snapshots.create(limited.id, kind="Standby")
    fork = client.snapshots.fork(snapshot.id, name=f"{name}-fork")
    assert fork.disk_io_bps == "2.0 MB/s"
    assert seconds_to_write(client, fork.id, 8) >= least
    client.instances.standby(limited.id)
    client.instances.restore(limited.id)
    wait_running(client, limited.id)
    assert seconds_to_write(client, limited.id, 8) >= least


def test_a_bandwidth_that_qemu_cannot_limit_is_refused_with_who_can(
    client: Hypeman, name: str
) -> None:
    with pytest.raises(APIStatusError) as refused:
        client.instances.create(
            name=name, image="stillframe/base", network={"bandwidth_upload": "1Mbps"}
        )
    assert refused.value.status_code == 501
    assert "qemu cannot limit network.bandwidth_upload" in str(refused.value)
    assert "use firecracker, or leave network.bandwidth_upload out" in str(refused.value)


def test_four_processors_and_a_busy_memory_survive_a_fork(client: Hypeman, name: str) -> None:
    instance = client.instances.create(
        name=name, image="stillframe/base", size="512MB", overlay_size="1GB", vcpus=4
    )
    wait_running(client, instance.id)
    writers = (
        "for w in 1 2 3; do setsid sh -c 'n=0; while :; do n=$((n+1)); "
        "echo $n-$n-$n > /dev/shm/w$0.new; mv /dev/shm/w$0.new /dev/shm/w$0; done' $w "
        ">/dev/null 2>&1 & done; until [ -s /dev/shm/w3 ]; do usleep 20000; done; nproc"
    )
    assert run_in(client, instance.id, "sh", "-c", writers).strip() == "4"
    snapshot = client.instances.snapshots.create(instance.id, kind="Standby")
    fork = client.snapshots.fork(snapshot.id, name=f"{name}-fork")
    for _ in range(5):
        for writer in (1, 2, 3):
            parts = run_in(client, fork.id, "cat", f"/dev/shm/w{writer}").strip().split("-")
            assert len(parts) == 3
            assert len(set(parts)) == 1
    client.instances.delete(fork.id, graceful_shutdown=False)


def test_redis_is_forked_twice_with_all_its_data(
    client: Hypeman, server: Server, name: str, redis_rootfs: Path
) -> None:
    imported = server.cli("image", "import", "test/redis", str(redis_rootfs))
    assert imported.returncode == 0, imported.stderr
    instance = client.instances.create(
        name=name, image="test/redis", size="512MB", overlay_size="2GB", vcpus=2,
        cmd=["redis-server", "--save", "", "--appendonly", "no", "--dir", "/tmp",
             "--enable-debug-command", "yes"],
    )  # fmt: skip
    wait_running(client, instance.id)
    fill = (
        "until redis-cli ping >/dev/null 2>&1; do sleep 0.2; done; "
        "redis-cli debug populate 20000 key 100; redis-cli set who source; redis-cli dbsize"
    )
    assert run_in(client, instance.id, "sh", "-c", fill).split() == ["OK", "OK", "20001"]
    digest = run_in(client, instance.id, "redis-cli", "debug", "digest")
    snapshot = client.instances.snapshots.create(instance.id, kind="Standby")
    forks = [client.snapshots.fork(snapshot.id, name=f"{name}-{n}") for n in range(2)]
    for fork in forks:
        assert run_in(client, fork.id, "redis-cli", "debug", "digest") == digest
        run_in(client, fork.id, "redis-cli", "set", "who", fork.name)
        run_in(client, fork.id, "redis-cli", "del", "key:1")
    for fork in forks:
        assert run_in(client, fork.id, "redis-cli", "get", "who").strip() == fork.name
        assert run_in(client, fork.id, "redis-cli", "dbsize").strip() == "20000"
    assert run_in(client, instance.id, "redis-cli", "get", "who").strip() == "source"
    assert run_in(client, instance.id, "redis-cli", "debug", "digest") == digest
