"""docs/faults.md names the faults that tests show, no more and no fewer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_RANGE = re.compile(r"\b([FS])(\d\d)(?:(?: to |-|–)[FS]?(\d\d))?\b")
_NAME = re.compile(r"def test_((?:[fs]\d\d_)+)")


def ids(text: str) -> Iterator[str]:
    for letter, first, last in _RANGE.findall(text):
        yield from (f"{letter}{number:02}" for number in range(int(first), int(last or first) + 1))


def test_every_listed_fault_has_a_test_and_every_tested_one_is_listed() -> None:
    listed = set(ids((ROOT / "docs/faults.md").read_text()))
    tested: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        for names in _NAME.findall(text):
            tested |= {name.upper() for name in names.strip("_").split("_")}
        for docstring in re.findall(r'    """(.*?)"""', text, re.DOTALL):  # of tests, not of files
            tested |= set(ids(docstring))
        tested |= set(re.findall(r"""["']([FS]\d\d)\b""", text))  # rows of tables
    assert listed - tested == set()
    assert tested - listed == set()
