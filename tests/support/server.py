"""A real server in a process of its own, and the official SDK as its client."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hypeman import Hypeman
from hypeman.lib.exec import exec as exec_in_guest

from stillframe.host.orphans import kill_orphans, processes_naming

READY = re.compile(rb"http://[\w.\[\]:]+")
START_DEADLINE = 60.0


class Server:
    """``stillframe serve`` on a data directory and a free port."""

    def __init__(
        self,
        data_dir: Path,
        *,
        environment: dict[str, str] | None = None,
        python: Sequence[str] = (sys.executable,),
    ) -> None:
        self.data_dir = data_dir
        self.command = (*python, "-m", "stillframe.cli.main")
        self.environment = {
            **os.environ,
            "STILLFRAME_DATA_DIR": str(data_dir),
            "STILLFRAME_LISTEN": "127.0.0.1:0",
            **(environment or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.clients: list[Hypeman] = []

    def start(self) -> None:
        """Start it and wait for its ready line."""
        self.log = (self.data_dir.parent / f"{self.data_dir.name}.log").open("ab")
        self.process = subprocess.Popen(
            [*self.command, "serve"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        assert self.process.stdout is not None
        line = self._ready_line()
        match = READY.search(line)
        assert match, f"no ready line but {line!r}; log: {Path(self.log.name).read_text()[-3000:]}"
        self.url = match[0].decode()

    def _ready_line(self) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(START_DEADLINE):
                return b""
        return self.process.stdout.readline()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()
        self.process = None
        return code

    def restart_after_kill(self) -> None:
        """kill -9, then start again on the same data directory."""
        self.stop(signal.SIGKILL)
        self.start()

    def token(self, *arguments: str) -> str:
        """A token printed by ``stillframe token``."""
        done = subprocess.run(
            [*self.command, "token", *arguments],
            env=self.environment, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return done.stdout.strip()

    def client(self) -> Hypeman:
        """The official SDK's client, with full access."""
        made = Hypeman(base_url=self.url, api_key=self.token(), timeout=120, max_retries=0)
        self.clients.append(made)
        return made

    def cli(self, *arguments: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command line client as a user of this machine would."""
        environment = {**self.environment, "STILLFRAME_URL": self.url}
        return subprocess.run(
            [*self.command, *arguments],
            env=environment, capture_output=True, text=True, input=input, timeout=300, check=False,
        )  # fmt: skip

    def vmm_pids(self) -> list[int]:
        """VMM processes that work on this data directory."""
        return [
            pid
            for pid in processes_naming(self.data_dir / "instances")
            if self.process is None or pid != self.process.pid
        ]


@contextlib.contextmanager
def running_server(
    data_dir: Path,
    *,
    environment: dict[str, str] | None = None,
    python: Sequence[str] = (sys.executable,),
) -> Iterator[Server]:
    """A server that is gone afterwards, with every VM it started, however the test ends."""
    server = Server(data_dir, environment=environment, python=python)
    try:
        server.start()
        yield server
    finally:
        for client in server.clients:
            client.close()
        if server.process is not None:
            server.stop()
        kill_orphans(data_dir / "instances", ())


def run_in(client: Hypeman, instance_id: str, *command: str, timeout: int = 60) -> str:
    """Run a command in a guest by the SDK's own exec; its output, which must be a success."""
    result = exec_in_guest(client, instance_id, command, timeout=timeout)
    output = result.output.decode()
    assert result.exit_code == 0, output
    return output


def wait_running(client: Hypeman, instance_id: str) -> None:
    """Wait until the instance is Running."""
    answer = client.instances.wait(instance_id, state="Running", api_timeout="4m")
    assert answer.state == "Running", answer


def reboot_in(client: Hypeman, instance_id: str) -> None:
    """Have the guest reset its machine, and wait until it has booted again."""
    boot = run_in(client, instance_id, "cat", "/proc/sys/kernel/random/boot_id")
    reset = "(sleep 0.2; echo b > /proc/sysrq-trigger) >/dev/null 2>&1 &"
    run_in(client, instance_id, "sh", "-c", reset)
    deadline = time.monotonic() + 120
    while client.instances.get(instance_id).state == "Running" and time.monotonic() < deadline:
        time.sleep(0.1)
    wait_running(client, instance_id)
    assert run_in(client, instance_id, "cat", "/proc/sys/kernel/random/boot_id") != boot


def eventually_empty(look: Callable[[], Sequence[object]], seconds: float = 30) -> None:
    """Look until nothing is left over (what a kill leaves takes a moment to go)."""
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not found
