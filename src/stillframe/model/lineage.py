"""The family tree: which snapshot or instance descends from which, also across the deleted.

A snapshot descends from the snapshot before it in the life of its source (``parent_snapshot_id``)
and belongs to that source; an instance descends from the snapshot it was forked from or restored
to, from the last one taken of it, and from the instance it was forked from.

A deleted snapshot that something still descends from is remembered as a ``Forebear``, so that the
line goes on behind it. At most one is kept for each record that refers to it: a line of many
deleted ones in a row shrinks to its youngest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from stillframe.model.values import Instance, Snapshot


class RelativeKind(StrEnum):
    """What stands in a family tree."""

    SNAPSHOT = "snapshot"
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class Forebear:
    """What is remembered of a deleted snapshot."""

    id: str
    name: str | None
    created_at: datetime
    source_instance_id: str
    source_instance_name: str
    parent_snapshot_id: str | None = None


@dataclass(frozen=True, slots=True)
class Relative:
    """One member of a family. ``state`` is an instance's state or a snapshot's kind.

    ``exclusive_bytes`` is what deleting it would free; ``shares_memory_with`` are the ids of those
    that map or hold the same memory image. Both are empty until measured, and for the deleted.
    """

    kind: RelativeKind
    id: str
    name: str | None = None
    state: str | None = None
    created_at: datetime | None = None
    parent_snapshot_id: str | None = None
    parent_instance_id: str | None = None
    source_instance_id: str | None = None
    pinned: bool = False
    deleted: bool = False
    exclusive_bytes: int | None = None
    shares_memory_with: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lineage:
    """A snapshot with its ancestors (nearest first) and its descendants (oldest first)."""

    snapshot: Relative
    ancestors: tuple[Relative, ...]
    descendants: tuple[Relative, ...]


class Family:
    """Answers questions on lineage from the records as they are now."""

    def __init__(
        self,
        snapshots: Mapping[str, Snapshot],
        instances: Mapping[str, Instance],
        forebears: Mapping[str, Forebear],
    ) -> None:
        self._snapshots, self._instances, self._forebears = snapshots, instances, forebears

    def snapshot(self, snapshot_id: str) -> Relative:
        """A snapshot: alive, remembered, or only known to have been."""
        kind = RelativeKind.SNAPSHOT
        if (alive := self._snapshots.get(snapshot_id)) is not None:
            return Relative(
                kind, alive.id, alive.name, alive.kind.value, alive.created_at,
                parent_snapshot_id=alive.parent_snapshot_id,
                source_instance_id=alive.source_instance_id, pinned=alive.pinned,
            )  # fmt: skip
        if (gone := self._forebears.get(snapshot_id)) is not None:
            return Relative(
                kind, gone.id, gone.name, created_at=gone.created_at,
                parent_snapshot_id=gone.parent_snapshot_id,
                source_instance_id=gone.source_instance_id, deleted=True,
            )  # fmt: skip
        return Relative(kind, snapshot_id, deleted=True)

    def instance(self, instance_id: str) -> Relative:
        """An instance; of a deleted one no more than that it was."""
        known = self._instances.get(instance_id)
        if known is None:
            return Relative(RelativeKind.INSTANCE, instance_id, deleted=True)
        return _told_by(known, known.state.value, deleted=False)

    def source(self, snapshot: Relative) -> Relative | None:
        """The instance a snapshot was taken of; a deleted one as its snapshot remembers it."""
        instance_id = snapshot.source_instance_id
        if instance_id is None or instance_id in self._instances:
            return None if instance_id is None else self.instance(instance_id)
        if (taken := self._snapshots.get(snapshot.id)) is not None:
            return _told_by(taken.template, None, deleted=True)
        gone = self._forebears.get(snapshot.id)
        name = None if gone is None else gone.source_instance_name
        return replace(self.instance(instance_id), name=name)

    def ancestors(self, snapshot_id: str) -> list[Relative]:
        """Whom a snapshot descends from, nearest first: sources and earlier snapshots by turns."""
        found: dict[str, Relative] = {}
        current: Relative | None = self.snapshot(snapshot_id)
        while current is not None:
            source = self.source(current)
            while source is not None and source.id not in found:
                found[source.id] = source
                forked_from = source.parent_instance_id
                source = None if forked_from is None else self.instance(forked_from)
            parent = current.parent_snapshot_id
            current = None
            if parent is not None and parent not in found and parent != snapshot_id:
                found[parent] = current = self.snapshot(parent)
        return list(found.values())

    def descendants(self, snapshot_id: str) -> list[Relative]:
        """What descends from a snapshot, oldest first; not the instances it descends from itself.

        A deleted snapshot is among them only when something alive descends from it.
        """
        below = self._below(snapshot_id)
        above = {relative.id for relative in self.ancestors(snapshot_id)}
        line = {snapshot_id, *below}
        heirs = [
            self.instance(i.id)
            for i in self._instances.values()
            if i.id not in above and (i.parent_snapshot_id in line or i.head_snapshot_id in line)
        ]
        alive = [key for key in below if key in self._snapshots]
        shown: set[str] = set()
        for start in [*alive, *(heir.parent_snapshot_id for heir in heirs)]:
            step = start
            while step in below and step not in shown and step is not None:
                shown.add(step)
                step = self.snapshot(step).parent_snapshot_id
        return sorted([*map(self.snapshot, shown), *heirs], key=_age)

    def everyone(self) -> list[Relative]:
        """All snapshots and instances, and the deleted ones they refer to; oldest first."""
        found = {key: self.snapshot(key) for key in self._snapshots}
        found |= {key: self.instance(key) for key in self._instances}
        waiting = list(found.values())
        while waiting:
            relative = waiting.pop()
            referred = [self.source(relative)] if relative.source_instance_id else []
            if relative.parent_snapshot_id is not None:
                referred.append(self.snapshot(relative.parent_snapshot_id))
            if relative.parent_instance_id is not None:
                referred.append(self.instance(relative.parent_instance_id))
            for other in referred:
                if other is not None and other.id not in found:
                    found[other.id] = other
                    waiting.append(other)
        return sorted(found.values(), key=_age)

    def _below(self, snapshot_id: str) -> dict[str, None]:
        """Ids of all snapshots, remembered ones too, whose line of parents leads here."""
        children: dict[str, list[str]] = {}
        records: list[Snapshot | Forebear] = [
            *self._snapshots.values(),
            *self._forebears.values(),
        ]
        for record in records:
            if record.parent_snapshot_id is not None:
                children.setdefault(record.parent_snapshot_id, []).append(record.id)
        below: dict[str, None] = {}
        waiting = [snapshot_id]
        while waiting:
            for child in children.get(waiting.pop(), ()):
                if child not in below and child != snapshot_id:
                    below[child] = None
                    waiting.append(child)
        return below


def bury(
    forebears: Mapping[str, Forebear], gone: Snapshot | None, referred: Iterable[str | None]
) -> dict[str, Forebear]:
    """The forebears to remember once ``gone`` is deleted.

    ``referred`` are the snapshot ids that living records name as parent or head. Whom none of them
    names is forgotten, and those that named it name its parent instead.
    """
    graves = dict(forebears)
    if gone is not None:
        graves[gone.id] = Forebear(
            gone.id, gone.name, gone.created_at, gone.source_instance_id,
            gone.source_instance_name, gone.parent_snapshot_id,
        )  # fmt: skip
    wanted = set(referred)
    kept = {}
    for grave in graves.values():
        if grave.id not in wanted:
            continue
        parent, passed = grave.parent_snapshot_id, {grave.id}
        while parent in graves and parent not in wanted and parent not in passed:
            passed.add(parent)
            parent = graves[parent].parent_snapshot_id
        kept[grave.id] = replace(grave, parent_snapshot_id=parent)
    return kept


def _told_by(record: Instance, state: str | None, *, deleted: bool) -> Relative:
    return Relative(
        RelativeKind.INSTANCE, record.id, record.name, state, record.created_at,
        parent_snapshot_id=record.parent_snapshot_id,
        parent_instance_id=record.parent_instance_id, deleted=deleted,
    )  # fmt: skip


def _age(relative: Relative) -> tuple[datetime, str]:
    return relative.created_at or datetime.min.replace(tzinfo=UTC), relative.id
