"""kill -9 at random moments of a mixed load: what was answered as done must be there, and whole."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from crash.world import Violation, World

_WORKERS = 3
_KEPT = 4  # snapshots that a worker keeps of its instance


@dataclass(slots=True)
class Load:
    """What one worker was promised: snapshots that must exist, and what its guest remembers."""

    world: World
    name: str
    random: random.Random
    instance: str = ""
    promised: set[str] = field(default_factory=set)
    forks: int = 0
    trouble: list[str] = field(default_factory=list)

    def work(self, ended: threading.Event) -> None:
        """Ask for one thing after another until the server is gone."""
        try:
            while not ended.is_set():
                step = self.random.choice(
                    [self._snapshot, self._snapshot, self._fork, self._sleep, self._prune]
                )
                step()
        except ConnectionError:
            pass  # killed
        except Exception as error:
            self.trouble.append(f"{self.name}: {error!r}")

    def _ask(self, method: str, path: str, body: object = None) -> object:
        status, answer = self.world.request(method, path, body)
        if status == 0:
            raise ConnectionError
        if not 200 <= status < 300:
            raise Violation(f"{method} {path} answered {status}: {answer}")
        return answer

    def _snapshot(self) -> None:
        answer = self._ask("POST", f"/instances/{self.instance}/snapshots", {"kind": "Standby"})
        assert isinstance(answer, dict)
        self.promised.add(answer["id"])

    def _prune(self) -> None:
        while len(self.promised) > _KEPT:
            # Asked for is as good as done: it may be gone, answered or not.
            self._ask("DELETE", f"/snapshots/{self.promised.pop()}")

    def _fork(self) -> None:
        if not self.promised:
            return
        self.forks += 1
        snapshot = self.random.choice(sorted(self.promised))
        target = self.random.choice(["Running", "Standby", "Stopped"])
        body = {"name": f"{self.name}-{self.forks}", "target_state": target}
        made = self._ask("POST", f"/snapshots/{snapshot}/fork", body)
        assert isinstance(made, dict)
        self._ask("DELETE", f"/instances/{made['id']}?graceful_shutdown=false")

    def _sleep(self) -> None:
        self._ask("POST", f"/instances/{self.instance}/standby")
        self._ask("POST", f"/instances/{self.instance}/restore")

    def check(self) -> None:
        """All that was promised is there, and the guest has its memory."""
        known = {s["id"] for s in self.world.must("GET", "/snapshots")}
        if lost := self.promised - known:
            raise Violation(f"lost snapshots: {sorted(lost)}")
        for other in self.world.must("GET", "/instances"):
            if other["name"].startswith(f"{self.name}-"):
                self.world.delete(other["name"])
        state = self.world.must("GET", f"/instances/{self.instance}")["state"]
        if state == "Standby":
            self.world.must("POST", f"/instances/{self.instance}/restore")
        self.world.expect(self.instance, "Running", self.name)


def kill_at_random(
    world: World, rounds: int, seed: int, report: Callable[[str], None] = lambda _: None
) -> int:
    """``rounds`` kills of a started server; how many snapshots were promised. Raises Violation."""
    source = random.Random(seed)
    loads = [Load(world, f"w{n}", random.Random(source.random())) for n in range(_WORKERS)]
    for load in loads:
        load.instance = world.boot(load.name, load.name)
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
        world.check_everything()
        for load in loads:
            load.check()
            if load.trouble:
                raise Violation("; ".join(load.trouble))
            seen |= load.promised
        report(f"kill {number} of {rounds}: {len(seen)} snapshots promised, none lost")
    return len(seen)
