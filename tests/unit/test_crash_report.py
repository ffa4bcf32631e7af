"""The crash harness tells what it found: in a document, and by its exit code."""

from __future__ import annotations

from pathlib import Path

from tools.crash import Judge, Run
from tools.crash_report import MANY, POINTS, RANDOM, write_section


def test_each_kind_of_run_has_its_section_and_a_new_one_takes_its_place(tmp_path: Path) -> None:
    report = tmp_path / "crash.md"
    write_section(RANDOM, ["200 kills", "", "0 lost"], data=tmp_path, path=report)
    write_section(POINTS, ["first run"], data=tmp_path, path=report)
    write_section(MANY, ["10 000"], data=tmp_path, path=report)
    write_section(POINTS, ["| verb | failures |", "| --- | --- |"], data=tmp_path, path=report)
    text = report.read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [f"## {title}" for title in (POINTS, RANDOM, MANY)]
    assert "first run" not in text
    assert "200 kills\n\n0 lost" in text
    assert text.count("commit ") == 3
    assert text.startswith("# Crash harness: results")


def test_starts_are_judged_by_their_median_and_strictly_by_the_slowest() -> None:
    late = [0.5, 0.6, 60.0]
    lenient, strict, slow = Run(), Run(), Run()
    Judge().starts(lenient, "starts", late)
    Judge(strict=True).starts(strict, "starts", late)
    Judge().starts(slow, "starts", [6.0, 7.0, 1.0])
    assert lenient.failures == []
    assert strict.failures == slow.failures == ["starts take too long"]
    assert "slowest 60.00 s" in lenient.lines[0]
