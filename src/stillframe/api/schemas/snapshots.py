"""Snapshots and compression on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Annotated, Literal

from fastapi.responses import Response
from pydantic import AwareDatetime, Field, TypeAdapter

from stillframe.api.schemas.base import Answer, Body, Flag, Int, Name, Tags, Text, utc
from stillframe.engine.keeping.interface import SnapshotChanges
from stillframe.model.errors import InvalidRequest
from stillframe.model.states import InstanceState
from stillframe.model.units import parse_duration
from stillframe.model.values import (
    COMPRESSION_LEVELS,
    CompressionAlgorithm,
    CompressionConfig,
    CompressionState,
    Hypervisor,
    Snapshot,
    SnapshotKind,
)

TargetState = Literal["Stopped", "Standby", "Running"]


class CompressionBody(Body):
    """A wish for compression; algorithm and level count only when enabled."""

    enabled: Flag
    algorithm: Annotated[Text | None, Field(json_schema_extra={"enum": ["zstd", "lz4", None]})] = (
        None
    )
    level: Annotated[Int | None, Field(json_schema_extra={"minimum": 0, "maximum": 19})] = None

    def parse(self, code: str = "invalid_snapshot_compression") -> CompressionConfig:
        """The config with the contract's defaults filled in. Raises InvalidRequest with ``code``.

        zstd takes levels 1-19 (default 1), lz4 0-9 (default 0); names in any letter case.
        """
        if not self.enabled:
            return CompressionConfig(enabled=False)
        try:
            algorithm = CompressionAlgorithm((self.algorithm or "zstd").lower())
        except ValueError as error:
            raise InvalidRequest(
                "unknown compression algorithm", code=code, hint="use zstd or lz4"
            ) from error
        lowest, highest, default = COMPRESSION_LEVELS[algorithm]
        level = default if self.level is None else self.level
        if not lowest <= level <= highest:
            raise InvalidRequest(
                f"{algorithm} has no level {level}"[:200],
                code=code,
                hint=f"use {lowest} to {highest}",
            )
        return CompressionConfig(enabled=True, algorithm=algorithm, level=level)


class CompressionAnswer(Answer):
    """A compression config as stored."""

    enabled: bool
    algorithm: CompressionAlgorithm | None = None
    level: int | None = None

    @classmethod
    def of(cls, config: CompressionConfig | None) -> CompressionAnswer | None:
        """The wire form; None stays None."""
        if config is None:
            return None
        return cls(enabled=config.enabled, algorithm=config.algorithm, level=config.level)


class StandbyBody(Body):
    """One-shot overrides of an instance's snapshot policy for one standby."""

    compression: CompressionBody | None = None
    compression_delay: Text | None = None

    def delay(self) -> timedelta | None:
        """The delay as a duration. Raises InvalidRequest (``invalid_compression_delay``)."""
        return parse_delay(self.compression_delay, code="invalid_compression_delay")


def parse_delay(text: str | None, *, code: str) -> timedelta | None:
    """A duration of at least zero, or None. Raises InvalidRequest with ``code``."""
    if text is None:
        return None
    delay = parse_duration(text, code=code)
    if delay < timedelta(0):
        raise InvalidRequest(f"negative delay {text[:64]!r}", code=code)
    return delay


class SnapshotCreateBody(Body):
    """A wish for a snapshot."""

    kind: SnapshotKind
    name: Name | None = None
    compression: CompressionBody | None = None
    tags: Tags | None = None


class SnapshotEditBody(Body):
    """What to change of a snapshot; null clears, an absent field stays. Stillframe's own."""

    name: Name | None = None
    tags: Tags | None = None
    description: Annotated[Text | None, Field(json_schema_extra={"maxLength": 4096})] = None
    expires_at: AwareDatetime | None = None
    pinned: Flag | None = None

    def parse(self) -> SnapshotChanges:
        """The fields that the request names."""
        changes: SnapshotChanges = {}
        named = self.model_fields_set
        if "name" in named:
            changes["name"] = self.name
        if "tags" in named:
            changes["tags"] = self.tags
        if "description" in named:
            changes["description"] = self.description
        if "expires_at" in named:
            changes["expires_at"] = self.expires_at
        if "pinned" in named:
            changes["pinned"] = self.pinned
        return changes


class SnapshotRestoreBody(Body):
    """Options of restoring a snapshot in place."""

    target_state: TargetState | None = None
    target_hypervisor: Hypervisor | None = None

    def state(self) -> InstanceState | None:
        """The target state, if one is asked for."""
        return InstanceState(self.target_state) if self.target_state else None


class SnapshotAnswer(Answer):
    """A snapshot. Fields after ``uncompressed_size_bytes`` are Stillframe's own.

    Sizes are bytes; ``stored_bytes`` is what the payload takes on disk, ``pause_ms`` how long the
    guest stood still, ``timings_ms`` where the time went, ``damaged`` what a verification found.
    """

    id: str
    kind: SnapshotKind
    source_instance_id: str
    source_instance_name: str
    source_hypervisor: Hypervisor
    created_at: datetime
    size_bytes: int
    name: str | None = None
    tags: dict[str, str] | None = None
    compression: CompressionAnswer | None = None
    compression_state: CompressionState | None = None
    compression_error: str | None = None
    compressed_size_bytes: int | None = None
    uncompressed_size_bytes: int | None = None
    stored_bytes: int | None = None
    pause_ms: float | None = None
    timings_ms: dict[str, float] | None = None
    parent_snapshot_id: str | None = None
    description: str | None = None
    expires_at: datetime | None = None
    pinned: bool = False
    damaged: str | None = None

    @classmethod
    def of(cls, snapshot: Snapshot) -> SnapshotAnswer:
        """The wire form of a snapshot."""
        return cls(
            id=snapshot.id,
            kind=snapshot.kind,
            source_instance_id=snapshot.source_instance_id,
            source_instance_name=snapshot.source_instance_name,
            source_hypervisor=snapshot.source_hypervisor,
            created_at=utc(snapshot.created_at) or snapshot.created_at,
            size_bytes=snapshot.size_bytes,
            name=snapshot.name,
            tags=dict(snapshot.tags),
            compression=CompressionAnswer.of(snapshot.compression),
            compression_state=snapshot.compression_state,
            compression_error=snapshot.compression_error,
            compressed_size_bytes=snapshot.compressed_size_bytes,
            uncompressed_size_bytes=snapshot.uncompressed_size_bytes,
            stored_bytes=snapshot.stored_bytes,
            pause_ms=snapshot.pause_ms,
            timings_ms=dict(snapshot.timings_ms),
            parent_snapshot_id=snapshot.parent_snapshot_id,
            description=snapshot.description,
            expires_at=utc(snapshot.expires_at),
            pinned=snapshot.pinned,
            damaged=snapshot.damaged,
        )


_RECORD = TypeAdapter(Snapshot)
_KEPT_BACK = {field.name for field in fields(Snapshot)} - set(SnapshotAnswer.model_fields)
_MOST_WRITTEN = 50_000
# The JSON of each snapshot as it was listed last: good as long as its record is that very object.
_written: dict[str, tuple[Snapshot, bytes]] = {}


def respond_snapshots(snapshots: Sequence[Snapshot]) -> Response:
    """A bare JSON array of snapshots, each as ``SnapshotAnswer`` has it; there may be thousands.

    Their records are written out as they are, and only those that have changed since: an answer
    made for each of them took a hundred times as long, and kept everybody else waiting.
    """
    if len(_written) > _MOST_WRITTEN:  # most of them are deleted by now
        _written.clear()
    body = b"[%b]" % b",".join([_written_out(snapshot) for snapshot in snapshots])
    return Response(body, media_type="application/json")


def _written_out(snapshot: Snapshot) -> bytes:
    known = _written.get(snapshot.id)
    if known is not None and known[0] is snapshot:
        return known[1]
    text = _RECORD.dump_json(_in_utc(snapshot), exclude=_KEPT_BACK, exclude_none=True)
    _written[snapshot.id] = snapshot, text
    return text


def _in_utc(snapshot: Snapshot) -> Snapshot:
    expiry = snapshot.expires_at
    if not snapshot.created_at.utcoffset() and (expiry is None or not expiry.utcoffset()):
        return snapshot
    return replace(
        snapshot,
        created_at=utc(snapshot.created_at) or snapshot.created_at,
        expires_at=utc(snapshot.expires_at),
    )
