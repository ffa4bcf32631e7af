"""The whole without privileges: a server of a user who is not root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, eventually_empty, run_in, running_server, wait_running
from support.userland import layers

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
    pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)"),
]

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
BECOME = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs")
KILL = (
    "import sys; from pathlib import Path; from stillframe.host.orphans import kill_orphans; "
    "kill_orphans(Path(sys.argv[1]), ())"
)


def python_of_everybody(environment: dict[str, str]) -> str:
    """A Python that the user may run and that can import all of this; skips when there is none."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    probe = ["-c", "import stillframe.api.server, typer"]
    for candidate in (sys.executable, f"/usr/bin/{version}"):
        done = subprocess.run(
            [*BECOME, candidate, *probe], env=environment, capture_output=True, check=False,
            timeout=60, cwd="/",
        )  # fmt: skip
        if done.returncode == 0:
            return candidate
    pytest.skip("an ordinary user can read neither this Python's home nor a system Python's")


def vmm_users(directory: Path) -> list[int]:
    """The users of the processes that work on files below ``directory``."""
    users = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(directory) + b"/instances/" in (process / "cmdline").read_bytes():
                users.append(process.stat().st_uid)
        except OSError:
            continue  # it ended meanwhile
    return users


@pytest.fixture
def users_server() -> Iterator[Server]:
    """A server of ``nobody`` with a home of its own."""
    # Not below pytest's own directories: nobody else may enter those.
    home = Path(tempfile.mkdtemp(prefix="sf-", dir="/tmp"))
    packages = sysconfig.get_path("purelib")
    environment = {
        "HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{packages}", "PATH": os.environ["PATH"],
        "XDG_DATA_HOME": "", "XDG_CONFIG_HOME": "",
    }  # fmt: skip
    try:
        os.chown(home, NOBODY, NOBODY)
        python = python_of_everybody({**os.environ, **environment})
        try:
            with running_server(
                home / "data", environment=environment, python=(*BECOME, python)
            ) as running:
                yield running
        finally:
            subprocess.run(
                [*BECOME, python, "-c", KILL, str(home / "data" / "instances")],
                env=environment, check=True, timeout=60,
            )  # fmt: skip
            eventually_empty(lambda: vmm_users(home / "data"))
    finally:
        shutil.rmtree(home)


def test_an_ordinary_user_boots_freezes_and_forks(users_server: Server) -> None:
    assert users_server.data_dir.stat().st_uid == NOBODY
    client = users_server.client()
    tree = users_server.data_dir.parent / "tree.tar"
    tree.write_bytes(layers()[0])
    imported = users_server.cli("image", "import", "test/owned", str(tree))
    assert imported.returncode == 0, imported.stderr
    made = client.instances.create(
        name="mine", image="test/owned", cmd=["/bin/sleep", "10000"],
        size="256MB", overlay_size="1GB", vcpus=1,
    )  # fmt: skip
    wait_running(client, made.id)
    assert vmm_users(users_server.data_dir) == [NOBODY]
    owners = run_in(client, made.id, "stat", "-c", "%u:%g %a", "/", "/srv/data", "/srv/null")
    assert owners.splitlines() == ["0:0 755", "1234:2345 640", "3:4 666"]
    token = run_in(client, made.id, "sh", "-c", "cat /proc/sys/kernel/random/uuid > /dev/shm/t; "
                   "cat /dev/shm/t")  # fmt: skip
    snapshot = client.instances.snapshots.create(made.id, kind="Standby")
    fork = client.snapshots.fork(snapshot.id, name="fork")
    assert fork.state == "Running"
    assert run_in(client, fork.id, "cat", "/dev/shm/t") == token

    users_server.restart_after_kill()  # its VMs are now nobody's children
    client = users_server.client()
    assert run_in(client, made.id, "cat", "/dev/shm/t") == token
    again = client.instances.snapshots.create(fork.id, kind="Standby")
    client.instances.standby(made.id)
    assert client.instances.restore(made.id).state == "Running"
    assert run_in(client, made.id, "cat", "/dev/shm/t") == token

    for instance in (made, fork):
        client.instances.delete(instance.id)
    for kept in (snapshot, again):
        client.snapshots.delete(kept.id)
    eventually_empty(lambda: vmm_users(users_server.data_dir))
    for room in ("instances", "snapshots"):
        assert list((users_server.data_dir / room).iterdir()) == []
