"""What may change of a snapshot after it was taken, and its deletion as people ask for it.

Its payload never changes. Name, tags, description, expiry and pin are words beside it.
"""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from datetime import datetime
from typing import Any

from stillframe.engine.context import Context
from stillframe.engine.keeping.interface import DeletionPreview, SnapshotChanges
from stillframe.engine.keeping.lineage import family_of, weigh
from stillframe.engine.verbs import snapshot as taking
from stillframe.model.errors import Conflict, InvalidRequest, NameConflict
from stillframe.model.lineage import Relative
from stillframe.model.schedules import check_snapshot_tags
from stillframe.model.units import check_encodable, check_name, to_utc
from stillframe.model.values import Snapshot

MAX_DESCRIPTION = 4096


def edit_snapshot(context: Context, snapshot_id: str, changes: SnapshotChanges) -> Snapshot:
    """Change the words beside a snapshot, durably; its payload stays as it is.

    Raises NotFound, InvalidRequest, Conflict when its source has another of that name.
    """
    snapshot = context.snapshot(snapshot_id)
    changed: dict[str, Any] = {}
    if "name" in changes:
        changed["name"] = _checked_name(context, snapshot, changes["name"])
    if "tags" in changes:
        changed["tags"] = check_snapshot_tags(changes["tags"])
    if "description" in changes:
        changed["description"] = check_description(changes["description"])
    if "expires_at" in changes:
        changed["expires_at"] = _checked_expiry(context, changes["expires_at"])
    if "pinned" in changes:
        changed["pinned"] = bool(changes["pinned"])
    edited = replace(snapshot, **changed)
    if edited != snapshot:
        try:
            context.records.update_snapshot(edited)
        except NameConflict as error:
            raise _name_taken(str(edited.name)) from error
    return edited


def _checked_name(context: Context, snapshot: Snapshot, name: str | None) -> str | None:
    if name is None or name == snapshot.name:
        return name
    check_name(name, what="snapshot name")
    if context.records.snapshot_name_taken(snapshot.source_instance_id, name):
        raise _name_taken(name)
    return name


def _name_taken(name: str) -> Conflict:
    return Conflict(
        f"the snapshot's instance already has one named {name!r}",
        hint="choose another name or delete that snapshot",
        name=name,
    )


def check_description(text: str | None) -> str | None:
    """The description, None for an empty one. Raises InvalidRequest."""
    if not text:
        return None
    if len(text) > MAX_DESCRIPTION:
        raise InvalidRequest(
            f"the description has {len(text)} characters, at most {MAX_DESCRIPTION} are allowed",
            field="description",
        )
    check_encodable(text, what="the description")
    # It ends up on terminals, where an escape sequence is more than text.
    if any(unicodedata.category(letter) == "Cc" and letter not in "\n\t" for letter in text):
        raise InvalidRequest("the description has control characters", field="description")
    return text


def _checked_expiry(context: Context, moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    moment = to_utc(moment, what="expires_at", code="invalid_expires_at")
    if moment <= context.now():
        raise InvalidRequest(
            "expires_at is in the past",
            code="invalid_expires_at",
            hint="delete the snapshot instead",
        )
    return moment


async def delete_snapshot(context: Context, snapshot_id: str, *, force: bool = False) -> None:
    """Delete a snapshot; a pinned one with ``force`` only. Forks and source go on unharmed.

    Raises NotFound, Conflict.
    """
    if (refusal := _refusal(context.snapshot(snapshot_id), force)) is not None:
        raise refusal
    # It forgets the record before it waits for anything: a pin cannot come in between.
    await taking.delete_snapshot(context, snapshot_id)


def _refusal(snapshot: Snapshot, force: bool) -> Conflict | None:
    if force or not snapshot.pinned:
        return None
    return Conflict(
        f"snapshot {snapshot.name or snapshot.id} is pinned",
        hint="unpin it first, or delete it with force=true",
        snapshot_id=snapshot.id,
    )


async def preview_deletion(
    context: Context, snapshot_id: str, *, force: bool = False
) -> DeletionPreview:
    """What ``delete_snapshot`` would do, doing nothing. Raises NotFound."""
    snapshot = context.snapshot(snapshot_id)
    refusal = _refusal(snapshot, force)
    freed, sharing = await _weight(context, family_of(context).snapshot(snapshot_id))
    return DeletionPreview(
        snapshot,
        bytes_freed=freed,
        shared_with=sharing,
        refused=None if refusal is None else refusal.message,
        in_use=context.snapshot_users.get(snapshot_id, 0),
    )


async def preview_instance_deletion(context: Context, instance_id: str) -> DeletionPreview:
    """What ``delete`` would do, doing nothing; nothing refuses it. Raises NotFound."""
    instance = context.instance(instance_id)
    freed, sharing = await _weight(context, family_of(context).instance(instance_id))
    return DeletionPreview(instance, bytes_freed=freed, shared_with=sharing)


async def _weight(context: Context, relative: Relative) -> tuple[int, tuple[Relative, ...]]:
    """What deleting it would free, and who shares its memory."""
    family = family_of(context)
    (itself,) = await weigh(context, [relative])
    sharing = (
        family.instance(other) if other in context.records.instances else family.snapshot(other)
        for other in itself.shares_memory_with
    )
    return itself.exclusive_bytes or 0, tuple(sharing)
