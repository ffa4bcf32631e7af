"""What the measurements share: a server with the guests' image, its VMs, and the clocks."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.client import Client, NotThere, Reply
from bench.echo import GATEWAY, Echo, Window
from bench.floor import FloorRun, measure_floor
from bench.guest_image import NAME, import_image
from bench.hand import Hand
from bench.peer import PeerVm, remove
from bench.server import running_server, vmm_pids
from stillframe.model.values import Hypervisor
from stillframe.store.paths import DataDirectory
from stillframe.vmm.qemu.boards import BOARDS

Json = dict[str, Any]
_SETTLE_SECONDS = 0.5  # after a fork or boot, until its guest is as busy as it will be
_WARM_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Guest:
    """A kind of guest: memory, how much of it is filled, and how much is rewritten a second (MiB).

    Unless filled, it idles after its boot.
    """

    memory_mib: int
    used_mib: int = 0
    rate_mib: int = 0
    hypervisor: str = "qemu"

    @property
    def label(self) -> str:
        """How the table calls it."""
        gib = self.memory_mib / 1024
        size = f"{gib:.0f} GiB" if gib >= 1 else f"{self.memory_mib} MiB"
        used = f", {self.used_mib} MB used" if self.used_mib else ""
        rate = f", {self.rate_mib} MB/s rewritten" if self.rate_mib else ""
        return size + used + rate + ("" if self.hypervisor == "qemu" else f", {self.hypervisor}")


SMALL, LARGE = Guest(256), Guest(4096)
USED = Guest(1024, used_mib=200)


@dataclass(frozen=True, slots=True)
class ForkTimes:
    """A fork over HTTP, in milliseconds since the request, and the phases the server tells."""

    running_ms: float
    answer_ms: float
    usable_ms: float
    timings_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Gaps:
    """What a guest missed: its largest gap around an action, and in an equal window without."""

    during: Window
    noise: Window


@dataclass
class Lab:
    """One server and everything started for it. ``directory`` holds its data and our files."""

    directory: Path
    client: Client
    echo: Echo
    runs: int
    quick: bool
    has_resumed_at: bool = True
    about: Json = field(default_factory=dict)  # the VM booted last: of which QEMU, how accelerated
    command_differences: list[str] = field(default_factory=list)
    _names: Iterator[int] = field(default_factory=itertools.count)
    _snapshots: dict[Guest, Json] = field(default_factory=dict)
    _seconds: dict[Guest, Json] = field(default_factory=dict)
    _hands: dict[Guest, Hand] = field(default_factory=dict)

    @property
    def data(self) -> DataDirectory:
        """The server's data directory."""
        return DataDirectory(self.directory / "data")

    def name(self, what: str) -> str:
        """A name that was not given yet."""
        return f"{what}-{next(self._names)}"

    def say(self, text: str) -> None:
        """A line for whoever waits."""
        print(f"  {text}", file=sys.stderr, flush=True)

    # -- VMs of the server ------------------------------------------------------------------------
    def boot(self, guest: Guest) -> Json:
        """A running VM of that kind, its memory filled and its writer at work."""
        reply = self.client.request(
            "POST", "/instances",
            {"name": self.name("vm"), "image": NAME, "size": f"{guest.memory_mib}MB", "vcpus": 1,
             "cmd": ["/bin/sleep", "2147483647"], "hypervisor": guest.hypervisor},
        )  # fmt: skip
        instance: str = reply.body["id"]
        state = self.client.request("GET", f"/instances/{instance}/wait?state=Running&timeout=240s")
        if state.body["state"] != "Running":
            raise RuntimeError(f"a VM is {state.body['state']} instead of Running")
        if guest.used_mib:
            self.client.must_run(instance, "dirty", str(guest.used_mib), str(guest.rate_mib))
        booted: Json = self.client.request("GET", f"/instances/{instance}").body
        if guest.hypervisor == "qemu":
            self.about = booted
        if Hypervisor(guest.hypervisor) in BOARDS:
            self._hands.setdefault(guest, Hand.like(self.data, booted))
        return booted

    def missing(self, hypervisor: str) -> str | None:
        """Why the server has no such hypervisor; None if it has."""
        runtimes = self.client.request("GET", "/capabilities").body["runtimes"]
        found: Json = next(one for one in runtimes if one["name"] == hypervisor)
        return None if found["available"] else str(found["reason"])

    def snapshot(self, instance: str) -> Reply:
        """A Standby snapshot of a running VM."""
        return self.client.request("POST", f"/instances/{instance}/snapshots", {"kind": "Standby"})

    def snapshot_of(self, guest: Guest) -> Json:
        """A snapshot of such a guest, always the same; its source is gone."""
        if guest not in self._snapshots:
            self.say(f"preparing snapshots of a guest with {guest.label}")
            source = self.boot(guest)
            time.sleep(_SETTLE_SECONDS)
            first, second = (self.snapshot(source["id"]).body for _ in range(2))
            self._snapshots[guest], self._seconds[guest] = first, second
            self.client.delete(source["id"])
        return self._snapshots[guest]

    def snapshot_to_warm(self, guest: Guest) -> Json:
        """Another snapshot of the same guest, so that warm and cold forks can take turns."""
        self.snapshot_of(guest)
        return self._seconds[guest]

    def fork(self, snapshot: Json) -> Reply:
        """One fork over HTTP."""
        reply = self.client.request(
            "POST", f"/snapshots/{snapshot['id']}/fork", {"name": self.name("fork")}
        )
        self.note_clock(reply.body)
        return reply

    def fork_and_pid(self, snapshot: Json) -> tuple[str, int]:
        """One fork over HTTP: its id, and the process that was not there before."""
        before = vmm_pids(self.data.root)
        instance: str = self.fork(snapshot).body["id"]
        new = vmm_pids(self.data.root) - before
        if len(new) != 1:
            raise RuntimeError(f"a fork started {len(new)} processes on its data instead of one")
        return instance, new.pop()

    def note_clock(self, instance: Json) -> None:
        """Remember when an answer lacks the moment of ``cont``: the rows must say so."""
        self.has_resumed_at &= instance.get("resumed_at") is not None

    def clock_notes(self) -> list[str]:
        """What a row about running guests must say of its clock."""
        if self.has_resumed_at:
            return []
        return ["running is taken at the HTTP answer: the server does not tell when `cont` was"]

    def clear(self) -> None:
        """Remove every VM that a failed measurement left running."""
        for instance in self.client.request("GET", "/instances").body:
            self.client.delete(instance["id"])

    def timed_fork(self, snapshot: Json) -> ForkTimes:
        """One fork over HTTP to running, answered and usable; it is gone on return."""
        reply = self.fork(snapshot)
        code, output, ended = self.client.run(reply.body["id"], "/bin/true")
        if code != 0:
            raise RuntimeError(f"a fork is not usable: exit {code}: {output}")
        times = ForkTimes(
            reply.running_ms, reply.answer_ms, reply.since_sent_ms(ended),
            reply.body.get("timings_ms", {}),
        )  # fmt: skip
        self.client.delete(reply.body["id"])
        return times

    def verify_fork(self, snapshot: Json) -> None:
        """Fork a filled guest and have it compare all its pages. Raises RuntimeError."""
        fork = self.fork(snapshot).body["id"]
        self.client.must_run(fork, "dirty", "ask", "verify")
        self.client.delete(fork)

    def keep_warm(self, snapshot: Json, count: int) -> Json:
        """Ask for warm forks and wait until all are ready. Raises NotThere."""
        path = f"/snapshots/{snapshot['id']}/warm"
        status: Json = self.client.request_new("PUT", path, {"count": count}).body
        deadline = time.monotonic() + _WARM_SECONDS
        while status["ready"] < count or status.get("filling"):
            if status.get("limited_by") and not status.get("filling"):
                raise NotThere(f"only {status['ready']} of {count} warm: {status['limited_by']}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{count} warm forks were not ready in time: {status}")
            time.sleep(0.05)
            status = self.client.request("GET", path).body
        return status

    # -- VMs by hand ------------------------------------------------------------------------------
    def hand_for(self, guest: Guest) -> Hand:
        """How to start such a guest by hand; checked against what the server runs."""
        if guest not in self._hands:
            self.snapshot_of(guest)
        return self._hands[guest]

    def floor(self, guest: Guest, snapshot: Json) -> FloorRun:
        """The floor once; nothing of it is left on return."""
        directory = self.directory / self.name("floor")
        try:
            state = self.hand_for(guest).prepare_fork(snapshot["id"], directory)
            command = self.hand_for(guest).command(directory, state)
            return measure_floor(command, directory, state)
        finally:
            remove(directory)

    @contextlib.contextmanager
    def peer(self, guest: Guest) -> Iterator[tuple[PeerVm, int]]:
        """A VM for the peers' way, standing still, and the token it ticks with."""
        token = self.echo.new_token()
        directory = self.directory / self.name("peer")
        vm = PeerVm(
            self.hand_for(guest), directory, used_mib=guest.used_mib, rate_mib=guest.rate_mib,
            token=token, port=self.echo.port,
        )  # fmt: skip
        try:
            self.echo.await_guest(token)
            time.sleep(_SETTLE_SECONDS)
            vm.stand()
            yield vm, token
        finally:
            vm.close()
            remove(directory)

    def compare_command_lines(self, guest: Guest, snapshot: Json) -> None:
        """Remember how the floor's command line differs from that of the server's VMM."""
        fork, pid = self.fork_and_pid(snapshot)
        self.command_differences = self.hand_for(guest).differs_from_server(fork, pid)
        self.client.delete(fork)

    # -- pauses -----------------------------------------------------------------------------------
    def start_ticks(self, instance: str) -> int:
        """Have a VM of the server tick; its token."""
        token = self.echo.new_token()
        self.client.must_run(instance, "ticks", str(token), GATEWAY, str(self.echo.port))
        self.echo.await_guest(token)
        time.sleep(_SETTLE_SECONDS)
        return token

    def gaps(self, token: int, action: Callable[[], object], seconds: float) -> Gaps:
        """What the ticking guest misses by ``action``, beside a quiet window of ``seconds`` before.

        The window of the action lasts at least as long, and some time beyond the action's end.
        """
        with self.echo.window(token) as noise:
            time.sleep(seconds)
        with self.echo.window(token) as during:
            began = time.monotonic()
            action()
            time.sleep(max(0.1, seconds - (time.monotonic() - began)))
        return Gaps(during[0], noise[0])


def alternate(runs: int, steps: Sequence[Callable[[], None]], say: Callable[[str], None]) -> None:
    """Do every step ``runs`` times, taking turns, each time beginning with another one.

    So the host's moods, and what one step leaves behind for the next, hit all alike.
    """
    for run in range(runs):
        for index in range(len(steps)):
            steps[(run + index) % len(steps)]()
        if (run + 1) % 5 == 0 or run + 1 == runs:
            say(f"{run + 1} of {runs}")


@contextlib.contextmanager
def open_lab(directory: Path, *, runs: int, quick: bool) -> Iterator[Lab]:
    """A lab in ``directory``; its server and VMs are gone afterwards."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(running_server(directory))
        echo = Echo()
        stack.callback(echo.close)
        import_image(client, directory)
        yield Lab(directory, client, echo, runs, quick)
