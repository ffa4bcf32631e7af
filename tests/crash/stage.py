"""What every verb is tried on: the instances and snapshots that are always there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crash.world import Violation, World

Answer = tuple[int, Any]
LIVE, DISK = "base-live", "base-disk"
ZSTD = {"enabled": True, "algorithm": "zstd", "level": 1}
DEADLINE = 120.0  # seconds until what goes on by itself must have settled


@dataclass(slots=True)
class Stage:
    """The instances and snapshots that are always there, with the nonces in their memory."""

    world: World
    source: str = ""
    asleep: str = ""
    off: str = ""
    live: str = ""
    disk: str = ""
    name: str = ""  # of what the verb makes or works on
    subject: str = ""  # its id, where ``prepare`` has made it
    archive: bytes = b""
    with_image: bytes = b""  # an archive with an image that is not here
    failed_before: float = 0.0  # compressions of this server
    facts: dict[str, str] = field(default_factory=dict)

    def build(self) -> None:
        """Make them."""
        world = self.world
        self.source = world.boot("source", "of-source")
        self.asleep = world.boot("asleep", "of-asleep")
        world.must("POST", f"/instances/{self.asleep}/standby")
        self.off = world.boot("off", "of-off")
        world.must("POST", f"/instances/{self.off}/stop")
        self.live = self.snapshot(self.source, "Standby", LIVE)
        self.disk = self.snapshot(self.off, "Stopped", DISK)

    def snapshot(self, source: str, kind: str, name: str) -> str:
        """Take a snapshot; its id."""
        body = {"kind": kind, "name": name}
        made: str = self.world.must("POST", f"/instances/{source}/snapshots", body)["id"]
        return made

    def check(self) -> None:
        """All of them are as they were, and the source goes on."""
        self.world.expect(self.source, "Running", "of-source")
        self.world.expect(self.asleep, "Standby")
        self.world.expect(self.off, "Stopped")


@dataclass(frozen=True, slots=True)
class Verb:
    """One request. Every function is given the stage.

    ``prepare`` makes what it needs; ``request`` sends it, and may be cut off. ``complete`` says
    whether it has happened, raising Violation for anything between yes and no; where it has not,
    it is asked for again. ``cleanup`` removes all that the others made. With ``background`` the
    server may go on by itself afterwards, and is given time.
    """

    name: str
    request: Callable[[Stage], Answer]
    complete: Callable[[Stage], bool]
    prepare: Callable[[Stage], None] = lambda _: None
    cleanup: Callable[[Stage], None] = lambda _: None
    background: bool = False


def delete_named(stage: Stage) -> None:
    """Delete the instance of the stage's name, if there is one."""
    stage.world.delete(stage.name)


def delete_snapshot_named(stage: Stage) -> None:
    """Delete the snapshot of the stage's name, if there is one."""
    stage.world.delete_snapshot(stage.name)


def delete_both(stage: Stage) -> None:
    """Delete the instance and the snapshot of the stage's name."""
    delete_named(stage)
    delete_snapshot_named(stage)


def state_of(stage: Stage, identifier: str) -> str:
    """The state of an instance."""
    return str(stage.world.must("GET", f"/instances/{identifier}")["state"])


def fork_subject(stage: Stage) -> None:
    """A Running instance as the subject, with a nonce of its own."""
    stage.subject = stage.world.must(
        "POST", f"/snapshots/{stage.live}/fork", {"name": stage.name, "target_state": "Running"}
    )["id"]
    stage.world.remember(stage.subject, "of-subject")


def on_subject(path: str, body: object = None) -> Callable[[Stage], Answer]:
    """A POST to what belongs to the subject."""
    return lambda stage: stage.world.request("POST", f"/instances/{stage.subject}/{path}", body)


def take_subject(stage: Stage) -> None:
    """A snapshot of the source as the subject."""
    stage.subject = stage.snapshot(stage.source, "Standby", stage.name)


def delete_subject_snapshot(stage: Stage) -> Answer:
    """Delete the snapshot that is the subject."""
    return stage.world.request("DELETE", f"/snapshots/{stage.subject}")


def snapshot_taken(stage: Stage) -> bool:
    """Whether there is a snapshot of the stage's name; if so, it is whole."""
    made = stage.world.snapshot_named(stage.name)
    if made is not None:
        stage.world.check_snapshot(made["id"])
    return made is not None


def snapshot_gone(stage: Stage) -> bool:
    """Whether there is none; else it is whole."""
    return not snapshot_taken(stage)


def forked(state: str, nonce: str = "") -> Callable[[Stage], bool]:
    """Whether there is an instance of the stage's name; if so, in ``state`` and with the nonce."""

    def complete(stage: Stage) -> bool:
        if (made := stage.world.instance(stage.name)) is None:
            return False
        stage.world.expect(made["id"], state, nonce)
        return True

    return complete


def set_warm(stage: Stage, count: int) -> Answer:
    """Ask for so many warm forks."""
    return stage.world.request("PUT", f"/snapshots/{stage.live}/warm", {"count": count})


def cool(stage: Stage) -> None:
    """No warm forks any more."""
    if set_warm(stage, 0)[0] != 200:
        raise Violation("warm forks cannot be ended")


def sleeps(stage: Stage) -> bool:
    """Whether the subject is in Standby; else it runs on with its memory."""
    if state_of(stage, stage.subject) == "Running":
        stage.world.expect_running(stage.subject, "of-subject")
        return False
    stage.world.expect(stage.subject, "Standby")
    return True


def wakes(stage: Stage) -> bool:
    """Whether the subject runs, with its memory; else it is in Standby."""
    return not sleeps(stage)


def wake_and_delete(stage: Stage) -> None:
    """The memory that went to disk comes back."""
    stage.world.must("POST", f"/instances/{stage.subject}/restore")
    stage.world.expect(stage.subject, "Running", "of-subject")
    delete_named(stage)


def back_in_past(stage: Stage) -> bool:
    """Whether the subject runs, with the memory of its past; else it sleeps on."""
    if state_of(stage, stage.subject) == "Running":
        stage.world.expect_running(stage.subject, "of-past")
        return True
    stage.world.expect(stage.subject, "Standby")
    return False
