"""kill -9 at random moments of a mixed load: what was answered as done must be there, and whole."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crash.stage import DEADLINE, ZSTD
from crash.world import Violation, World

_WORKERS = 3
_KEPT = 4  # snapshots that a worker keeps of its instance


@dataclass(slots=True)
class Shared:
    """One snapshot that all workers fork, and replace by another."""

    snapshot: str = ""
    turn: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class Load:
    """What one worker was promised: snapshots that must exist, and what its guest remembers."""

    world: World
    name: str
    random: random.Random
    shared: Shared
    instance: str = ""
    promised: set[str] = field(default_factory=set)
    made: int = 0  # forks and imports, to name them
    trouble: list[str] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)

    def work(self, ended: threading.Event) -> None:
        """Ask for one thing after another until the server is gone."""
        steps = (
            self._snapshot, self._fork, self._sleep, self._prune, self._compress,
            self._restore_in_place, self._export_and_import, self._run_schedule, self._fork_live,
            self._fork_shared, self._replace_shared,
        )  # fmt: skip
        try:
            while not ended.is_set():
                step = self.random.choice(steps)
                step()
                name = step.__name__.strip("_").replace("_", " ")
                self.done[name] = self.done.get(name, 0) + 1
        except ConnectionError:
            pass  # killed
        except Exception as error:
            self.trouble.append(f"{self.name}: {error!r}")

    def _ask(self, method: str, path: str, body: object = None, *, may_be: int = 0) -> Any:
        """The answer, which must be a success, or of the status ``may_be`` (None then)."""
        status, answer = self.world.request(method, path, body)
        if status == 0:
            raise ConnectionError
        if status == may_be:
            return None
        if not 200 <= status < 300:
            raise Violation(f"{method} {path} answered {status}: {answer}")
        return answer

    def _chosen(self) -> str | None:
        return self.random.choice(sorted(self.promised)) if self.promised else None

    def _fresh(self) -> str:
        self.made += 1
        return f"{self.name}-{self.made}"

    # -- the steps ----------------------------------------------------------------------------
    def _take(self, **wishes: object) -> str:
        path = f"/instances/{self.instance}/snapshots"
        taken: str = self._ask("POST", path, {"kind": "Standby", **wishes})["id"]
        return taken

    def _snapshot(self) -> None:
        self.promised.add(self._take())

    def _compress(self) -> None:
        self.promised.add(self._take(compression=ZSTD))

    def _prune(self) -> None:
        while len(self.promised) > _KEPT:
            # Asked for is as good as done: it may be gone, answered or not.
            self._ask("DELETE", f"/snapshots/{self.promised.pop()}")

    def _fork_and_delete(self, path: str, body: dict[str, object], *, may_be: int = 0) -> None:
        made = self._ask("POST", path, {"name": self._fresh(), **body}, may_be=may_be)
        if made is not None:
            self._ask("DELETE", f"/instances/{made['id']}?graceful_shutdown=false")

    def _fork(self) -> None:
        if (snapshot := self._chosen()) is not None:
            target = self.random.choice(["Running", "Standby", "Stopped"])
            self._fork_and_delete(f"/snapshots/{snapshot}/fork", {"target_state": target})

    def _fork_live(self) -> None:
        self._fork_and_delete(f"/instances/{self.instance}/fork", {"from_running": True})

    def _fork_shared(self) -> None:
        # Another worker may have deleted it just now: then there is none to fork.
        path, wish = f"/snapshots/{self.shared.snapshot}/fork", {"target_state": "Running"}
        self._fork_and_delete(path, dict(wish), may_be=404)

    def _replace_shared(self) -> None:
        taken = self._take()
        with self.shared.turn:
            old, self.shared.snapshot = self.shared.snapshot, taken
        self._ask("DELETE", f"/snapshots/{old}", may_be=404)  # asked for before a kill, perhaps

    def _sleep(self) -> None:
        self._ask("POST", f"/instances/{self.instance}/standby")
        self._ask("POST", f"/instances/{self.instance}/restore")

    def _restore_in_place(self) -> None:
        if (snapshot := self._chosen()) is not None:
            self._ask("POST", f"/instances/{self.instance}/standby")
            path = f"/instances/{self.instance}/snapshots/{snapshot}/restore"
            self._ask("POST", path, {"target_state": "Running"})

    def _export_and_import(self) -> None:
        if (snapshot := self._chosen()) is not None:
            self.promised.add(self._transfer(snapshot))

    def _transfer(self, snapshot: str) -> str:
        status, archive = self.world.transfer("GET", f"/snapshots/{snapshot}/export", None)
        if status == 200:
            path = f"/snapshots/import?name={self._fresh()}"
            status, answer = self.world.transfer("POST", path, archive)
            if status == 201:
                return str(json.loads(answer)["id"])
            archive = answer
        if status == 0:
            raise ConnectionError
        raise Violation(f"a transfer of {snapshot} answered {status}: {archive[:500]!r}")

    def _run_schedule(self) -> None:
        """A run that deletes the one before: no promise but that it does no harm."""
        path = f"/instances/{self.instance}/snapshot-schedule"
        self._ask("PUT", path, {"interval": "24h", "retention": {"max_count": 1}})
        self._ask("POST", f"{path}/run")

    # -- afterwards ---------------------------------------------------------------------------
    def settle(self) -> None:
        """Wait until the server has made up for what the last one had begun."""
        deadline = time.monotonic() + DEADLINE
        path = f"/instances/{self.instance}/snapshot-schedule"
        while time.monotonic() < deadline:
            status, schedule = self.world.request("GET", path)
            runs = status == 200 and "the server ended" in (schedule.get("last_error") or "")
            works = [
                s for s in self.world.must("GET", "/snapshots")
                if s.get("compression_state") == "compressing"
            ]  # fmt: skip
            if not runs and not works:
                return
            time.sleep(0.02)
        raise Violation(f"{self.name} does not settle: {schedule}")

    def check(self) -> None:
        """All that was promised is there, and the guest has its memory."""
        known = {s["id"] for s in self.world.must("GET", "/snapshots")}
        if lost := ({*self.promised, self.shared.snapshot}) - known:
            raise Violation(f"lost snapshots: {sorted(lost)}")
        for other in self.world.must("GET", "/instances"):
            if other["name"].startswith(f"{self.name}-"):
                self.world.delete(other["name"])
        state = self.world.must("GET", f"/instances/{self.instance}")["state"]
        if state == "Standby":
            self.world.must("POST", f"/instances/{self.instance}/restore")
        self.world.expect(self.instance, "Running", self.name)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to: snapshots promised, and how often each step was done to its end."""

    promised: int
    steps: dict[str, int]


def kill_at_random(
    world: World, rounds: int, seed: int, report: Callable[[str], None] = lambda _: None
) -> Outcome:
    """``rounds`` kills of a started server. Raises Violation."""
    source, shared = random.Random(seed), Shared()
    loads = [Load(world, f"w{n}", random.Random(source.random()), shared) for n in range(_WORKERS)]
    for load in loads:
        load.instance = world.boot(load.name, load.name)
    shared.snapshot = loads[0]._take()
    seen: set[str] = set()
    for number in range(1, rounds + 1):
        ended = threading.Event()
        threads = [threading.Thread(target=load.work, args=(ended,)) for load in loads]
        for thread in threads:
            thread.start()
        time.sleep(source.uniform(0.05, 1.5))  # the moment of the kill: any will do
        world.server.signal(signal.SIGKILL)
        ended.set()
        for thread in threads:
            thread.join()
        world.restart()
        for load in loads:
            load.settle()
        world.quiet()
        world.check_everything()
        for load in loads:
            load.check()
            if load.trouble:
                raise Violation("; ".join(load.trouble))
            seen |= load.promised
        report(f"kill {number} of {rounds}: {len(seen)} snapshots promised, none lost")
    steps = Counter[str]()
    for load in loads:
        steps.update(load.done)
    return Outcome(len(seen), dict(steps))
