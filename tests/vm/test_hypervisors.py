"""One VM under several hypervisors: its disks cross over, its memory does not."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypeman import APIStatusError, Hypeman

from stillframe.model.values import CONTRACT_HYPERVISORS
from support.server import reboot_in, run_in, wait_running

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def test_a_microvm_is_frozen_forked_and_rolled_back(client: Hypeman, name: str) -> None:
    source = client.instances.create(
        name=name, image="stillframe/base", size="256MB", overlay_size="1GB", vcpus=1,
        hypervisor=cast(Any, "qemu-microvm"),
    )  # fmt: skip
    wait_running(client, source.id)
    run_in(client, source.id, "sh", "-c", "cat /proc/sys/kernel/random/uuid > /run/token")
    token = run_in(client, source.id, "cat", "/run/token")
    snapshot = client.instances.snapshots.create(source.id, kind="Standby", name="live")
    assert str(snapshot.source_hypervisor) == "qemu-microvm"
    fork = client.snapshots.fork(snapshot.id, name=f"{name}-fork")
    assert run_in(client, fork.id, "cat", "/run/token") == token
    assert run_in(client, fork.id, "hostname").strip() == f"{name}-fork"
    run_in(client, fork.id, "sh", "-c", "echo disk > /root/file; sync")
    reboot_in(client, fork.id)
    assert run_in(client, fork.id, "cat", "/root/file").strip() == "disk"

    run_in(client, source.id, "rm", "/run/token")
    client.instances.standby(source.id)
    client.instances.restore(source.id)
    assert (
        run_in(client, source.id, "sh", "-c", "ls /run/token 2>/dev/null || echo gone").strip()
        == "gone"
    )
    client.instances.standby(source.id)
    client.instances.snapshots.restore(snapshot.id, id=source.id)
    assert run_in(client, source.id, "cat", "/run/token") == token


def test_a_stopped_snapshot_crosses_hypervisors_and_comes_back(
    client: Hypeman, running: str, name: str
) -> None:
    run_in(client, running, "sh", "-c", "echo one > /root/one")
    client.instances.stop(running)
    first = client.instances.snapshots.create(running, kind="Stopped")

    there = client.snapshots.fork(
        first.id, name=f"{name}-there", target_state="Running",
        target_hypervisor=cast(Any, "qemu-microvm"),
    )  # fmt: skip
    wait_running(client, there.id)
    assert str(client.instances.get(there.id).hypervisor) == "qemu-microvm"
    run_in(client, there.id, "sh", "-c", "cat /root/one && echo two > /root/two")
    client.instances.stop(there.id)
    second = client.instances.snapshots.create(there.id, kind="Stopped")
    assert str(second.source_hypervisor) == "qemu-microvm"

    back = client.snapshots.fork(
        second.id, name=f"{name}-back", target_state="Running", target_hypervisor="qemu"
    )
    wait_running(client, back.id)
    assert str(client.instances.get(back.id).hypervisor) == "qemu"
    assert run_in(client, back.id, "cat", "/root/one", "/root/two").split() == ["one", "two"]
    assert run_in(client, back.id, "sh", "-c", "ls /sys/bus/pci/devices | wc -l").strip() != "0"
    assert run_in(client, back.id, "hostname").strip() == f"{name}-back"

    # In place too: the instance itself goes to the other hypervisor, with the disk it had.
    client.instances.snapshots.restore(
        first.id, id=running, target_state="Running",
        target_hypervisor=cast(Any, "qemu-microvm"),
    )  # fmt: skip
    wait_running(client, running)
    assert str(client.instances.get(running).hypervisor) == "qemu-microvm"
    assert run_in(client, running, "cat", "/root/one").strip() == "one"
    where = run_in(client, running, "readlink", "-f", "/sys/block/vda")
    assert "pci" not in where  # on a virtio-mmio transport


def test_memory_does_not_cross_hypervisors(client: Hypeman, running: str, name: str) -> None:
    snapshot = client.instances.snapshots.create(running, kind="Standby")
    with pytest.raises(APIStatusError) as refused:
        client.snapshots.fork(
            snapshot.id, name=f"{name}-fork", target_hypervisor=cast(Any, "qemu-microvm")
        )
    assert refused.value.status_code == 400
    assert "Stopped" in str(refused.value)


def test_every_hypervisor_of_the_contract_is_told_with_what_it_can_do(client: Hypeman) -> None:
    told = client.get("/capabilities", cast_to=cast(Any, object))
    runtimes = {runtime["name"]: runtime for runtime in cast(Any, told)["runtimes"]}
    assert runtimes.keys() == set(CONTRACT_HYPERVISORS)
    for name, runtime in runtimes.items():
        if runtime["available"]:
            assert runtime["version"], name
            assert runtime["accelerator"] in ("kvm", "tcg"), name
            assert "fork" in runtime["features"], name
        else:
            assert runtime["reason"], name
            assert runtime["hint"], name
