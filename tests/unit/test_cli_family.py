"""The family tree, as it is printed."""

from __future__ import annotations

from typing import Any

import pytest

from stillframe.cli.commands import family

_LINES = "├│└─ \xa0"


def relative(kind: str, name: str, **facts: Any) -> dict[str, Any]:
    common = {
        "id": name, "name": name, "kind": kind, "deleted": False, "state": "Running",
        "exclusive_bytes": 0, "shares_memory_with": [], "pinned": False,
    }  # fmt: skip
    return common | facts


def drawn(capsys: pytest.CaptureFixture[str], *relatives: dict[str, Any]) -> list[str]:
    family.show(relatives)
    return capsys.readouterr().out.splitlines()


def test_a_fork_of_an_instance_stands_below_it_not_below_what_that_was_restored_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = drawn(
        capsys,
        relative("instance", "web", parent_snapshot_id="ready"),
        relative("snapshot", "ready", source_instance_id="web"),
        relative("instance", "copy", parent_instance_id="web", parent_snapshot_id="ready"),
        relative("instance", "fork", parent_snapshot_id="ready"),
    )
    depths = {
        line.lstrip(_LINES).split()[0]: (len(line) - len(line.lstrip(_LINES))) // 4
        for line in lines
    }
    assert depths == {"web": 0, "copy": 1, "ready": 1, "fork": 2}


def test_of_many_who_share_memory_a_few_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    forks = [f"f{number}" for number in range(1, 8)]
    (line,) = drawn(capsys, relative("snapshot", "base", shares_memory_with=forks))
    assert line.endswith("memory shared with f1, f2, f3 and 4 more")
