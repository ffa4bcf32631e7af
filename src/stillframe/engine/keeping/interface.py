"""What the engine offers for keeping snapshots: part of ``EngineInterface``, in a file of its own.

Sizes are bytes. Every verb raises only StillframeError (or CancelledError).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol, TypedDict

from stillframe.model.lineage import Lineage, Relative
from stillframe.model.schedules import Schedule, ScheduleRequest
from stillframe.model.states import InstanceState
from stillframe.model.values import Hypervisor, Instance, Snapshot
from stillframe.model.verification import Depth, Verification

if TYPE_CHECKING:  # it builds on this one
    from stillframe.engine.interface import ForkRequest


class SnapshotChanges(TypedDict, total=False):
    """What to change of a snapshot: absent keys stay, None clears (``pinned``: false)."""

    name: str | None
    tags: Mapping[str, str] | None
    description: str | None
    expires_at: datetime | None
    pinned: bool | None


@dataclass(frozen=True, slots=True)
class DeletionPreview:
    """What a deletion would do: the bytes it frees, and who goes on sharing the rest.

    ``refused`` says why it would be refused (None: it would not); ``in_use`` counts verbs under way
    that the deletion would wait for.
    """

    subject: Snapshot | Instance
    bytes_freed: int
    shared_with: tuple[Relative, ...]
    refused: str | None = None
    in_use: int = 0


@dataclass(frozen=True, slots=True)
class RunPreview:
    """What forking or restoring would do: a snapshot, or forking an instance as it is.

    ``refused`` are all reasons against it, none if it would be done; ``advice`` is what would help.
    ``bytes_copied`` is disk, where blocks cannot be shared; ``bytes_expanded`` compressed memory;
    ``bytes_lost`` what a restore in place gives up for ever; ``bytes_captured`` what is written
    of a running instance, and removed again when nobody uses it.
    """

    source: Snapshot | Instance
    name: str
    state: InstanceState | None
    hypervisor: Hypervisor
    memory_bytes: int
    bytes_copied: int
    bytes_expanded: int
    bytes_lost: int = 0
    refused: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    bytes_captured: int = 0


@dataclass(frozen=True, slots=True)
class RetentionLine:
    """One of a schedule's own snapshots: whether it is kept, why, and what deleting it frees."""

    snapshot: Snapshot
    keep: bool
    reasons: tuple[str, ...]
    bytes_freed: int


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What retention would do at ``now``; ``bytes_freed`` by all that go, taken together."""

    now: datetime
    lines: tuple[RetentionLine, ...]
    bytes_freed: int


@dataclass(frozen=True, slots=True)
class Allotment:
    """A resource of the host: what there is, may be given, is given, and is left.

    ``capacity`` and the others are vCPUs, bytes, or bytes per second; zero capacity is unknown.
    """

    capacity: int
    effective_limit: int
    allocated: int
    available: int


@dataclass(frozen=True, slots=True)
class InstanceShare:
    """What one instance takes, nothing but disk while it has no VMM.

    Limits are bytes a second, 0 where there is none.
    """

    instance_id: str
    instance_name: str
    cpu: int
    memory_bytes: int
    disk_bytes: int
    network_download_bps: int = 0
    network_upload_bps: int = 0
    disk_io_bps: int = 0


@dataclass(frozen=True, slots=True)
class InstanceUse:
    """What the VMM of an instance takes, all zero while there is none.

    ``network_received_bytes`` and ``network_sent_bytes`` are what the guest got and sent in frames
    since its VMM began: zero without a network, and None where nothing counts them.
    """

    instance: Instance
    cpu_seconds: float = 0.0
    memory_resident_bytes: int = 0
    memory_virtual_bytes: int = 0
    network_received_bytes: int | None = 0
    network_sent_bytes: int | None = 0


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Bytes on disk by what they hold; what is hard-linked counts once, for the snapshot."""

    images: int
    instances: int
    snapshots: int


@dataclass(frozen=True, slots=True)
class SnapshotUse:
    """How much of the quotas is used; a limit of zero is none."""

    count: int
    stored_bytes: int
    max_snapshots: int
    max_snapshot_bytes: int
    min_free_bytes: int


@dataclass(frozen=True, slots=True)
class HostResources:
    """The host's resources and who has them."""

    cpu: Allotment
    memory: Allotment
    disk: Allotment
    network: Allotment
    disk_use: DiskUse
    snapshots: SnapshotUse
    shares: tuple[InstanceShare, ...]


@dataclass(frozen=True, slots=True)
class Compatibility:
    """Whether a snapshot can be forked here. ``reasons`` say why not, or what it needs."""

    fork: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """How far an import with a name has come: bytes taken in, and the snapshot when it is whole."""

    offset: int
    snapshot_id: str | None = None


class ExportedArchive(Protocol):
    """The archive of a snapshot as it is being made: its bytes, from the offset asked for.

    ``tag`` names the content of the whole archive: two with equal tags are equal. Iterating raises
    DamagedData when damage is found; what has come until then is no whole archive.
    """

    snapshot: Snapshot
    tag: str

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The bytes, in pieces of about 1 MiB."""

    async def close(self) -> None:
        """Close its files. Idempotent; due also when nothing was read."""


class KeepingInterface(Protocol):
    """Editing, deleting, scheduling and weighing snapshots; the host's resources."""

    def edit_snapshot(self, snapshot_id: str, changes: SnapshotChanges) -> Snapshot:
        """Change the words beside a snapshot. Raises NotFound, InvalidRequest, Conflict (name)."""

    async def delete_snapshot(self, snapshot_id: str, *, force: bool = False) -> None:
        """Delete; forks and source go on unharmed. Raises NotFound, Conflict (pinned, no force)."""

    async def preview_deletion(self, snapshot_id: str, *, force: bool = False) -> DeletionPreview:
        """What ``delete_snapshot`` would do, doing nothing. Raises NotFound."""

    async def preview_fork(self, snapshot_id: str, request: ForkRequest) -> RunPreview:
        """What ``fork_snapshot`` would do, doing nothing. Raises NotFound."""

    async def preview_forks(
        self, snapshot_id: str, requests: Sequence[ForkRequest]
    ) -> list[RunPreview]:
        """What ``fork_many`` would do, one answer each, doing nothing. Raises NotFound."""

    async def preview_instance_fork(
        self,
        instance_id: str,
        *,
        name: str,
        from_running: bool = False,
        target_state: InstanceState | None = None,
    ) -> RunPreview:
        """What ``fork`` would do, doing nothing. Raises NotFound."""

    async def preview_instance_deletion(self, instance_id: str) -> DeletionPreview:
        """What ``delete`` would do, doing nothing. Raises NotFound."""

    async def preview_restore(
        self,
        instance_id: str,
        snapshot_id: str,
        *,
        target_state: InstanceState | None = None,
        target_hypervisor: Hypervisor | None = None,
    ) -> RunPreview:
        """What ``restore_snapshot`` would do, doing nothing. Raises NotFound."""

    async def lineage(self, snapshot_id: str) -> Lineage:
        """Ancestors and descendants of a snapshot, each measured. Raises NotFound."""

    async def family(self, instance_id: str | None = None) -> list[Relative]:
        """Every snapshot and instance (or those related to one), each measured, oldest first."""

    async def set_expiry(
        self,
        instance_id: str,
        *,
        expires_at: datetime | None = None,
        lifetime: timedelta | None = None,
    ) -> Instance:
        """Change when an instance is deleted by itself; a lifetime of zero, or neither: never.

        Raises NotFound, InvalidRequest, InvalidState (it is being made), Conflict (expired).
        """

    def find_schedule(self, instance_id: str) -> Schedule:
        """The schedule of an instance. Raises NotFound when either is missing."""

    def set_schedule(self, instance_id: str, wanted: ScheduleRequest) -> Schedule:
        """Make or replace the schedule of an instance. Raises NotFound, InvalidRequest."""

    def delete_schedule(self, instance_id: str) -> None:
        """Forget the schedule; its snapshots stay for good. Raises NotFound."""

    async def run_schedule(self, instance_id: str) -> Schedule:
        """Take the schedule's snapshot now, then apply its retention.

        Raises NotFound and what ``snapshot`` raises; a failure is recorded with the schedule too.
        """

    async def explain_retention(self, instance_id: str) -> RetentionPlan:
        """What the schedule's retention would do now, and why. Raises NotFound."""

    async def resources(self) -> HostResources:
        """What the host has, and who has it."""

    def instance_use(self, instance_id: str) -> InstanceUse:
        """What the VMM of an instance takes. Raises NotFound, NotSupported (macOS)."""

    async def verify_snapshot(self, snapshot_id: str, depth: Depth) -> Verification:
        """Verify what is stored, locate damage, mark the snapshot by it. Raises NotFound."""

    async def compatibility(self, snapshot_id: str) -> Compatibility:
        """Whether a snapshot can be forked on this host, and why not. Raises NotFound."""

    async def export_snapshot(
        self, snapshot_id: str, *, image: bool = False, offset: int = 0, tag: str | None = None
    ) -> ExportedArchive:
        """The archive of a snapshot from byte ``offset`` on, with its ``image`` if wanted.

        Its first bytes are checked on return. With ``tag`` it must be that same archive, and an
        ``offset`` needs one. Raises NotFound, DamagedData, Conflict (tag), InvalidRequest (offset).
        """

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
        """A new snapshot from the bytes of an archive; durable on return.

        ``allow_foreign`` keeps memory that cannot run here; ``add_image`` allows the image that
        comes along to be added if it is not here. Raises InvalidRequest (damaged, unknown, too
        large), Forbidden (image), Conflict (name, image, foreign, quota), StorageFull, and what
        ``chunks`` raises; then nothing of it is left.

        With ``upload``, an id the caller chose, what has come stays for a while when ``chunks``
        fails, and another call goes on at ``offset``; Conflict when that is not the next byte.
        """

    def upload_status(self, upload: str) -> UploadStatus:
        """How far such an import has come. Raises NotFound."""
