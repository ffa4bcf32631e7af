"""The family tree with weights: who shares memory with whom, and what each deletion would free.

Lineage itself is told by the records (``model/lineage.py``); sharing is told by the files, since
a fork maps its parent's image by a hard link, and by what the file system says of their extents.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stillframe.engine.context import Context
from stillframe.host.extents import files_in, freed_by_deleting
from stillframe.host.files import storage_errors
from stillframe.model.errors import DamagedData
from stillframe.model.lineage import Family, Lineage, Relative, RelativeKind
from stillframe.store.paths import DataDirectory
from stillframe.store.payloads import image_key, memory_file

Inode = tuple[int, int]


def family_of(context: Context) -> Family:
    """The family tree of everything recorded."""
    records = context.records
    return Family(records.snapshots, records.instances, records.forebears)


async def lineage(context: Context, snapshot_id: str) -> Lineage:
    """Ancestors and descendants of a snapshot, each measured. Raises NotFound."""
    context.snapshot(snapshot_id)
    family = family_of(context)
    ancestors, descendants = family.ancestors(snapshot_id), family.descendants(snapshot_id)
    itself, *others = await weigh(context, [family.snapshot(snapshot_id), *ancestors, *descendants])
    return Lineage(itself, tuple(others[: len(ancestors)]), tuple(others[len(ancestors) :]))


async def family(context: Context, instance_id: str | None = None) -> list[Relative]:
    """Everybody, or everybody related to an instance, measured. Raises NotFound."""
    everyone = family_of(context).everyone()
    if instance_id is not None:
        related = _related(everyone, context.instance(instance_id).id)
        everyone = [relative for relative in everyone if relative.id in related]
    return await weigh(context, everyone)


async def weigh(context: Context, relatives: Iterable[Relative]) -> list[Relative]:
    """The relatives with ``exclusive_bytes`` and ``shares_memory_with`` filled in."""
    records, relatives = context.records, list(relatives)
    # Who may share: first those who are asked about, for they most often do.
    likely = {one.id: _Place(one.kind, one.id) for one in relatives if not one.deleted}
    others = [_Place(RelativeKind.SNAPSHOT, key) for key in records.snapshots]
    others += [_Place(RelativeKind.INSTANCE, key) for key in records.instances]
    places = [*likely.values(), *(place for place in others if place.id not in likely)]
    with storage_errors("measure the snapshots"):
        return await asyncio.to_thread(_weigh, context.data, relatives, places, warm_forks(context))


def warm_forks(context: Context) -> dict[str, list[str]]:
    """The ids of forks in waiting, by their snapshot: it is deleted together with them."""
    found: dict[str, list[str]] = {}
    for intent in list(context.records.intents.values()):
        if intent.verb == "fork" and "warm" in intent.facts:
            found.setdefault(intent.facts["warm"], []).append(intent.subject)
    return found


def _related(everyone: Iterable[Relative], instance_id: str) -> set[str]:
    """Ids of all who are connected with an instance, in whatever degree."""
    links: dict[str, set[str]] = {}
    for relative in everyone:
        for other in (
            relative.parent_snapshot_id, relative.parent_instance_id, relative.source_instance_id
        ):  # fmt: skip
            if other is not None:
                links.setdefault(relative.id, set()).add(other)
                links.setdefault(other, set()).add(relative.id)
    related, waiting = {instance_id}, [instance_id]
    while waiting:
        for other in links.get(waiting.pop(), set()) - related:
            related.add(other)
            waiting.append(other)
    return related


@dataclass(frozen=True, slots=True)
class _Place:
    """A snapshot or an instance, and so a directory."""

    kind: RelativeKind
    id: str


def _weigh(
    data: DataDirectory,
    relatives: list[Relative],
    places: list[_Place],
    warm: Mapping[str, list[str]],
) -> list[Relative]:
    images = _Images(data, warm)
    for relative in relatives:
        if not relative.deleted:
            images.want(_Place(relative.kind, relative.id))
    images.find(places)
    weighed = []
    for relative in relatives:
        if relative.deleted:
            weighed.append(relative)
            continue
        freed = freed_by_deleting(files_going(data, relative.kind, relative.id, warm))
        others = images.sharers(_Place(relative.kind, relative.id))
        weighed.append(replace(relative, exclusive_bytes=freed, shares_memory_with=others))
    return weighed


class _Images:
    """Who holds the memory images in question. Looks at no more places than it must.

    A file's link count says how many names it has; when all of an image are found, nobody else can
    hold it. Only who has it compressed has no link of it, and must be asked for its digest.
    """

    def __init__(self, data: DataDirectory, warm: Mapping[str, list[str]]) -> None:
        self._data = data
        self._expanded = {inode for path in files_in(data.expanded) for inode, _ in _links([path])}
        self._missing: dict[Inode, int] = {}  # names not found yet
        self._owners: dict[Inode, list[str]] = {}
        self._images: dict[str, set[Inode]] = {}
        self._warm = [identifier for forks in warm.values() for identifier in forks]

    def want(self, place: _Place) -> None:
        """Ask who shares the image of this place."""
        held = list(_links(_memory_files(self._data, place.kind, place.id)))
        self._images[place.id] = {inode for inode, _ in held}
        for inode, links in held:
            if links > 1:
                self._missing[inode] = links
                self._owners[inode] = []

    def find(self, places: Iterable[_Place]) -> None:
        """Look for the owners among ``places``, until all are found."""
        asked_for = bool(self._missing.keys() & self._expanded)
        for inode in self._missing.keys() & self._expanded:
            self._missing[inode] -= 1
        for identifier in self._warm:
            self._count(_links([self._data.instance(identifier).memory]))
        for place in places:
            if not asked_for and not any(self._missing.values()):
                return
            files = _memory_files(self._data, place.kind, place.id, expanded=asked_for)
            for inode in self._count(_links(files)):
                self._owners[inode].append(place.id)

    def _count(self, links: Iterable[tuple[Inode, int]]) -> set[Inode]:
        found = [inode for inode, _ in links if inode in self._missing]
        for inode in found:
            self._missing[inode] = max(0, self._missing[inode] - 1)
        return set(found)

    def sharers(self, place: _Place) -> tuple[str, ...]:
        """Ids of the others that hold an image of this place."""
        found = {one for inode in self._images[place.id] for one in self._owners.get(inode, ())}
        return tuple(sorted(found - {place.id}))


def files_going(
    data: DataDirectory, kind: RelativeKind, identifier: str, warm: Mapping[str, list[str]]
) -> list[Path]:
    """All files that go with a snapshot or instance: its own, and those of its ``warm`` forks.

    An expanded image is among them: it goes with the last who maps it.
    """
    files = files_in(directory_of(data, kind, identifier))
    for fork in warm.get(identifier, ()):
        files += files_in(data.instance(fork).directory)
    held = {inode for inode, _ in _links(files)}
    return files + [
        path for path in files_in(data.expanded) if any(i in held for i, _ in _links([path]))
    ]


def directory_of(data: DataDirectory, kind: RelativeKind, identifier: str) -> Path:
    """Where the files of a snapshot or instance lie. Raises NotFound for what is no id."""
    if kind is RelativeKind.SNAPSHOT:
        return data.snapshot(identifier).directory
    return data.instance(identifier).directory


def _memory_files(
    data: DataDirectory, kind: RelativeKind, identifier: str, *, expanded: bool = True
) -> Iterable[Path]:
    """Where its memory images may lie; with ``expanded`` that of a compressed one, too."""
    if kind is RelativeKind.SNAPSHOT:
        payload = data.snapshot(identifier)
    else:
        payload = data.instance(identifier).standby
        yield data.instance(identifier).memory
    found = memory_file(payload)
    if found is not None:
        path, algorithm = found
        yield path
        if algorithm is not None and expanded:
            with contextlib.suppress(DamagedData):
                yield data.expanded / image_key(payload)


def _links(paths: Iterable[Path]) -> Iterable[tuple[Inode, int]]:
    """The files that are there, and how many names each has."""
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat(follow_symlinks=False)
            yield (status.st_dev, status.st_ino), status.st_nlink
