"""Rows about keeping snapshots: verification, and compression beside the programs of its formats.

Both on the memory of a real guest. Ours and the program's runs alternate, and both end with the
output on the device.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.compression import SETTINGS, compare, timed
from bench.lab import USED, Lab
from bench.results import Row, figure, number
from stillframe.host.files import allocated_bytes
from stillframe.model.values import CompressionAlgorithm
from stillframe.store.paths import Payload
from stillframe.store.verification import Depth, verify

KEYS = ("verify", "compress")
_ALLOWED = 1.10  # ours may take so much longer than the program
_GIGABYTE = 1e9


@dataclass(frozen=True, slots=True)
class _Compared:
    """One algorithm and level: seconds of ours and the program's, and output bytes of both."""

    name: str
    ours: Sequence[float]
    theirs: Sequence[float]
    larger: float  # ours / theirs, by size

    @property
    def slower(self) -> float:
        """Ours / theirs, by the medians."""
        return statistics.median(self.ours) / statistics.median(self.theirs)


def measure(lab: Lab, wanted: set[str]) -> list[Row]:
    """The wanted rows of ``KEYS``."""
    makers = {"verify": _verify_row, "compress": _compress_row}
    return [makers[key](lab) for key in KEYS if key in wanted]


def _payload(lab: Lab) -> Payload:
    return lab.data.snapshot(lab.snapshot_of(USED)["id"])


def _verify_row(lab: Lab) -> Row:
    row = Row(
        "verify", "time to verify 1 GB of a snapshot, memory and disk, on one core",
        "<= 1 s", limit=1.0, unit="s",
    )  # fmt: skip
    payload = _payload(lab)
    size = sum(allocated_bytes(path) for path in payload.directory.iterdir())

    def check(threads: int | None) -> None:
        *_, last = verify(payload, Depth.FULL, threads=threads)
        if last.damage:
            raise RuntimeError(f"the snapshot is damaged: {last.damage}")

    check(None)  # it may not be in the page cache
    one, all_of_them = list[float](), list[float]()
    for _ in range(_runs(lab)):
        one.append(timed(lambda: check(1)) / size * _GIGABYTE)
        all_of_them.append(timed(lambda: check(None)) / size * _GIGABYTE)
    row.value = statistics.median(one)
    row.details = [
        f"{size / 1e6:.0f} MB on disk; one thread {figure(one, 's')} a GB, "
        f"{number(1 / row.value)} GB/s",
        f"as the server does it, on {os.cpu_count()} processors: "
        f"{number(1 / statistics.median(all_of_them))} GB/s",
    ]
    row.samples = {"one thread, s/GB": one, "all threads, s/GB": all_of_them}
    return row


def _compress_row(lab: Lab) -> Row:
    row = Row(
        "compress", "compression of a guest's memory / zstd -T0 or lz4, the slowest of all",
        "<= 1.1, and as small", limit=_ALLOWED,
    )  # fmt: skip
    place = lab.directory / "keeping"
    place.mkdir()
    try:
        image = place / "memory"
        os.link(_payload(lab).memory, image)
        found = [_compared(lab, image, *setting) for setting in SETTINGS]
    finally:
        shutil.rmtree(place)
    row.value = max(one.slower for one in found)
    row.conditions = [(f"size, {one.name}", one.larger, _ALLOWED) for one in found]
    for one in found:
        row.details.append(
            f"{one.name}: ours {figure(one.ours, 's')}, the program {figure(one.theirs, 's')}, "
            f"{number(one.slower)}; our output / its {number(one.larger)}"
        )
        row.samples |= {f"{one.name}: ours, s": list(one.ours)}
        row.samples |= {f"{one.name}: program, s": list(one.theirs)}
    return row


def _compared(
    lab: Lab, image: Path, algorithm: CompressionAlgorithm, level: int, program: list[str]
) -> _Compared:
    result = compare(image, algorithm, level, program, _runs(lab))
    lab.say(f"{algorithm.value} {level}")
    seconds = result["seconds"]
    assert isinstance(seconds, dict)
    return _Compared(
        f"{algorithm.value} {level}", seconds["pack"], seconds["pack_by"],
        float(str(result["ratio_by"])) / float(str(result["ratio"])),
    )  # fmt: skip


def _runs(lab: Lab) -> int:
    return 3 if lab.quick else max(5, lab.runs // 2)
