"""What commands with ``--dry-run`` print."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stillframe.cli import output
from stillframe.model.units import format_size

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would happen and what is against it.")
]
DRY = {"dry_run": "true"}  # the query
_SIZES = ("memory_bytes", "bytes_captured", "bytes_copied", "bytes_expanded", "bytes_lost")


def print_runs(previews: list[dict[str, Any]], as_json: bool) -> None:
    """What forks or restores would do, as a table or JSON; exit 1 if anything would be refused."""
    if as_json:
        output.print_json(previews)
    else:
        output.print_table(
            ("NAME", "STATE", "HYPERVISOR", "MEMORY", "CAPTURES", "COPIES", "EXPANDS", "LOSES",
             "AGAINST IT"),
            [
                (p["name"], p.get("state"), p["hypervisor"],
                 *(format_size(p[size]) for size in _SIZES),
                 "; ".join([*p["refused"], *p["advice"]]) or "nothing")
                for p in previews
            ],
        )  # fmt: skip
    if any(p["refused"] for p in previews):
        raise typer.Exit(1)


def print_deletions(previews: list[dict[str, Any]], as_json: bool) -> None:
    """What deletions would do, as a table or JSON."""
    if as_json:
        output.print_json(previews)
        return
    output.print_table(
        ("NAME", "ID", "FREES", "SHARED WITH", "REFUSED"),
        [
            (p.get("name"), p.get("snapshot_id") or p["instance_id"],
             format_size(p["bytes_freed"]),
             ", ".join(s.get("name") or s["id"] for s in p["shared_with"]), p.get("refused"))
            for p in previews
        ],
    )  # fmt: skip
