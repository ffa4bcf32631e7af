"""Verifying a snapshot as people ask for it: what is found is kept with its record.

A damaged snapshot is marked and never deleted for it. It is neither loaded nor exported until a
full verification finds it whole again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import replace

from stillframe.engine.context import Context
from stillframe.engine.steps import Steps
from stillframe.host.files import storage_errors
from stillframe.model.errors import DamagedData, NotFound
from stillframe.model.values import Snapshot
from stillframe.model.verification import Depth, Verification
from stillframe.store.verification import verify

_STEP_SECONDS = 0.05  # how long a deletion waits for a verification, and others for its thread


async def verify_snapshot(context: Context, snapshot_id: str, depth: Depth) -> Verification:
    """Verify what is stored of a snapshot; mark it damaged, or no longer after a full depth.

    Ends soon when the snapshot is deleted meanwhile. Raises NotFound, HostFailure.
    """
    async with context.using(snapshot_id):
        work = verify(context.data.snapshot(snapshot_id), depth, seed=secrets.randbits(64))
        steps, found = Steps(), None
        try:
            with storage_errors("read the snapshot"):
                while (latest := await steps.run(_go_on, work)) is not None:
                    found = latest
                    if snapshot_id not in context.records.snapshots:
                        raise NotFound("the snapshot was deleted while it was verified")
        finally:
            await steps.run(work.close)
        assert found is not None  # noqa: S101 - a verification reports at least once
        _mark(context, context.snapshot(snapshot_id), found)
        return found


def _go_on(work: Iterator[Verification]) -> Verification | None:
    """Verify for a while; the state of the work, None when there was nothing left."""
    until, latest = time.monotonic() + _STEP_SECONDS, None
    for state in work:
        latest = state
        if time.monotonic() >= until:
            break
    return latest


def _mark(context: Context, snapshot: Snapshot, found: Verification) -> None:
    damaged = describe(found)
    if damaged is None and found.depth is not Depth.FULL:
        return  # what was not read may be as damaged as before
    if damaged != snapshot.damaged:
        # The finding stands, whether or not it can be written down now.
        context.records.update_snapshot(replace(snapshot, damaged=damaged), can_wait=True)


def describe(found: Verification) -> str | None:
    """The damage in one sentence; None when there is none."""
    if not found.damage:
        return None
    first, *others = found.damage
    more = f", and {len(others)} more places" if others else ""
    return f"{first.file}: {first.length} bytes at {first.offset}{more} ({first.reason})"


def refuse_damaged(snapshot: Snapshot) -> None:
    """Raises DamagedData for a snapshot that is marked as damaged."""
    if snapshot.damaged is not None:
        raise DamagedData(
            f"snapshot {snapshot.name or snapshot.id} is damaged: {snapshot.damaged}",
            hint="use another snapshot; a full verification that finds nothing lifts the mark",
            snapshot_id=snapshot.id,
        )
