"""Further verbs that are tried: what stays compressed, what moves, what is kept, images."""

from __future__ import annotations

import json
import re
import time
import urllib.parse
from collections.abc import Callable
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
    take_subject,
    wake_and_delete,
    wakes,
)
from crash.world import Violation
from stillframe.model.units import new_id
from support.registry import layer

_OTHER_IMAGE = "crash/other"


# -- standby images and pasts that are compressed -------------------------------------------------
def _sleep_compressed(stage: Stage) -> Answer:
    """Ask for a compressed Standby, and wait until it is, or cannot be, or the server is gone."""
    status, answer = on_subject("standby", {"compression": ZSTD})(stage)
    return _until_settled(stage, status, answer) if 200 <= status < 300 else (status, answer)


def _subject_to_compress(stage: Stage) -> None:
    """A subject; how many compressions have failed before is noted."""
    fork_subject(stage)
    stage.failed_before = _compressions_failed(stage)[1]


def _until_settled(stage: Stage, status: int, answer: Any) -> Answer:
    payload = stage.world.data.instance(stage.subject).standby
    deadline = time.monotonic() + DEADLINE
    while payload.memory.exists():
        status, failures = _compressions_failed(stage)
        if status != 200:
            return status, answer
        known, stage.failed_before = min(stage.failed_before, failures), failures
        if failures > known:  # fewer than were known: of a new server
            return 500, "the compression failed"
        if time.monotonic() > deadline:
            raise Violation("a standby image is compressed for ever")
        time.sleep(0.01)
    return status, answer


def _compressions_failed(stage: Stage) -> tuple[int, float]:
    """Status of the server, and how many compressions of this server have failed."""
    status, text = stage.world.transfer("GET", "/metrics", None)
    counts = re.findall(  # one for each code of an error
        rb'^stillframe_operation_failures_total\{[^}]*operation="compress"[^}]*\} (\S+)',
        text,
        re.MULTILINE,
    )
    return status, sum(map(float, counts))


def _compressed_sleeper(stage: Stage) -> None:
    """A subject in Standby whose memory is compressed."""
    fork_subject(stage)
    path = f"/instances/{stage.subject}/standby"
    stage.world.must("POST", path, {"compression": ZSTD})
    payload = stage.world.data.instance(stage.subject).standby
    deadline = time.monotonic() + DEADLINE
    while payload.memory.exists():
        if time.monotonic() > deadline:
            raise Violation("no compressed standby image")
        time.sleep(0.01)


def _compressed_past(stage: Stage) -> None:
    """A subject in Standby, and a compressed snapshot of its past."""
    fork_subject(stage)
    stage.world.remember(stage.subject, "of-past")
    _compressed_snapshot(stage, stage.subject)
    stage.world.remember(stage.subject, "of-subject")
    stage.world.must("POST", f"/instances/{stage.subject}/standby")


def _compressed_snapshot(stage: Stage, source: str) -> None:
    body = {"kind": "Standby", "name": stage.name, "compression": ZSTD}
    made = stage.world.must("POST", f"/instances/{source}/snapshots", body)
    stage.facts["snapshot"] = made["id"]
    deadline = time.monotonic() + DEADLINE
    while made["compression_state"] != "compressed":
        if time.monotonic() > deadline or made["compression_state"] == "error":
            raise Violation(f"no compressed snapshot: {made}")
        time.sleep(0.01)
        made = stage.world.must("GET", f"/snapshots/{made['id']}")


def _back_to_past(stage: Stage) -> Answer:
    path = f"snapshots/{stage.facts['snapshot']}/restore"
    return on_subject(path, {"target_state": "Running"})(stage)


def _snapshot_uncompressed(stage: Stage) -> Answer:
    """A snapshot with raw memory of an instance whose own is compressed: it is expanded."""
    body = {"kind": "Standby", "name": stage.name, "compression": {"enabled": False}}
    return on_subject("snapshots", body)(stage)


def _deleted(stage: Stage) -> bool:
    if stage.world.instance(stage.name) is None:
        return True
    stage.world.expect(stage.subject, "Standby")
    return False


def _begin_compression(stage: Stage) -> None:
    """A snapshot whose compression has been begun just now."""
    body = {"kind": "Standby", "name": stage.name, "compression": ZSTD}
    path = f"/instances/{stage.source}/snapshots"
    stage.subject = stage.world.must("POST", path, body)["id"]


# -- forks ----------------------------------------------------------------------------------------
def _fork_of(source: str, state: str) -> Callable[[Stage], Answer]:
    def request(stage: Stage) -> Answer:
        path = f"/instances/{getattr(stage, source)}/fork"
        return stage.world.request("POST", path, {"name": stage.name, "target_state": state})

    return request


def _pair(stage: Stage) -> tuple[str, str]:
    return f"{stage.name}-1", f"{stage.name}-2"


def _fork_pair(stage: Stage) -> Answer:
    """Two forks at once; done when both are."""
    body = {"count": 2, "name_prefix": stage.name, "target_state": "Running"}
    status, answer = stage.world.request("POST", f"/snapshots/{stage.live}/forks", body)
    return (500, answer) if status == 201 and answer["failed"] else (status, answer)


def _pair_forked(stage: Stage) -> bool:
    """Whether both are there. One alone is whole, and removed, so that both can be asked for."""
    made = [one for name in _pair(stage) if (one := stage.world.instance(name)) is not None]
    for one in made:
        stage.world.expect(one["id"], "Running", "of-source")
    if len(made) == 1:
        stage.world.delete(made[0]["name"])
    return len(made) == 2


def _delete_pair(stage: Stage) -> None:
    for name in _pair(stage):
        stage.world.delete(name)


def _fork_live(stage: Stage) -> Answer:
    body = {"name": stage.name, "target_state": "Running"}
    return stage.world.request("POST", f"/snapshots/{stage.live}/fork", body)


def _one_warm(stage: Stage) -> None:
    status, answer = set_warm(stage, 1)
    deadline = time.monotonic() + DEADLINE
    while status == 200 and not answer["ready"]:
        if time.monotonic() > deadline:
            raise Violation(f"no fork gets warm: {answer}")
        time.sleep(0.01)
        status, answer = stage.world.request("GET", f"/snapshots/{stage.live}/warm")
    if status != 200:
        raise Violation(f"no fork gets warm: {status} {answer}")


def _cool(stage: Stage) -> None:
    cool(stage)
    stage.world.quiet()  # the next one may have been in the making


def _cool_and_delete(stage: Stage) -> None:
    delete_named(stage)
    _cool(stage)


def _is_cool(stage: Stage) -> bool:
    status: dict[str, int] = stage.world.must("GET", f"/snapshots/{stage.live}/warm")
    return status["target"] == 0


# -- export and import ----------------------------------------------------------------------------
def _export(stage: Stage) -> Answer:
    # Of a snapshot whose description the harness does not change meanwhile.
    status, content = stage.world.transfer("GET", f"/snapshots/{stage.disk}/export", None)
    return (status, None) if status != 200 or content == stage.archive else (500, "other bytes")


def _first_export(stage: Stage) -> None:
    status, stage.archive = stage.world.transfer("GET", f"/snapshots/{stage.disk}/export", None)
    if status != 200:
        raise Violation(f"the export answered {status}: {stage.archive[:500]!r}")


def _archive(stage: Stage) -> None:
    status, stage.archive = stage.world.transfer("GET", f"/snapshots/{stage.live}/export", None)
    if status != 200:
        raise Violation(f"the export answered {status}: {stage.archive[:500]!r}")


def _as_before(stage: Stage) -> bool:
    """An export changes nothing: the archive is the same as ever."""
    return _export(stage)[0] == 200


def _import(stage: Stage) -> Answer:
    path = f"/snapshots/import?name={stage.name}"
    return _told(stage.world.transfer("POST", path, stage.archive))


def _import_in_parts(stage: Stage) -> Answer:
    """Half of the archive, and in another request the rest."""
    half = len(stage.archive) // 2
    path = f"/snapshots/import?name={stage.name}&upload={new_id()}"
    status, answer = _told(stage.world.transfer("POST", path, stage.archive[:half]))
    if status != 400 or answer["code"] != "damaged_archive":  # what it says of a first part
        return status, answer
    came = next(int(fact["message"]) for fact in answer["details"] if fact["code"] == "offset")
    rest = stage.archive[came:]
    return _told(stage.world.transfer("POST", f"{path}&offset={came}", rest))


def _told(answer: tuple[int, bytes]) -> Answer:
    status, content = answer
    return status, json.loads(content) if content else None


def _imported(stage: Stage) -> bool:
    """There is none, or a whole one that forks into a guest with its memory."""
    if (made := stage.world.snapshot_named(stage.name)) is None:
        return False
    stage.world.check_snapshot(made["id"])
    name = f"{stage.name}-fork"
    path = f"/snapshots/{made['id']}/fork"
    fork = stage.world.must("POST", path, {"name": name, "target_state": "Running"})
    stage.world.expect_running(fork["id"], "of-other" if _has_other(stage) else "of-source")
    stage.world.delete(name)
    return True


# -- images ---------------------------------------------------------------------------------------
def _other_image(stage: Stage, content: bytes = b"other\n") -> Answer:
    tar = layer(("etc/hostname", content), ("bin/true", b"#!/bin/sh\n"))
    return _told(stage.world.transfer("POST", f"/images/import?name={_OTHER_IMAGE}", tar))


def _newer_image(stage: Stage) -> Answer:
    return _other_image(stage, b"newer\n")


def _digest_of_other(stage: Stage) -> str | None:
    """The digest of the other image, if it is there."""
    images = {image["name"]: image for image in stage.world.must("GET", "/images")}
    found = [images[name] for name in images if name.endswith(f"{_OTHER_IMAGE}:latest")]
    return found[0]["digest"] if found else None


def _has_other(stage: Stage) -> bool:
    """Whether the other image is there; if it is, an instance can be made of it."""
    return _digest_of_other(stage) is not None


def _is_newer(stage: Stage) -> bool:
    """Whether the other image was made anew; an instance can be made of the old or the new one."""
    if not _usable_other(stage):
        raise Violation("the image made anew is gone")
    return _digest_of_other(stage) != stage.subject


def _note_other(stage: Stage) -> None:
    _make_other(stage)
    stage.subject = _digest_of_other(stage) or ""


def _usable_other(stage: Stage) -> bool:
    if not _has_other(stage):
        return False
    stage.world.boot(f"{stage.name}-made", "of-made", _OTHER_IMAGE)
    stage.world.delete(f"{stage.name}-made")
    return True


def _make_other(stage: Stage) -> None:
    status, answer = _other_image(stage)
    if status != 201:
        raise Violation(f"no image: {status} {answer}")


def _delete_other(stage: Stage) -> Answer:
    return stage.world.request("DELETE", f"/images/{urllib.parse.quote(_OTHER_IMAGE, safe='')}")


def _no_other(stage: Stage) -> bool:
    return not _usable_other(stage)


def _remove_other(stage: Stage) -> None:
    if _has_other(stage) and (answer := _delete_other(stage))[0] != 204:
        raise Violation(f"the image cannot be deleted: {answer}")


def _archive_with_image(stage: Stage) -> None:
    """An archive that brings along an image which is not here."""
    if not stage.with_image:
        _make_other(stage)
        maker = stage.world.boot("maker", "of-other", _OTHER_IMAGE)
        made = stage.snapshot(maker, "Standby", "of-maker")
        status, stage.with_image = stage.world.transfer(
            "GET", f"/snapshots/{made}/export?image=true", None
        )
        if status != 200:
            raise Violation(f"the export answered {status}")
        stage.world.delete("maker")
        stage.world.delete_snapshot("of-maker")
        _remove_other(stage)
    stage.archive = stage.with_image


def _remove_imported(stage: Stage) -> None:
    delete_snapshot_named(stage)
    _remove_other(stage)


def _imported_with_image(stage: Stage) -> bool:
    """There is none, or both snapshot and image; the image alone is whole, and may stay."""
    if stage.world.snapshot_named(stage.name) is None:
        _usable_other(stage)
        return False
    return _imported(stage)


# -- records --------------------------------------------------------------------------------------
def _edit(stage: Stage) -> Answer:
    wish = {"description": stage.name, "tags": {"edited": "yes"}, "pinned": True}
    return stage.world.request("PATCH", f"/snapshots/{stage.subject}", wish)


def _edited(stage: Stage) -> bool:
    found = stage.world.must("GET", f"/snapshots/{stage.subject}")
    facts = (found.get("description"), (found.get("tags") or {}).get("edited"))
    if facts not in ((stage.name, "yes"), (None, None)):
        raise Violation(f"a half of the changes: {facts}")
    return facts[0] is not None


def _unpin_and_delete(stage: Stage) -> None:
    stage.world.must("PATCH", f"/snapshots/{stage.subject}", {"pinned": False})
    delete_snapshot_named(stage)


def _schedule_path(stage: Stage) -> str:
    return f"/instances/{stage.subject}/snapshot-schedule"


def _set_schedule(stage: Stage) -> Answer:
    body = {"interval": "24h", "retention": {"max_count": 1}, "name_prefix": "s"}
    return stage.world.request("PUT", _schedule_path(stage), body)


def _has_schedule(stage: Stage) -> bool:
    status, answer = stage.world.request("GET", _schedule_path(stage))
    if status not in (200, 404):
        raise Violation(f"the schedule answers {status}: {answer}")
    return status == 200


def _scheduled_subject(stage: Stage) -> None:
    fork_subject(stage)
    if (answer := _set_schedule(stage))[0] != 200:
        raise Violation(f"no schedule: {answer}")


def _end_schedule(stage: Stage) -> Answer:
    return stage.world.request("DELETE", _schedule_path(stage))


MORE_VERBS = (
    Verb("standby, compressed", _sleep_compressed, sleeps, _subject_to_compress, wake_and_delete,
         background=True),
    Verb("restore, compressed", on_subject("restore"), wakes, _compressed_sleeper, delete_named),
    Verb("snapshot of a compressed Standby", _snapshot_uncompressed, snapshot_taken,
         _compressed_sleeper, delete_both),
    Verb("delete instance in Standby",
         lambda stage: stage.world.request("DELETE", f"/instances/{stage.subject}"),
         _deleted, _compressed_sleeper, delete_named),
    Verb("restore in place, compressed", _back_to_past, back_in_past, _compressed_past,
         delete_both),
    Verb("delete snapshot being compressed", delete_subject_snapshot, snapshot_gone,
         _begin_compression, delete_snapshot_named, background=True),
    Verb("fork of Standby", _fork_of("asleep", "Running"), forked("Running", "of-asleep"),
         cleanup=delete_named),
    Verb("fork of Stopped", _fork_of("off", "Stopped"), forked("Stopped"), cleanup=delete_named),
    Verb("two forks at once", _fork_pair, _pair_forked, cleanup=_delete_pair),
    Verb("fork that is warm", _fork_live, forked("Running", "of-source"), _one_warm,
         _cool_and_delete, background=True),
    Verb("end of warm forks", lambda stage: set_warm(stage, 0), _is_cool, _one_warm, _cool,
         background=True),
    Verb("export", _export, _as_before, _first_export),
    Verb("import", _import, _imported, _archive, delete_snapshot_named),
    Verb("import in parts", _import_in_parts, _imported, _archive, delete_snapshot_named),
    Verb("import with its image", _import, _imported_with_image, _archive_with_image,
         _remove_imported),
    Verb("make image", _other_image, _usable_other, cleanup=_remove_other),
    Verb("make image anew", _newer_image, _is_newer, _note_other, _remove_other),
    Verb("delete image", _delete_other, _no_other, _make_other, _remove_other),
    Verb("edit snapshot", _edit, _edited, take_subject, _unpin_and_delete),
    Verb("set schedule", _set_schedule, _has_schedule, fork_subject, delete_named),
    Verb("end schedule", _end_schedule, lambda stage: not _has_schedule(stage),
         _scheduled_subject, delete_named),
)  # fmt: skip
