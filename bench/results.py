"""Figures and rows: what was measured, beside its target, and the verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

Samples = dict[str, list[float]]
PhaseTimes = dict[str, dict[str, float]]


def p90(values: Sequence[float]) -> float:
    """The 90th percentile by nearest rank: a value that was measured. Needs one value."""
    ordered = sorted(values)
    return ordered[math.ceil(0.9 * len(ordered)) - 1]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Rise of y by each x, as the median over all pairs (Theil-Sen): outliers do not move it."""
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2))


def median_phases(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each phase over the runs that had it, in the order of their first sight."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: round(statistics.median(run[name] for run in runs if name in run), 2)
        for name in names
    }


def figure(values: Sequence[float], unit: str = "ms") -> str:
    """Median and 90th percentile as text."""
    return f"{number(statistics.median(values))} {unit} (p90 {number(p90(values))})"


def number(value: float) -> str:
    """Three digits, and no more decimals than they need."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


@dataclass(slots=True)
class Row:
    """One line of the table.

    ``value`` is in ``unit`` (empty for a ratio) and must not exceed ``limit``; without a limit the
    row only shows. ``conditions`` are further limits: text, value, limit. ``not_run`` and
    ``failed`` say why there is no value. ``phases`` are medians in ms, by what was run.
    """

    key: str
    measure: str
    target: str
    limit: float | None = None
    value: float | None = None
    unit: str = ""
    conditions: list[tuple[str, float, float]] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    samples: Samples = field(default_factory=dict)
    phases: PhaseTimes = field(default_factory=dict)
    not_run: str | None = None
    failed: str | None = None

    @property
    def reached(self) -> bool | None:
        """Whether every limit holds; None when there is no value or no limit."""
        if self.value is None or (self.limit is None and not self.conditions):
            return None
        within = self.limit is None or self.value <= self.limit
        return within and all(value <= limit for _, value, limit in self.conditions)

    @property
    def verdict(self) -> str:
        """The last column of the table."""
        if self.failed is not None:
            return f"FAILED: {self.failed}"
        if self.not_run is not None:
            return f"not run: {self.not_run}"
        if self.value is None:
            return "not run: there is no figure"
        match self.reached:
            case True:
                return "reached"
            case False:
                return "NOT REACHED"
            case None:
                return "shown"

    @property
    def shown_value(self) -> str:
        """The value with its unit, or a dash."""
        if self.value is None:
            return "-"
        return f"{number(self.value)} {self.unit}".strip()

    def as_json(self) -> dict[str, Any]:
        """Everything, for results.json."""
        return {
            "key": self.key,
            "measure": self.measure,
            "target": self.target,
            "limit": self.limit,
            "value": self.value,
            "unit": self.unit,
            "verdict": self.verdict,
            "conditions": [
                {"what": what, "value": value, "limit": limit}
                for what, value, limit in self.conditions
            ],
            "details": self.details,
            "phases_ms": self.phases,
            "samples": self.samples,
        }


def ratio_row(
    row: Row, ours: Sequence[float], theirs: Sequence[float], names: tuple[str, str]
) -> None:
    """Fill a row with the ratio of two medians; both sides become details and samples."""
    row.value = statistics.median(ours) / statistics.median(theirs)
    row.details += [
        f"{name} {figure(side)}" for name, side in zip(names, (ours, theirs), strict=True)
    ]
    row.samples |= {names[0]: list(ours), names[1]: list(theirs)}
