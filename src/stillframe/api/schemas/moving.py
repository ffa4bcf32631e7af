"""Verification, compatibility and archives of snapshots on the wire. All are Stillframe's own."""

from __future__ import annotations

from dataclasses import asdict

from stillframe.api.schemas.base import Answer, Body
from stillframe.engine.keeping.interface import Compatibility, UploadStatus
from stillframe.model.verification import Depth, Verification


class VerifyBody(Body):
    """How much to read: ``manifest`` (sizes, digest tables), ``sample`` (a part), ``full``."""

    depth: Depth = Depth.FULL


class DamageAnswer(Answer):
    """A damaged place: ``length`` bytes at ``offset`` of the content of ``file``."""

    file: str
    offset: int
    length: int
    reason: str


class VerificationAnswer(Answer):
    """What a verification found. Sizes are bytes; ``damage`` names the first 1000 places.

    ``unchecked`` are files that have no digests, as in snapshots of manifest format 1.
    """

    snapshot_id: str
    depth: Depth
    intact: bool
    checked_bytes: int
    total_bytes: int
    seconds: float
    bytes_per_second: float
    damaged_bytes: int
    damage: list[DamageAnswer]
    unchecked: list[str]

    @classmethod
    def of(cls, snapshot_id: str, found: Verification) -> VerificationAnswer:
        """The wire form of a result."""
        return cls(
            snapshot_id=snapshot_id,
            depth=found.depth,
            intact=not found.damage,
            checked_bytes=found.checked_bytes,
            total_bytes=found.total_bytes,
            seconds=round(found.seconds, 6),
            bytes_per_second=round(found.bytes_per_second, 3),
            damaged_bytes=found.damaged_bytes,
            damage=[DamageAnswer(**asdict(place)) for place in found.damage],
            unchecked=list(found.unchecked),
        )


class CompatibilityAnswer(Answer):
    """Whether a snapshot can be forked on this host; the reasons why not, or what it needs."""

    snapshot_id: str
    fork: bool
    reasons: list[str]

    @classmethod
    def of(cls, snapshot_id: str, found: Compatibility) -> CompatibilityAnswer:
        """The wire form of a verdict."""
        return cls(snapshot_id=snapshot_id, fork=found.fork, reasons=list(found.reasons))


class UploadAnswer(Answer):
    """How far an import has come: ``offset`` is the next byte to be sent.

    ``snapshot_id`` is there when all has come: the answer to the last request was lost.
    """

    upload: str
    offset: int
    snapshot_id: str | None = None

    @classmethod
    def of(cls, upload: str, status: UploadStatus) -> UploadAnswer:
        """The wire form of a status."""
        return cls(upload=upload, offset=status.offset, snapshot_id=status.snapshot_id)
