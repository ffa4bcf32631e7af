"""kill -9 of the server with VMs running: they run on, and the next server adopts them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from support.server import Server, eventually_empty, run_in, running_server, wait_running

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that this test may kill."""
    with running_server(tmp_path / "data") as running:
        yield running
    eventually_empty(running.vmm_pids)


def test_vms_outlive_the_server_and_are_adopted(own_server: Server) -> None:
    client = own_server.client()
    source = client.instances.create(
        name="source", image="stillframe/base", size="256MB", overlay_size="1GB", vcpus=1
    )
    wait_running(client, source.id)
    run_in(client, source.id, "sh", "-c", "echo secret > /run/memory-only")
    snapshot = client.instances.snapshots.create(source.id, kind="Standby")
    fork = client.snapshots.fork(snapshot.id, name="fork")
    micro = client.instances.create(
        name="micro", image="stillframe/base", size="256MB", overlay_size="1GB", vcpus=1,
        hypervisor=cast(Any, "qemu-microvm"),
    )  # fmt: skip
    wait_running(client, micro.id)
    run_in(client, micro.id, "sh", "-c", "echo secret > /run/memory-only")
    pids = own_server.vmm_pids()
    assert len(pids) == 3

    own_server.restart_after_kill()
    client = own_server.client()
    assert sorted(own_server.vmm_pids()) == sorted(pids)
    for identifier in (source.id, fork.id, micro.id):
        assert client.instances.get(identifier).state == "Running"
        assert run_in(client, identifier, "cat", "/run/memory-only").strip() == "secret"
    assert [s.id for s in client.snapshots.list()] == [snapshot.id]
    assert client.snapshots.fork(snapshot.id, name="after").state == "Running"


def test_a_vm_that_died_while_no_server_ran_is_found_stopped(own_server: Server) -> None:
    client = own_server.client()
    instance = client.instances.create(
        name="mortal", image="stillframe/base", size="256MB", overlay_size="1GB", vcpus=1
    )
    wait_running(client, instance.id)
    (pid,) = own_server.vmm_pids()
    own_server.stop(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    own_server.start()
    client = own_server.client()
    assert client.instances.get(instance.id).state == "Stopped"
    client.instances.start(instance.id)
    wait_running(client, instance.id)
    assert run_in(client, instance.id, "hostname").strip() == "mortal"


def test_a_vmm_that_dies_is_noticed_at_once(own_server: Server) -> None:
    client = own_server.client()
    instance = client.instances.create(
        name="victim", image="stillframe/base", size="256MB", overlay_size="1GB", vcpus=1
    )
    wait_running(client, instance.id)
    (pid,) = own_server.vmm_pids()
    os.kill(pid, signal.SIGKILL)
    assert client.instances.wait(instance.id, state="Stopped", api_timeout="1m").state == "Stopped"


def test_a_second_server_on_the_same_directory_is_refused(own_server: Server) -> None:
    second = own_server.cli("serve", "--data-dir", str(own_server.data_dir))
    assert second.returncode != 0
    assert "another" in second.stderr or "already" in second.stderr
