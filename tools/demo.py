"""What Stillframe is for, in one run: snapshot a working VM, fork it three times, watch them part.

Starts a server on a temporary data directory, boots a VM, lets it count in memory, captures it
while it counts, forks three VMs from the capture, and proves that each went on from the captured
value, that each then diverges, and that the source never stopped. Whatever happens, Ctrl-C
included, the VMs, the server and the directory are gone afterwards. Exit code 1 if a check fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stillframe.cli.client import Client, instance_path
from stillframe.cli.commands.exec import run_command
from stillframe.model.errors import HostFailure, StillframeError

FORKS = ("fork-1", "fork-2", "fork-3")
# The counter and the token live in the shell's memory only; a fork that shows the same token and
# no missing number went on from the captured memory. `usleep` keeps the tick short.
WORKLOAD = (
    "read token < /proc/sys/kernel/random/uuid; i=0; while :; do i=$((i+1)); "
    'echo "$i $token" >> /root/ticks; echo $i > /root/count.new; '
    "mv /root/count.new /root/count; usleep 50000; done"
)
WATCH = "while :; do cat /root/count; usleep 40000; done"
console = Console(stderr=True)


@dataclass
class Report:
    """Milliseconds by phase and checks by name, as they come in."""

    phases: list[tuple[str, float, str]] = field(default_factory=list)
    checks: list[tuple[bool, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a phase; ``server_ms`` put into the yielded dict become its detail."""
        answer: dict[str, Any] = {}
        began = time.perf_counter()
        with console.status(name):
            yield answer
        took = (time.perf_counter() - began) * 1000
        timings = answer.get("timings_ms") or {}
        detail = ", ".join(f"{k} {v:.0f}" for k, v in timings.items() if v >= 0.5)
        self.phases.append((name, took, detail))
        console.print(f"[green]✓[/] {name} [dim]{took:.0f} ms[/]")

    def check(self, good: bool, text: str) -> None:
        """Record a check and say it at once."""
        self.checks.append((good, text))
        console.print(f"[{'green' if good else 'red'}]{'✓' if good else '✗'}[/] {text}")

    def print(self) -> None:
        """The table of phases."""
        table = Table(title="Where the time went", title_justify="left")
        table.add_column("phase")
        table.add_column("ms", justify="right")
        table.add_column("of which, as the server says (ms)", overflow="fold")
        for name, took, detail in self.phases:
            table.add_row(name, f"{took:.0f}", detail)
        Console().print(table)


class Watcher:
    """Sees the source count from outside, and keeps the longest time without a new value."""

    def __init__(self, client: Client, instance: str) -> None:
        self.largest_gap_ms = 0.0
        self.seen = 0
        self._client, self._instance = client, instance
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End watching."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        import json

        last_value, last_time = -1, time.perf_counter()
        with (
            contextlib.suppress(StillframeError, TimeoutError),
            self._client.websocket(instance_path(self._instance, "exec")) as connection,
        ):
            connection.send(json.dumps({"command": ["/bin/sh", "-c", WATCH], "tty": False}))
            while not self._stop.is_set():
                frame = connection.recv(timeout=10)
                # Text is the exit code; a chunk may end in the middle of a number.
                lines = b"" if isinstance(frame, str) else frame[: frame.rfind(b"\n") + 1]
                values = [int(word) for word in lines.split()]
                if values and values[-1] > last_value:
                    now = time.perf_counter()
                    if self.seen:
                        gap = (now - last_time) * 1000
                        self.largest_gap_ms = max(self.largest_gap_ms, gap)
                    last_value, last_time = values[-1], now
                    self.seen += 1


def main() -> int:
    """Run the demonstration; 0 if every check held."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in ("STILLFRAME_TOKEN", "HYPEMAN_API_KEY", "STILLFRAME_CONFIG"):
        os.environ.pop(name, None)  # They belong to another server than the one made here.
    report = Report()
    directory = Path(tempfile.mkdtemp(prefix="stillframe-demo-"))
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(_remove_everything, directory)
            client = stack.enter_context(_server(directory, report))
            stack.callback(_delete_instances, client)
            _demonstrate(client, report)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left behind")
        return 130
    except StillframeError as error:
        console.print(f"[red]error:[/] {error.message} (hint: {error.hint})")
        return 1
    report.print()
    failed = [text for good, text in report.checks if not good]
    console.print(f"{len(report.checks) - len(failed)} of {len(report.checks)} checks held")
    return 1 if failed else 0


def _demonstrate(client: Client, report: Report) -> None:
    with report.phase("boot a VM of stillframe/base") as answer:
        body = {"name": "source", "image": "stillframe/base", "size": "256MB", "vcpus": 1}
        client.request("POST", "/instances", body=body)
        _wait_running(client, "source")
        answer.update(client.request("GET", instance_path("source")))
    # A session of its own outlives the command that starts it, which waits until it is there.
    start = f"setsid sh -c '{WORKLOAD}' >/dev/null 2>&1 </dev/null &"
    _shell(client, "source", f"{start} until [ -e /root/count ]; do usleep 20000; done")
    with report.phase("let it count to 40"):
        _until(lambda: _count(client, "source") >= 40)
    with Watcher(client, "source") as watcher:
        _until(lambda: watcher.seen >= 3)
        before = _count(client, "source")
        with report.phase("snapshot it while it counts") as answer:
            body = {"kind": "Standby", "name": "counting"}
            snapshot = client.request("POST", "/instances/source/snapshots", body=body)
            answer.update(snapshot)
        after = _count(client, "source")
        console.print(
            f"  captured between {before} and {after}; the guest stood still for "
            f"{snapshot.get('pause_ms') or 0:.1f} ms"
        )
        first = _fork(client, report, snapshot["id"])
        seen = watcher.seen
        _until(lambda: watcher.seen > seen)
    _check_forks(client, report, first, before)
    _check_divergence(client, report)
    ticks = _ticks(client, "source")
    complete = [n for n, _ in ticks] == list(range(1, len(ticks) + 1))
    report.check(
        complete and len(ticks) > after,
        f"the source never stopped: {len(ticks)} ticks, none missing, "
        f"largest gap seen from outside {watcher.largest_gap_ms:.0f} ms",
    )


def _fork(client: Client, report: Report, snapshot: str) -> dict[str, int]:
    """Fork three VMs; the first count each shows."""
    first = {}
    for name in FORKS:
        with report.phase(f"fork {name} to its first command") as answer:
            answer.update(
                client.request("POST", f"/snapshots/{snapshot}/fork", body={"name": name})
            )
            _wait_running(client, name)
            first[name] = _count(client, name)
    return first


def _check_forks(client: Client, report: Report, first: dict[str, int], before: int) -> None:
    token = _ticks(client, "source")[0][1]
    for name in FORKS:
        ticks = _ticks(client, name)
        same = {word for _, word in ticks} == {token}
        unbroken = [n for n, _ in ticks] == list(range(1, len(ticks) + 1))
        report.check(
            same and unbroken and first[name] >= before and len(ticks) > before,
            f"{name} went on from the snapshot: first read {first[name]}, now {len(ticks)}, "
            "the same process, no number missing",
        )


def _check_divergence(client: Client, report: Report) -> None:
    for name in ("source", *FORKS):
        _shell(client, name, f"echo 'only in {name}' > /root/note")
    notes = {name: _shell(client, name, "cat /root/note").strip() for name in ("source", *FORKS)}
    report.check(
        all(note == f"only in {name}" for name, note in notes.items()),
        f"each has its own disk and memory: {', '.join(notes.values())}",
    )
    counts = {name: _count(client, name) for name in ("source", *FORKS)}
    _until(lambda: all(_count(client, name) > counts[name] for name in counts))
    report.check(True, "all four go on counting, each for itself: "
                 + ", ".join(f"{name} {count}" for name, count in counts.items()))  # fmt: skip


def _shell(client: Client, instance: str, script: str) -> str:
    code, output = run_command(client, instance, ["/bin/sh", "-c", script])
    if code != 0:
        raise HostFailure(f"{script[:60]!r} in {instance}: exit {code}: {output[-200:]!r}")
    return output.decode("utf-8", "replace")


def _count(client: Client, instance: str) -> int:
    text = _shell(client, instance, "cat /root/count 2>/dev/null || echo 0").strip()
    return int(text or 0)


def _ticks(client: Client, instance: str) -> list[tuple[int, str]]:
    lines = _shell(client, instance, "cat /root/ticks").splitlines()
    # The last line may be half written when it is read.
    return [(int(n), token) for n, _, token in (line.partition(" ") for line in lines[:-1])]


def _until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise HostFailure(
                f"nothing changed for {seconds:.0f} s", hint="is the host overloaded?"
            )
        time.sleep(0.05)


def _wait_running(client: Client, name: str) -> None:
    query = {"state": "Running", "timeout": "60s"}
    answer = client.request("GET", instance_path(name, "wait"), query=query)
    if answer["state"] != "Running":
        log = [str(line) for line in client.events(instance_path(name, "logs"), {"tail": "5"})]
        raise HostFailure(f"{name} is {answer['state']}", hint=" | ".join(log) or "see its log")


@contextlib.contextmanager
def _server(directory: Path, report: Report) -> Iterator[Client]:
    """A server of our own on a free port; ended with SIGTERM."""
    log = directory / "server.log"
    command = [sys.executable, "-m", "stillframe.cli.main", "serve", "--data-dir",
               str(directory / "data"), "--listen", "127.0.0.1:0"]  # fmt: skip
    with contextlib.ExitStack() as stack:
        with report.phase("start a server on an empty directory"):
            errors = stack.enter_context(log.open("wb"))
            # A session of its own: a Ctrl-C reaches us, and we end it in order.
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
            stack.callback(_end, process)
            assert process.stdout is not None
            ready = process.stdout.readline().decode()
            if not ready.startswith("stillframe ready on "):
                raise HostFailure("the server did not start", hint=log.read_text()[-500:])
        client = Client(url=ready.split()[3], data_dir=directory / "data")
        stack.callback(client.close)
        yield client


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


def _delete_instances(client: Client) -> None:
    with contextlib.suppress(StillframeError), ThreadPoolExecutor(4) as pool:
        ids = [instance["id"] for instance in client.request("GET", "/instances")]
        query = {"graceful_shutdown": "false"}
        list(pool.map(lambda i: client.request("DELETE", instance_path(i), query=query), ids))


def _remove_everything(directory: Path) -> None:
    """Kill what still names the directory (a VMM outlives its server by design), remove it."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if str(directory).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
