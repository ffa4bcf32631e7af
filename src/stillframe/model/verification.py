"""What a verification reads, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Depth(StrEnum):
    """How much is read."""

    MANIFEST = "manifest"  # sizes, small files, digest tables
    SAMPLE = "sample"  # and a random share of the data
    FULL = "full"  # and all of it


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged place: ``offset`` and ``length`` in bytes of the content of ``file``.

    For a compressed memory image they are bytes of the image; ``reason`` names the stored file.
    """

    file: str
    offset: int
    length: int
    reason: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found so far: bytes checked and to be checked, seconds, and the damage.

    ``damaged_bytes`` counts all damage, ``damage`` names the first places. ``unchecked`` are files
    for which the manifest has no digest (format 1).
    """

    depth: Depth
    checked_bytes: int
    total_bytes: int
    seconds: float
    damage: tuple[Damage, ...]
    damaged_bytes: int
    unchecked: tuple[str, ...]

    @property
    def bytes_per_second(self) -> float:
        """How fast it went."""
        return self.checked_bytes / self.seconds if self.seconds else 0.0
