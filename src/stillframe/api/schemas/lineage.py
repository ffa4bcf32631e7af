"""The family tree and the preview of a deletion on the wire. Stillframe's own."""

from __future__ import annotations

from datetime import datetime

from stillframe.api.schemas.base import Answer, utc
from stillframe.engine.keeping.interface import DeletionPreview, RunPreview
from stillframe.model.lineage import Lineage, Relative, RelativeKind
from stillframe.model.states import InstanceState
from stillframe.model.values import Hypervisor, Snapshot


class RelativeAnswer(Answer):
    """A snapshot or instance in a family tree; ``state`` is the kind of a snapshot.

    ``exclusive_bytes`` is what deleting it would free. ``shares_memory_with`` are the ids of those
    that map or hold the same memory image. Of a deleted one little more than its id is known.
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
    shares_memory_with: list[str]

    @classmethod
    def of(cls, relative: Relative) -> RelativeAnswer:
        """The wire form of a relative."""
        return cls(
            kind=relative.kind,
            id=relative.id,
            name=relative.name,
            state=relative.state,
            created_at=utc(relative.created_at),
            parent_snapshot_id=relative.parent_snapshot_id,
            parent_instance_id=relative.parent_instance_id,
            source_instance_id=relative.source_instance_id,
            pinned=relative.pinned,
            deleted=relative.deleted,
            exclusive_bytes=relative.exclusive_bytes,
            shares_memory_with=list(relative.shares_memory_with),
        )


class LineageAnswer(Answer):
    """A snapshot, its ancestors (nearest first) and its descendants (oldest first)."""

    snapshot: RelativeAnswer
    ancestors: list[RelativeAnswer]
    descendants: list[RelativeAnswer]

    @classmethod
    def of(cls, lineage: Lineage) -> LineageAnswer:
        """The wire form of a lineage."""
        return cls(
            snapshot=RelativeAnswer.of(lineage.snapshot),
            ancestors=[RelativeAnswer.of(relative) for relative in lineage.ancestors],
            descendants=[RelativeAnswer.of(relative) for relative in lineage.descendants],
        )


class DeletionPreviewAnswer(Answer):
    """What deleting a snapshot or an instance would do. ``refused`` says why it would not be.

    ``shared_with`` go on unharmed with the memory image they share; ``in_use`` counts forks and
    restores under way that the deletion would wait for.
    """

    snapshot_id: str | None = None
    instance_id: str | None = None
    name: str | None = None
    pinned: bool
    bytes_freed: int
    shared_with: list[RelativeAnswer]
    in_use: int
    refused: str | None = None

    @classmethod
    def of(cls, preview: DeletionPreview) -> DeletionPreviewAnswer:
        """The wire form of a preview."""
        subject = preview.subject
        taken = isinstance(subject, Snapshot)
        return cls(
            snapshot_id=subject.id if taken else None,
            instance_id=None if taken else subject.id,
            name=subject.name,
            pinned=isinstance(subject, Snapshot) and subject.pinned,
            bytes_freed=preview.bytes_freed,
            shared_with=[RelativeAnswer.of(relative) for relative in preview.shared_with],
            in_use=preview.in_use,
            refused=preview.refused,
        )


class RunPreviewAnswer(Answer):
    """What forking or restoring would do. ``refused`` are all the reasons against it.

    What is forked is a snapshot, or an instance as it is. ``bytes_copied`` is disk, where the file
    system cannot share blocks; ``bytes_expanded`` memory that is compressed; ``bytes_lost`` what a
    restore in place gives up for ever; ``bytes_captured`` what is written of a running instance.
    """

    snapshot_id: str | None = None
    instance_id: str | None = None
    name: str
    state: InstanceState | None = None
    hypervisor: Hypervisor
    memory_bytes: int
    bytes_copied: int
    bytes_expanded: int
    bytes_lost: int
    bytes_captured: int
    refused: list[str]
    advice: list[str]

    @classmethod
    def of(cls, preview: RunPreview) -> RunPreviewAnswer:
        """The wire form of a preview."""
        taken = isinstance(preview.source, Snapshot)
        return cls(
            snapshot_id=preview.source.id if taken else None,
            instance_id=None if taken else preview.source.id,
            name=preview.name,
            state=preview.state,
            hypervisor=preview.hypervisor,
            memory_bytes=preview.memory_bytes,
            bytes_copied=preview.bytes_copied,
            bytes_expanded=preview.bytes_expanded,
            bytes_lost=preview.bytes_lost,
            bytes_captured=preview.bytes_captured,
            refused=list(preview.refused),
            advice=list(preview.advice),
        )
