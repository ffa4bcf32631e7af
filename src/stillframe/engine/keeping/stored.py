"""What each snapshot takes on disk, told so that all together take the sum.

Bytes that snapshots share are one snapshot's only: each is measured *beside* another, the nearest
living one that it descends from, and what the two share is counted there. When that one goes, or is
compressed, those measured beside it are measured anew; nobody else is. What a snapshot shares with
an instance is counted for the snapshot, which goes on having it when the instance is gone.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from stillframe.engine.context import Context
from stillframe.host.files import storage_errors
from stillframe.model.values import Snapshot
from stillframe.store.paths import Payload
from stillframe.store.payloads import measure


def nearest_living(context: Context, snapshot_id: str | None) -> str | None:
    """The snapshot itself, or the nearest of those it descended from that is still there."""
    records, passed = context.records, set[str]()
    while snapshot_id is not None and snapshot_id not in records.snapshots:
        gone = records.forebears.get(snapshot_id)
        passed.add(snapshot_id)
        snapshot_id = None if gone is None else gone.parent_snapshot_id
        if snapshot_id in passed:
            return None
    return snapshot_id


def payload_beside(context: Context, beside: str | None) -> Payload | None:
    """The payload to measure beside."""
    return None if beside is None else context.data.snapshot(beside)


async def measured(context: Context, taken: Snapshot, payload: Payload) -> Snapshot:
    """A snapshot that is about to be committed, with what its sealed payload takes.

    Raises HostFailure.
    """
    while True:
        beside = nearest_living(context, taken.parent_snapshot_id)
        with storage_errors("measure the snapshot"):
            size = await asyncio.to_thread(measure, payload, payload_beside(context, beside))
        if beside is None or beside in context.records.snapshots:  # not deleted meanwhile
            return replace(taken, stored_bytes=size.stored, stored_beside=beside)


async def measure_heirs(context: Context, snapshot_id: str, beside: str | None) -> None:
    """Measure anew who was measured beside ``snapshot_id``, which is gone or not what it was.

    One of them is measured ``beside``; it takes over what they share, so the others are measured
    beside that one. While ``snapshot_id`` is there it is itself whom they are measured beside.
    """
    heirs = [s.id for s in context.records.snapshots.values() if s.stored_beside == snapshot_id]
    for heir in heirs:
        await measure_anew(context, heir, beside)
        if snapshot_id not in context.records.snapshots:
            beside = heir


async def measure_anew(context: Context, snapshot_id: str, beside: str | None) -> None:
    """Measure a snapshot beside another, and write that down; gone stays gone."""
    if beside not in context.records.snapshots:
        beside = None
    payload = context.data.snapshot(snapshot_id)
    try:
        size = await asyncio.to_thread(measure, payload, payload_beside(context, beside))
    except OSError:  # it is going, or cannot be read: the figure stays as it is
        return
    known = context.records.snapshots.get(snapshot_id)
    if known is not None:
        anew = replace(known, stored_bytes=size.stored, stored_beside=beside)
        if anew != known:
            context.records.update_snapshot(anew, can_wait=True)  # it is as it is


async def settle(context: Context) -> None:
    """Measure anew whom the end of a server kept from it."""
    snapshots = context.records.snapshots
    gone = {s.stored_beside for s in snapshots.values()} - snapshots.keys()
    for snapshot_id in gone:
        if snapshot_id is not None:
            await measure_heirs(context, snapshot_id, nearest_living(context, snapshot_id))
