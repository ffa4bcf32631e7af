"""The verbs that are tried under faults: what each needs, asks for, and may leave behind.

A new verb is a new ``Verb`` in ``VERBS``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from crash.stage import (
    DEADLINE,
    ZSTD,
    Answer,
    Stage,
    Verb,
    back_in_past,
    cool,
    delete_both,
    delete_named,
    delete_snapshot_named,
    delete_subject_snapshot,
    fork_subject,
    forked,
    on_subject,
    set_warm,
    sleeps,
    snapshot_gone,
    snapshot_taken,
    state_of,
    take_subject,
    wake_and_delete,
    wakes,
)
from crash.verbs_more import MORE_VERBS
from crash.world import Violation


# -- create, start, stop, delete ------------------------------------------------------------------
def _create(stage: Stage) -> Answer:
    body = {"name": stage.name, "image": "stillframe/base", "size": "64MB",
            "overlay_size": "16MB", "vcpus": 1}  # fmt: skip
    return stage.world.request("POST", "/instances", body)


def _created(stage: Stage) -> bool:
    if (made := stage.world.instance(stage.name)) is None:
        return False
    stage.world.reach(made["id"], "Running")
    return True


def _started(stage: Stage) -> bool:
    if state_of(stage, stage.subject) == "Stopped":
        return False
    stage.world.reach(stage.subject, "Running")
    return True


def _stopped_subject(stage: Stage) -> None:
    body = {"name": stage.name, "target_state": "Stopped"}
    made = stage.world.must("POST", f"/snapshots/{stage.disk}/fork", body)
    stage.subject = made["id"]


def _stopped(stage: Stage) -> bool:
    state = state_of(stage, stage.subject)
    if state == "Running":
        stage.world.expect_running(stage.subject, "of-subject")
    elif state != "Stopped":
        raise Violation(f"the instance is {state}")
    return state == "Stopped"


def _deleted(stage: Stage) -> bool:
    if stage.world.instance(stage.name) is None:
        return True
    stage.world.expect(stage.subject, "Running", "of-subject")
    return False


# -- snapshots ------------------------------------------------------------------------------------
def _snapshot_of(source: str, kind: str) -> Callable[[Stage], Answer]:
    def request(stage: Stage) -> Answer:
        body = {"kind": kind, "name": stage.name}
        return stage.world.request("POST", f"/instances/{getattr(stage, source)}/snapshots", body)

    return request


# -- compression ----------------------------------------------------------------------------------
def _take_compressed(stage: Stage) -> Answer:
    """Ask for a compressed snapshot, and wait until it is, or cannot be, or the server is gone."""
    body = {"kind": "Standby", "name": stage.name, "compression": ZSTD}
    answer = stage.world.request("POST", f"/instances/{stage.source}/snapshots", body)
    return _until_compressed(stage, answer)


def _until_compressed(stage: Stage, answer: Answer) -> Answer:
    deadline = time.monotonic() + DEADLINE
    while 200 <= answer[0] < 300 and answer[1]["compression_state"] == "compressing":
        if time.monotonic() > deadline:
            raise Violation(f"it is compressed for ever: {answer[1]}")
        time.sleep(0.01)
        answer = stage.world.request("GET", f"/snapshots/{answer[1]['id']}")
    if answer[0] and answer[1].get("compression_error"):
        return 500, answer[1]
    return answer


def _compressed(stage: Stage) -> bool:
    """There is none, or it is whole: compressed, or raw with the reason why it is not."""
    made = stage.world.snapshot_named(stage.name)
    if made is None:
        return False
    status, settled = _until_compressed(stage, (200, made))
    if status != 200 and not settled.get("compression_error"):
        raise Violation(f"it cannot be looked at: {status} {settled}")
    if settled["compression_state"] not in ("compressed", "error"):
        raise Violation(f"it asked for compression and is {settled['compression_state']}")
    stage.world.check_snapshot(made["id"])
    return True


def _compressed_past(stage: Stage) -> None:
    """A compressed snapshot of the source, to fork from."""
    status, made = _take_compressed(stage)
    if status != 200:
        raise Violation(f"no compressed snapshot: {status} {made}")
    stage.facts["snapshot"] = made["id"]


def _fork_compressed(stage: Stage) -> Answer:
    body = {"name": stage.name, "target_state": "Running"}
    return stage.world.request("POST", f"/snapshots/{stage.facts['snapshot']}/fork", body)


# -- expiry ---------------------------------------------------------------------------------------
def _expire(stage: Stage) -> Answer:
    """Let a snapshot expire now, and wait until it has gone, or the server has."""
    soon = datetime.now(UTC) + timedelta(seconds=1)
    wish = {"expires_at": soon.isoformat()}
    return _until_expired(stage, stage.world.request("PATCH", f"/snapshots/{stage.subject}", wish))


def _until_expired(stage: Stage, answer: Answer) -> Answer:
    deadline = time.monotonic() + DEADLINE
    while answer[0] == 200:
        if stage.world.injector.stays:  # then it need not be possible
            return 507, answer[1]
        if time.monotonic() > deadline:
            raise Violation("it does not expire")
        time.sleep(0.02)
        answer = stage.world.request("GET", f"/snapshots/{stage.subject}")
    return (204, None) if answer[0] == 404 else answer


def _expired(stage: Stage) -> bool:
    made = stage.world.snapshot_named(stage.name)
    if made is not None and made.get("expires_at") is None:
        stage.world.check_snapshot(made["id"])
        return False
    return made is None or _until_expired(stage, (200, made))[0] == 204


# -- forks ----------------------------------------------------------------------------------------
def _fork_of(snapshot: str, target: str) -> Callable[[Stage], Answer]:
    def request(stage: Stage) -> Answer:
        path = f"/snapshots/{getattr(stage, snapshot)}/fork"
        return stage.world.request("POST", path, {"name": stage.name, "target_state": target})

    return request


def _fork_live(stage: Stage) -> Answer:
    body = {"name": stage.name, "from_running": True, "target_state": "Running"}
    return stage.world.request("POST", f"/instances/{stage.source}/fork", body)


def _warm(stage: Stage) -> Answer:
    """Ask for a warm fork and wait until it is there, or the server is not."""
    answer, deadline = set_warm(stage, 1), time.monotonic() + DEADLINE
    while answer[0] == 200 and not answer[1]["ready"] and not answer[1].get("limited_by"):
        if time.monotonic() > deadline:
            raise Violation(f"no fork gets warm: {answer[1]}")
        time.sleep(0.01)
        answer = stage.world.request("GET", f"/snapshots/{stage.live}/warm")
    if answer[0] == 200 and not answer[1]["ready"]:
        return 500, answer[1]
    return answer


def _is_warm(stage: Stage) -> bool:
    status = stage.world.must("GET", f"/snapshots/{stage.live}/warm")
    if status["target"] == 0 or status.get("limited_by"):
        return False
    return _warm(stage)[0] == 200


# -- standby and restore --------------------------------------------------------------------------
def _sleeping_subject(stage: Stage) -> None:
    fork_subject(stage)
    stage.world.must("POST", f"/instances/{stage.subject}/standby")


def _subject_with_past(stage: Stage) -> None:
    """An instance in Standby, and a snapshot of its past."""
    fork_subject(stage)
    stage.world.remember(stage.subject, "of-past")
    stage.facts["snapshot"] = stage.snapshot(stage.subject, "Standby", stage.name)
    stage.world.remember(stage.subject, "of-subject")
    stage.world.must("POST", f"/instances/{stage.subject}/standby")


def _restore_to(target: str) -> Callable[[Stage], Answer]:
    def request(stage: Stage) -> Answer:
        path = f"/instances/{stage.subject}/snapshots/{stage.facts['snapshot']}/restore"
        return stage.world.request("POST", path, {"target_state": target})

    return request


def _stopped_in_place(stage: Stage) -> bool:
    state = state_of(stage, stage.subject)
    if state != "Stopped":
        stage.world.expect(stage.subject, "Standby")
    return state == "Stopped"


# -- schedules ------------------------------------------------------------------------------------
def _schedule(stage: Stage) -> None:
    """A schedule that keeps one snapshot, and has one that the next run is to delete."""
    fork_subject(stage)
    path = f"/instances/{stage.subject}/snapshot-schedule"
    body = {"interval": "24h", "retention": {"max_count": 1}, "name_prefix": "s"}
    stage.world.must("PUT", path, body)
    stage.world.must("POST", f"{path}/run")
    (first,) = _of_subject(stage)
    stage.facts["first"] = first["id"]


def _of_subject(stage: Stage) -> list[Any]:
    found = stage.world.must("GET", "/snapshots")
    return [s for s in found if s["source_instance_id"] == stage.subject]


def _run_schedule(stage: Stage) -> Answer:
    return stage.world.request("POST", f"/instances/{stage.subject}/snapshot-schedule/run")


def _has_run(stage: Stage) -> bool:
    """A run that was cut off is made up for by the server itself."""
    deadline = time.monotonic() + DEADLINE
    while True:
        found = [s["id"] for s in _of_subject(stage)]
        schedule = stage.world.must("GET", f"/instances/{stage.subject}/snapshot-schedule")
        last = schedule.get("last_snapshot_id")
        if schedule.get("last_error") is None and found == [last]:
            return bool(last != stage.facts["first"])
        error = schedule.get("last_error") or ""
        if error.startswith("retention: "):
            return bool(last != stage.facts["first"])  # taken; the next run deletes, and it says so
        if error and "interrupted" not in error:
            return False  # it failed, and says so
        if time.monotonic() > deadline:
            raise Violation(f"the schedule does not settle: {schedule}, snapshots {found}")
        time.sleep(0.02)


def _delete_schedule(stage: Stage) -> None:
    stage.world.must("DELETE", f"/instances/{stage.subject}/snapshot-schedule")
    for snapshot in _of_subject(stage):
        stage.world.must("DELETE", f"/snapshots/{snapshot['id']}")
    stage.world.delete(stage.name)


VERBS = (
    Verb("create", _create, _created, cleanup=delete_named),
    Verb(
        "start",
        lambda stage: stage.world.request("POST", f"/instances/{stage.subject}/start", {}),
        _started, _stopped_subject, delete_named,
    ),
    Verb("stop", on_subject("stop"), _stopped, fork_subject, delete_named),
    Verb(
        "delete instance",
        lambda stage: stage.world.request("DELETE", f"/instances/{stage.subject}"),
        _deleted, fork_subject, delete_named,
    ),
    Verb("snapshot of Running", _snapshot_of("source", "Standby"), snapshot_taken,
         cleanup=delete_snapshot_named),
    Verb("snapshot of Standby", _snapshot_of("asleep", "Standby"), snapshot_taken,
         cleanup=delete_snapshot_named),
    Verb("snapshot of Stopped", _snapshot_of("off", "Stopped"), snapshot_taken,
         cleanup=delete_snapshot_named),
    Verb("delete snapshot", delete_subject_snapshot, snapshot_gone, take_subject,
         delete_snapshot_named),
    Verb("fork to Running", _fork_of("live", "Running"), forked("Running", "of-source"),
         cleanup=delete_named),
    Verb("fork to Standby", _fork_of("live", "Standby"), forked("Standby"),
         cleanup=delete_named),
    Verb("fork to Stopped", _fork_of("disk", "Stopped"), forked("Stopped"),
         cleanup=delete_named),
    Verb("fork of Running", _fork_live, forked("Running", "of-source"), cleanup=delete_named),
    Verb("warm fill", _warm, _is_warm, cleanup=cool, background=True),
    Verb("standby", on_subject("standby"), sleeps, fork_subject, wake_and_delete),
    Verb("restore", on_subject("restore"), wakes, _sleeping_subject, delete_named),
    Verb("restore in place to Running", _restore_to("Running"), back_in_past,
         _subject_with_past, delete_both),
    Verb("restore in place to Stopped", _restore_to("Stopped"), _stopped_in_place,
         _subject_with_past, delete_both),
    Verb("compress", _take_compressed, _compressed, cleanup=delete_snapshot_named,
         background=True),
    Verb("fork of a compressed snapshot", _fork_compressed, forked("Running", "of-source"),
         _compressed_past, delete_both),
    Verb("expiry", _expire, _expired, take_subject, delete_snapshot_named, background=True),
    Verb("scheduled run", _run_schedule, _has_run, _schedule, _delete_schedule, background=True),
    *MORE_VERBS,
)  # fmt: skip
