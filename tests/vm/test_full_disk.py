"""A full file system: QEMU has the guest stand still, and it goes on when there is space again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.engine.space import LACKS_SPACE
from support.server import Server, eventually_empty, run_in, running_server, wait_running

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

BALLAST = 48 << 20
WRITING = "dd if=/dev/urandom of=/pattern bs=1M count=48 && sync && sha256sum /pattern >/sum"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 MiB, on which a test may fill everything.

    No tmpfs: there the holes of a memory image take room once they are read.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    disk, mount = tmp_path / "disk", tmp_path / "small"
    mount.mkdir()
    with disk.open("wb") as file:
        file.truncate(128 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(disk)], check=True, timeout=60)
    mounted = subprocess.run(
        ["mount", "-o", "loop", str(disk), str(mount)], check=False, capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=60)


@pytest.fixture
def server(small: Path) -> Iterator[Server]:
    """A server whose data directory is there."""
    environment = {"STILLFRAME_LIMITS_MIN_FREE": "0"}
    with running_server(small / "data", environment=environment) as running:
        yield running
    eventually_empty(running.vmm_pids)


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """Instead of the shared server's: this one and its file system are gone afterwards."""


def test_a_write_waits_for_space_and_is_whole_then(server: Server, small: Path) -> None:
    client = server.client()
    instance = client.instances.create(
        name="full", image="stillframe/base", size="256MB", overlay_size="1GB", vcpus=1
    )
    wait_running(client, instance.id)
    with (small / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, BALLAST)
    run_in(client, instance.id, "sh", "-c", f"({WRITING}) >/dev/null 2>&1 &")

    def error() -> str | None:
        return client.instances.get(instance.id).state_error

    eventually_empty(lambda: [] if error() == LACKS_SPACE else ["no word of it"], 120)
    assert client.instances.get(instance.id).state == "Running"
    server.restart_after_kill()  # the next server finds it as it is
    client = server.client()
    assert error() == LACKS_SPACE
    (small / "ballast").unlink()
    eventually_empty(lambda: [error()] if error() else [], 120)
    waited = "while ! test -s /sum; do sleep 0.2; done; sha256sum -c /sum"
    assert "OK" in run_in(client, instance.id, "sh", "-c", waited, timeout=180)
    client.instances.delete(instance.id, graceful_shutdown=False)
