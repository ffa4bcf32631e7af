"""``docs/crash.md``: what the crash harness found, one section for each kind of run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.report import circumstances

REPORT = Path(__file__).resolve().parents[1] / "docs" / "crash.md"
POINTS, RANDOM, MANY = "Every call of every verb", "Kills at random", "Many snapshots"
_ORDER = (POINTS, RANDOM, MANY)
_HEAD = """# Crash harness: results

Written by `make crash` (`tools/crash.py`), which replaces the section of what it has run. What is
tried, and what must hold afterwards: ARCHITECTURE.md, "Order of commits".
"""


def write_section(title: str, lines: Sequence[str], *, data: Path, path: Path = REPORT) -> None:
    """Put a section into the report, in place of the one of that ``title``.

    ``data`` is where the servers had their data directories. Raises OSError.
    """
    sections = _sections(path)
    sections[title] = "\n".join([_circumstances(data), "", *lines])
    parts = [f"## {name}\n\n{sections[name]}\n" for name in _ORDER if name in sections]
    path.write_text("\n".join([_HEAD, *parts]), encoding="utf-8")


def _sections(path: Path) -> dict[str, str]:
    """The sections that the report has by now."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        found[title] = body.strip()
    return found


def _circumstances(data: Path) -> str:
    here = circumstances(data)
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {here['commit']}. {os.cpu_count()} cores "
        f"({here['processor']}), Linux {here['kernel']}, Python {here['python']}, data on "
        f"{here['file_system']}, load {os.getloadavg()[0]:.1f}."
    )
