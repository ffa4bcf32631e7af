"""The verbs of ``KeepingInterface``, as a part of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta

from stillframe.engine.context import Context
from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping import edit, expiry, lineage, preview, resources, retain, verify
from stillframe.engine.keeping.interface import (
    Compatibility,
    DeletionPreview,
    ExportedArchive,
    HostResources,
    InstanceUse,
    RetentionPlan,
    RunPreview,
    SnapshotChanges,
    UploadStatus,
)
from stillframe.engine.keeping.schedule import Scheduler
from stillframe.engine.moving import arrival, compatibility, export
from stillframe.engine.moving.uploads import Uploads
from stillframe.model.errors import InvalidRequest
from stillframe.model.lineage import Lineage, Relative
from stillframe.model.schedules import Schedule, ScheduleRequest
from stillframe.model.states import InstanceState
from stillframe.model.values import Hypervisor, Instance, Snapshot
from stillframe.model.verification import Depth, Verification


class KeepingVerbs:
    """A base of ``Engine``, which gives it a context, a scheduler and the uploads."""

    context: Context
    scheduler: Scheduler
    uploads: Uploads

    def edit_snapshot(self, snapshot_id: str, changes: SnapshotChanges) -> Snapshot:
        """Change the words beside a snapshot."""
        edited = edit.edit_snapshot(self.context, snapshot_id, changes)
        self.scheduler.wake()  # it may expire earlier now
        return edited

    async def delete_snapshot(self, snapshot_id: str, *, force: bool = False) -> None:
        """Delete; forks and source go on unharmed."""
        await edit.delete_snapshot(self.context, snapshot_id, force=force)

    async def preview_deletion(self, snapshot_id: str, *, force: bool = False) -> DeletionPreview:
        """What ``delete_snapshot`` would do, doing nothing."""
        return await edit.preview_deletion(self.context, snapshot_id, force=force)

    async def preview_fork(self, snapshot_id: str, request: ForkRequest) -> RunPreview:
        """What ``fork_snapshot`` would do, doing nothing."""
        return await preview.preview_fork(self.context, snapshot_id, request)

    async def preview_forks(
        self, snapshot_id: str, requests: Sequence[ForkRequest]
    ) -> list[RunPreview]:
        """What ``fork_many`` would do, one answer each, doing nothing."""
        return await preview.preview_forks(self.context, snapshot_id, requests)

    async def preview_instance_fork(
        self,
        instance_id: str,
        *,
        name: str,
        from_running: bool = False,
        target_state: InstanceState | None = None,
    ) -> RunPreview:
        """What ``fork`` would do, doing nothing."""
        return await preview.preview_instance_fork(
            self.context,
            instance_id,
            name=name,
            from_running=from_running,
            target_state=target_state,
        )

    async def preview_instance_deletion(self, instance_id: str) -> DeletionPreview:
        """What ``delete`` would do, doing nothing."""
        return await edit.preview_instance_deletion(self.context, instance_id)

    async def preview_restore(
        self,
        instance_id: str,
        snapshot_id: str,
        *,
        target_state: InstanceState | None = None,
        target_hypervisor: Hypervisor | None = None,
    ) -> RunPreview:
        """What ``restore_snapshot`` would do, doing nothing."""
        return await preview.preview_restore(
            self.context,
            instance_id,
            snapshot_id,
            target_state=target_state,
            target_hypervisor=target_hypervisor,
        )

    async def lineage(self, snapshot_id: str) -> Lineage:
        """Ancestors and descendants of a snapshot, each measured."""
        return await lineage.lineage(self.context, snapshot_id)

    async def family(self, instance_id: str | None = None) -> list[Relative]:
        """Every snapshot and instance (or those related to one), each measured, oldest first."""
        return await lineage.family(self.context, instance_id)

    async def set_expiry(
        self,
        instance_id: str,
        *,
        expires_at: datetime | None = None,
        lifetime: timedelta | None = None,
    ) -> Instance:
        """Change when an instance is deleted by itself."""
        believed = self.scheduler.clock.read()
        changed = await expiry.set_expiry(
            self.context, instance_id, believed, expires_at=expires_at, lifetime=lifetime
        )
        self.scheduler.wake()
        return changed

    def find_schedule(self, instance_id: str) -> Schedule:
        """The schedule of an instance."""
        return self.scheduler.find(instance_id)

    def set_schedule(self, instance_id: str, wanted: ScheduleRequest) -> Schedule:
        """Make or replace the schedule of an instance."""
        return self.scheduler.set(instance_id, wanted)

    def delete_schedule(self, instance_id: str) -> None:
        """Forget the schedule; its snapshots stay for good."""
        self.scheduler.delete(instance_id)

    async def run_schedule(self, instance_id: str) -> Schedule:
        """Take the schedule's snapshot now, then apply its retention."""
        with self.context.under_way():
            return await self.scheduler.run(instance_id)

    async def explain_retention(self, instance_id: str) -> RetentionPlan:
        """What the schedule's retention would do now, and why."""
        schedule = self.scheduler.find(instance_id)
        return await retain.explain(self.context, schedule, self.scheduler.clock.read())

    async def resources(self) -> HostResources:
        """What the host has, and who has it."""
        return await resources.resources(self.context)

    def instance_use(self, instance_id: str) -> InstanceUse:
        """What the VMM of an instance takes."""
        return resources.instance_use(self.context, instance_id)

    async def verify_snapshot(self, snapshot_id: str, depth: Depth) -> Verification:
        """Verify what is stored, locate damage, mark the snapshot by it."""
        return await verify.verify_snapshot(self.context, snapshot_id, depth)

    async def compatibility(self, snapshot_id: str) -> Compatibility:
        """Whether a snapshot can be forked on this host, and why not."""
        return await compatibility.compatibility(self.context, snapshot_id)

    async def export_snapshot(
        self, snapshot_id: str, *, image: bool = False, offset: int = 0, tag: str | None = None
    ) -> ExportedArchive:
        """The archive of a snapshot from byte ``offset`` on, with its ``image`` if wanted."""
        return await export.export_snapshot(
            self.context, snapshot_id, image=image, offset=offset, tag=tag
        )

    async def import_snapshot(
        self,
        chunks: AsyncIterator[bytes],
        *,
        name: str | None = None,
        allow_foreign: bool = False,
        add_image: bool = True,
        upload: str | None = None,
        offset: int = 0,
    ) -> Snapshot:
        """A new snapshot from the bytes of an archive; durable on return."""
        wishes = arrival.ImportWishes(name, allow_foreign, add_image)
        with self.context.under_way():
            if upload is not None:
                return await self.uploads.take(upload, offset, chunks, wishes)
            if offset:
                raise InvalidRequest("an import at an offset must say of which upload")
            return await arrival.import_snapshot(self.context, chunks, wishes)

    def upload_status(self, upload: str) -> UploadStatus:
        """How far such an import has come."""
        return self.uploads.status(upload)
