"""Thousands of snapshots in a data directory, made without capturing any."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stillframe.model.states import InstanceState
from stillframe.model.units import new_id
from stillframe.model.values import Hypervisor, Instance, Snapshot, SnapshotKind
from stillframe.store.paths import DataDirectory
from stillframe.store.payloads import seal
from stillframe.store.records import Records, to_json

_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def make_many(root: Path, how_many: int, *, payloads: bool = True) -> None:
    """Fill a new data directory with records of snapshots, each with a small payload of its own."""
    data = DataDirectory(root)
    data.create()
    source = Instance(
        id=new_id(), name="source", image="stillframe/base", image_digest="",
        state=InstanceState.STOPPED, created_at=_BEGAN, phase_since=_BEGAN,
        hypervisor=Hypervisor.FAKE, memory_bytes=64 << 20, overlay_bytes=16 << 20, vcpus=1,
    )  # fmt: skip
    made = Snapshot(
        id="", kind=SnapshotKind.STOPPED, name=None, tags={}, source_instance_id=source.id,
        source_instance_name=source.name, source_hypervisor=source.hypervisor,
        created_at=_BEGAN, size_bytes=4096, parent_snapshot_id=None, template=source,
    )  # fmt: skip
    snapshots = [
        replace(
            made,
            id=new_id(),
            name=f"snapshot-{number}",
            tags={"number": str(number), "even": str(number % 2 == 0)},
            created_at=_BEGAN + timedelta(seconds=number),
        )
        for number in range(how_many)
    ]
    _write_records(data, snapshots)
    if payloads:
        _write_payloads(data, snapshots)


def _write_records(data: DataDirectory, snapshots: list[Snapshot]) -> None:
    records = Records(data.database)
    with records.transaction() as sql:
        sql.executemany(
            "INSERT INTO snapshots (id, source_instance_id, name, document) VALUES (?, ?, ?, ?)",
            [(s.id, s.source_instance_id, s.name, to_json(s)) for s in snapshots],
        )
    records.close()


def _write_payloads(data: DataDirectory, snapshots: list[Snapshot]) -> None:
    first, *others = snapshots
    payload = data.snapshot(first.id)
    payload.directory.mkdir()
    payload.overlay.write_bytes(bytes(4096))
    seal(payload, {"hypervisor": "fake"})
    for other in others:
        shutil.copytree(payload.directory, data.snapshot(other.id).directory)
