"""Real guests: one server for the whole run, and images built once."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypeman import Hypeman

from support.server import Server, eventually_empty, running_server, wait_running

ROOT = Path(__file__).resolve().parents[2]
PATTERN = ROOT / "tests/guest/pattern.c"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the real hypervisor; at its end no VMM and no instance directory is left."""
    data_dir = tmp_path_factory.mktemp("vm") / "data"
    with running_server(data_dir) as running:
        yield running
    eventually_empty(running.vmm_pids)


@pytest.fixture(scope="session")
def client(server: Server) -> Hypeman:
    """The official SDK, talking to that server."""
    return server.client()


@pytest.fixture(autouse=True)
def nothing_left(server: Server, client: Hypeman) -> Iterator[None]:
    """Every test starts and ends without instances, snapshots, VMMs, sockets or files."""
    yield
    for instance in client.instances.list():
        client.instances.delete(instance.id, graceful_shutdown=False)
    for snapshot in client.snapshots.list():
        client.snapshots.delete(snapshot.id)
    assert list((server.data_dir / "instances").iterdir()) == []
    assert list((server.data_dir / "snapshots").iterdir()) == []
    eventually_empty(server.vmm_pids)


@pytest.fixture
def name() -> str:
    """A name nobody else uses."""
    return f"vm-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def running(client: Hypeman, name: str) -> str:
    """The id of a small Running instance of the built-in image."""
    instance = client.instances.create(
        name=name, image="stillframe/base", size="256MB", overlay_size="1GB", vcpus=1
    )
    wait_running(client, instance.id)
    return instance.id


@pytest.fixture(scope="session")
def redis_rootfs() -> Path:
    """A Debian userland with redis-server as a tar, made by mmdebstrap and kept for later runs."""
    archive = ROOT / ".cache" / "debian-redis.tar"
    if not archive.exists():
        assert shutil.which("mmdebstrap"), "mmdebstrap is missing: run `make setup`"
        building = archive.with_suffix(".new")
        excluded = [f"--dpkgopt=path-exclude=/usr/share/{p}/*" for p in ("doc", "man", "locale")]
        subprocess.run(
            ["mmdebstrap", "--variant=minbase", "--include=redis-server,redis-tools",
             "--format=tar", *excluded, "bookworm", str(building)],
            check=True, capture_output=True, timeout=900,
        )  # fmt: skip
        building.rename(archive)
    return archive


@pytest.fixture(scope="session")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest program of tests/guest/pattern.c, statically linked."""
    assert shutil.which("musl-gcc"), "musl-gcc is missing: run `make setup`"
    binary = tmp_path_factory.mktemp("guest") / "pattern"
    subprocess.run(
        ["musl-gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE",
         "-static", "-s", "-o", str(binary), str(PATTERN)],
        check=True, timeout=120,
    )  # fmt: skip
    return binary
