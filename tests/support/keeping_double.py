"""The part of the engine double that keeps snapshots: it remembers, and answers plausibly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping.interface import (
    Allotment,
    Compatibility,
    DeletionPreview,
    DiskUse,
    HostResources,
    InstanceShare,
    InstanceUse,
    RetentionLine,
    RetentionPlan,
    RunPreview,
    SnapshotChanges,
    SnapshotUse,
    UploadStatus,
)
from stillframe.model.errors import NotFound
from stillframe.model.lineage import Family, Lineage, Relative
from stillframe.model.schedules import Schedule, ScheduleRequest, check_schedule, first_run
from stillframe.model.states import InstanceState
from stillframe.model.values import Hypervisor, Instance, Snapshot
from stillframe.model.verification import Damage, Depth, Verification

MADE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MANY = Allotment(8, 8, 2, 6)


@dataclass
class DoubleArchive:
    """An archive of three pieces; remembers that it was closed."""

    snapshot: Snapshot
    tag: str = "a" * 32
    closed: bool = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in (b"one ", b"two ", b"three"):
            yield piece

    async def close(self) -> None:
        self.closed = True


class KeepingDouble:
    """Schedules are kept; everything else is told from the double's instances and snapshots."""

    if TYPE_CHECKING:
        instances: list[Instance]
        snapshots: list[Snapshot]
        schedules: dict[str, Schedule]
        archives: list[DoubleArchive]

        def _note(self, name: str, /, *arguments: Any, **keywords: Any) -> None: ...

        def find_snapshot(self, reference: str) -> Snapshot: ...

    def edit_snapshot(self, snapshot_id: str, changes: SnapshotChanges) -> Snapshot:
        self._note("edit_snapshot", snapshot_id, changes)
        cleared: dict[str, Any] = {"tags": {}, "pinned": False}
        changed: dict[str, Any] = {
            key: cleared.get(key) if value is None else value for key, value in changes.items()
        }
        return replace(self.find_snapshot(snapshot_id), **changed)

    async def preview_deletion(self, snapshot_id: str, *, force: bool = False) -> DeletionPreview:
        self._note("preview_deletion", snapshot_id, force=force)
        snapshot = self.find_snapshot(snapshot_id)
        return DeletionPreview(snapshot, 4096, (self._family.instance(self.instances[0].id),))

    async def preview_fork(self, snapshot_id: str, request: ForkRequest) -> RunPreview:
        self._note("preview_fork", snapshot_id, request)
        return self._run_preview(snapshot_id, request.name)

    async def preview_forks(
        self, snapshot_id: str, requests: Sequence[ForkRequest]
    ) -> list[RunPreview]:
        self._note("preview_forks", snapshot_id, tuple(requests))
        return [self._run_preview(snapshot_id, request.name) for request in requests]

    async def preview_instance_fork(
        self,
        instance_id: str,
        *,
        name: str,
        from_running: bool = False,
        target_state: InstanceState | None = None,
    ) -> RunPreview:
        self._note(
            "preview_instance_fork", instance_id,
            name=name, from_running=from_running, target_state=target_state,
        )  # fmt: skip
        return replace(self._run_preview(self.snapshots[0].id, name), source=self.instances[0])

    async def preview_instance_deletion(self, instance_id: str) -> DeletionPreview:
        self._note("preview_instance_deletion", instance_id)
        return DeletionPreview(self.instances[0], 4096, ())

    async def preview_restore(
        self,
        instance_id: str,
        snapshot_id: str,
        *,
        target_state: InstanceState | None = None,
        target_hypervisor: Hypervisor | None = None,
    ) -> RunPreview:
        self._note(
            "preview_restore", instance_id, snapshot_id,
            target_state=target_state, target_hypervisor=target_hypervisor,
        )  # fmt: skip
        return self._run_preview(snapshot_id, "source", lost=8192)

    def _run_preview(self, snapshot_id: str, name: str, lost: int = 0) -> RunPreview:
        return RunPreview(
            self.find_snapshot(snapshot_id), name, InstanceState.RUNNING, Hypervisor.QEMU,
            1 << 30, 4096, 0, lost, ("the name is taken",), ("try another",),
        )  # fmt: skip

    @property
    def _family(self) -> Family:
        return Family({s.id: s for s in self.snapshots}, {i.id: i for i in self.instances}, {})

    async def lineage(self, snapshot_id: str) -> Lineage:
        self._note("lineage", snapshot_id)
        family = self._family
        above, below = family.ancestors(snapshot_id), family.descendants(snapshot_id)
        return Lineage(family.snapshot(snapshot_id), tuple(above), tuple(below))

    async def family(self, instance_id: str | None = None) -> list[Relative]:
        self._note("family", instance_id)
        return self._family.everyone()

    def find_schedule(self, instance_id: str) -> Schedule:
        self._note("find_schedule", instance_id)
        if instance_id not in self.schedules:
            raise NotFound("the instance has no snapshot schedule")
        return self.schedules[instance_id]

    def set_schedule(self, instance_id: str, wanted: ScheduleRequest) -> Schedule:
        self._note("set_schedule", instance_id, wanted)
        check_schedule(wanted)
        first = first_run(wanted, MADE)
        self.schedules[instance_id] = Schedule(
            instance_id, wanted.retention, first, MADE, MADE, first,
            interval=wanted.interval, cron=wanted.cron, name_prefix=wanted.name_prefix,
            metadata=wanted.metadata, paused=wanted.paused,
        )  # fmt: skip
        return self.schedules[instance_id]

    def delete_schedule(self, instance_id: str) -> None:
        self._note("delete_schedule", instance_id)
        del self.schedules[self.find_schedule(instance_id).instance_id]

    async def run_schedule(self, instance_id: str) -> Schedule:
        self._note("run_schedule", instance_id)
        return replace(self.find_schedule(instance_id), last_run_at=MADE, last_snapshot_id="s" * 24)

    async def explain_retention(self, instance_id: str) -> RetentionPlan:
        self._note("explain_retention", instance_id)
        self.find_schedule(instance_id)
        lines = [RetentionLine(s, False, ("no rule keeps it",), 4096) for s in self.snapshots]
        return RetentionPlan(MADE + timedelta(days=1), tuple(lines), 4096 * len(lines))

    async def resources(self) -> HostResources:
        self._note("resources")
        shares = [InstanceShare(i.id, i.name, 2, 2**30, 2**33) for i in self.instances]
        used = SnapshotUse(len(self.snapshots), 1024, 0, 0, 0)
        return HostResources(MANY, MANY, MANY, MANY, DiskUse(1, 2, 3), used, tuple(shares))

    def instance_use(self, instance_id: str) -> InstanceUse:
        self._note("instance_use", instance_id)
        found = next(i for i in self.instances if i.id == instance_id)
        return InstanceUse(found, 1.5, 2**20, 2**30, None)

    async def verify_snapshot(self, snapshot_id: str, depth: Depth) -> Verification:
        self._note("verify_snapshot", snapshot_id, depth)
        damage = (Damage("memory", 65536, 4096, "memory does not match its digest"),)
        return Verification(depth, 1000, 2000, 0.5, damage, 4096, ("devices",))

    async def compatibility(self, snapshot_id: str) -> Compatibility:
        self._note("compatibility", snapshot_id)
        return Compatibility(False, ("its memory was captured elsewhere",))

    async def export_snapshot(self, snapshot_id: str, **options: Any) -> DoubleArchive:
        self._note("export_snapshot", snapshot_id, **options)
        self.archives.append(DoubleArchive(self.find_snapshot(snapshot_id)))
        return self.archives[-1]

    async def import_snapshot(self, chunks: AsyncIterator[bytes], **options: Any) -> Snapshot:
        received = b"".join([chunk async for chunk in chunks])
        self._note("import_snapshot", received, **options)
        return replace(self.snapshots[0], name=options["name"])

    def upload_status(self, upload: str) -> UploadStatus:
        self._note("upload_status", upload)
        return UploadStatus(1000)
