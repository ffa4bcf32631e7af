"""The verbs of ``KeepingInterface``, as a part of the engine."""

from __future__ import annotations

from stillframe.engine.context import Context
from stillframe.engine.keeping import edit, lineage, resources, retain
from stillframe.engine.keeping.interface import (
    DeletionPreview,
    HostResources,
    RetentionPlan,
    SnapshotChanges,
)
from stillframe.engine.keeping.schedule import Scheduler
from stillframe.model.lineage import Lineage, Relative
from stillframe.model.schedules import Schedule, ScheduleRequest
from stillframe.model.values import Snapshot


class KeepingVerbs:
    """A base of ``Engine``, which gives it a context and a scheduler."""

    context: Context
    scheduler: Scheduler

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

    async def lineage(self, snapshot_id: str) -> Lineage:
        """Ancestors and descendants of a snapshot, each measured."""
        return await lineage.lineage(self.context, snapshot_id)

    async def family(self, instance_id: str | None = None) -> list[Relative]:
        """Every snapshot and instance (or those related to one), each measured, oldest first."""
        return await lineage.family(self.context, instance_id)

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
        return await self.scheduler.run(instance_id)

    async def explain_retention(self, instance_id: str) -> RetentionPlan:
        """What the schedule's retention would do now, and why."""
        schedule = self.scheduler.find(instance_id)
        return await retain.explain(self.context, schedule, self.scheduler.clock.read())

    async def resources(self) -> HostResources:
        """What the host has, and who has it."""
        return await resources.resources(self.context)
