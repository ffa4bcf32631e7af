"""A real server with the fake hypervisor, and the official SDK as its client."""

from __future__ import annotations

import itertools
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypeman import APIStatusError, Hypeman
from hypeman.types import Instance

SOURCE = Path(__file__).parents[2] / "src"
IMAGE = os.environ.get("STILLFRAME_CONTRACT_IMAGE", "stillframe/base")
HYPERVISOR = os.environ.get("STILLFRAME_CONTRACT_HYPERVISOR", "fake")
_READY = re.compile(r"stillframe ready on (http://\S+)")
_START_SECONDS = 60


@dataclass(frozen=True)
class Server:
    """A running server process."""

    url: str
    data_dir: Path

    def token(self, **claims: object) -> str:
        """A token signed with this server's own secret."""
        secret = (self.data_dir / "jwt-secret").read_text().strip()
        now = int(time.time())
        return jwt.encode({"sub": "t", "iat": now, "exp": now + 3600, **claims}, secret)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests; at the end nothing of it is left, whatever happened."""
    data_dir = tmp_path_factory.mktemp("data")
    command = [sys.executable, "-m", "stillframe.cli.main", "serve", "--listen", "127.0.0.1:0"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCE),
        "STILLFRAME_DATA_DIR": str(data_dir),
        "STILLFRAME_DEFAULT_HYPERVISOR": HYPERVISOR,
    }
    log = data_dir.with_suffix(".log")
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield Server(_ready_url(process, log), data_dir)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
            _end_machines(data_dir)


def _ready_url(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + _START_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([process.stdout], [], [], left)
        line = process.stdout.readline() if readable else ""
        if match := _READY.search(line):
            return match[1]
        if not line:
            break
    pytest.fail(f"the server did not become ready:\n{log.read_text()[-3000:]}")


def _end_machines(data_dir: Path) -> None:
    """End VMs that a failed test left: processes that name our own data directory."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            if str(data_dir).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.fixture
def sdk(server: Server) -> Iterator[Hypeman]:
    """The SDK with full access, and its own ways of retrying."""
    with Hypeman(api_key=server.token(), base_url=server.url) as sdk:
        yield sdk


_numbers = itertools.count(1)


@pytest.fixture
def fresh_name() -> Callable[[], str]:
    """Names that no other test uses."""
    return lambda: f"vm-{next(_numbers)}"


Maker = Callable[..., Instance]


@pytest.fixture
def make(sdk: Hypeman, fresh_name: Callable[[], str]) -> Iterator[Maker]:
    """Boots instances up to Running; whatever exists at the end of the test is deleted."""

    def make(**options: Any) -> Instance:
        wanted: dict[str, Any] = {
            "name": fresh_name(),
            "image": IMAGE,
            "size": "128MB",
            "overlay_size": "64MB",
            "vcpus": 1,
            "cmd": ["sleep", "infinity"],
        }
        made = sdk.instances.create(**{**wanted, **options})
        reached = sdk.instances.wait(made.id, state="Running", api_timeout="60s")
        assert reached.state == "Running", reached
        return sdk.instances.get(made.id)

    yield make
    for left in sdk.instances.list():
        sdk.instances.delete(left.id, graceful_shutdown=False)
    for snapshot in sdk.snapshots.list():
        sdk.snapshots.delete(snapshot.id)


@pytest.fixture
def refused() -> Callable[..., APIStatusError]:
    """Call something that must be refused: ``refused(status, code, call, *arguments)``."""

    def refused(
        status: int, code: str, call: Callable[..., Any], *arguments: Any, **keywords: Any
    ) -> APIStatusError:
        with pytest.raises(APIStatusError) as caught:
            call(*arguments, **keywords)
        body: Any = caught.value.body
        assert (caught.value.status_code, body["code"]) == (status, code), body
        assert isinstance(body["message"], str)
        return caught.value

    return refused
