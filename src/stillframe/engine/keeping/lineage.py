"""The family tree with weights: who shares memory with whom, and what each deletion would free.

Lineage itself is told by the records (``model/lineage.py``); sharing is told by the files, since
a fork maps its parent's image by a hard link, and by what the file system says of their extents.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import replace
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
    records = context.records
    places = [_place(RelativeKind.SNAPSHOT, key) for key in records.snapshots]
    places += [_place(RelativeKind.INSTANCE, key) for key in records.instances]
    with storage_errors("measure the snapshots"):
        return await asyncio.to_thread(_weigh, context.data, list(relatives), places)


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


_Place = tuple[RelativeKind, str]


def _place(kind: RelativeKind, identifier: str) -> _Place:
    return kind, identifier


def _weigh(data: DataDirectory, relatives: list[Relative], places: list[_Place]) -> list[Relative]:
    owners: dict[Inode, list[str]] = {}
    images: dict[str, set[Inode]] = {}
    expanded = {inode: path for path in files_in(data.expanded) for inode in _inodes([path])}
    for kind, identifier in places:
        images[identifier] = set(_inodes(_memory_files(data, kind, identifier)))
        for inode in images[identifier]:
            owners.setdefault(inode, []).append(identifier)
    weighed = []
    for relative in relatives:
        if relative.deleted:
            weighed.append(relative)
            continue
        shared = {other for inode in images.get(relative.id, ()) for other in owners[inode]}
        files = files_in(directory_of(data, relative.kind, relative.id))
        # An expanded image goes with the last who maps it.
        files += [expanded[inode] for inode in {*_inodes(files)} & expanded.keys()]
        freed = freed_by_deleting(files)
        others = tuple(sorted(shared - {relative.id}))
        weighed.append(replace(relative, exclusive_bytes=freed, shares_memory_with=others))
    return weighed


def directory_of(data: DataDirectory, kind: RelativeKind, identifier: str) -> Path:
    """Where the files of a snapshot or instance lie. Raises NotFound for what is no id."""
    if kind is RelativeKind.SNAPSHOT:
        return data.snapshot(identifier).directory
    return data.instance(identifier).directory


def _memory_files(data: DataDirectory, kind: RelativeKind, identifier: str) -> Iterable[Path]:
    if kind is RelativeKind.SNAPSHOT:
        payload = data.snapshot(identifier)
    else:
        payload = data.instance(identifier).standby
        yield data.instance(identifier).memory
    found = memory_file(payload)
    if found is not None:
        path, algorithm = found
        yield path
        if algorithm is not None:
            with contextlib.suppress(DamagedData):
                yield data.expanded / image_key(payload)


def _inodes(paths: Iterable[Path]) -> Iterable[Inode]:
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat(follow_symlinks=False)
            yield status.st_dev, status.st_ino
