"""A family of snapshots and instances, drawn as a tree.

An instance stands below the snapshot or instance it was forked from, a snapshot below the instance
it was taken of. (What a snapshot descends from in time is in its ``parent_snapshot_id``; drawn as a
tree, a year of nightly snapshots would be as deep as a year.)
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stillframe.model.units import format_size

if TYPE_CHECKING:
    from rich.text import Text

Relative = dict[str, Any]
_SHARERS_TOLD = 3  # of those who share a memory image: with forks by the hundred it is enough
_PLAIN_WIDTH = 200  # for programs and pagers, which fold lines themselves


def show(relatives: Sequence[Relative], mark: str | None = None) -> None:
    """Print the relatives as a tree; the one with id ``mark`` is pointed out."""
    from rich.console import Console
    from rich.tree import Tree

    known = {relative["id"]: relative for relative in relatives}
    children: dict[str | None, list[str]] = {}
    for identifier, relative in known.items():
        children.setdefault(_above(relative, known), []).append(identifier)
    names = {key: relative.get("name") or key for key, relative in known.items()}
    forest = Tree("", hide_root=True)
    drawn: set[str] = set()

    def draw(tops: Sequence[str]) -> None:
        waiting = deque((forest, top) for top in tops)
        while waiting:  # a loop, not recursion: a family may be deep
            branch, identifier = waiting.popleft()
            if identifier not in drawn:
                drawn.add(identifier)
                node = branch.add(_label(known[identifier], names, mark))
                waiting.extend((node, child) for child in children.get(identifier, []))

    draw(children.get(None, []))
    draw([identifier for identifier in known if identifier not in drawn])  # were there a circle
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    Console(width=width, highlight=False).print(forest)


def _above(relative: Relative, known: dict[str, Relative]) -> str | None:
    """The id of whom a relative stands below, if it is among the known."""
    if relative["kind"] == "snapshot":
        source = relative.get("source_instance_id")
        return source if source in known else None
    for key in ("parent_instance_id", "parent_snapshot_id"):
        above = known.get(relative.get(key) or "")
        # An instance restored to its own snapshot is still that snapshot's source.
        if above is not None and above.get("source_instance_id") != relative["id"]:
            return str(above["id"])
    return None


def _label(relative: Relative, names: dict[str, str], mark: str | None) -> Text:
    from rich.text import Text

    name = relative.get("name") or relative["id"]
    if relative["deleted"]:
        return Text(f"{name}  deleted {relative['kind']}", style="dim")
    snapshot = relative["kind"] == "snapshot"
    label = Text(name, style="bold" if snapshot else "")
    parts = [f"{relative['state']} {relative['kind']}"]
    parts.append(f"frees {format_size(relative['exclusive_bytes'] or 0)}")
    if relative["shares_memory_with"]:
        others = sorted(names.get(other, other) for other in relative["shares_memory_with"])
        told, more = others[:_SHARERS_TOLD], len(others) - _SHARERS_TOLD
        also = f" and {more} more" if more > 0 else ""
        parts.append(f"memory shared with {', '.join(told)}{also}")
    if relative["pinned"]:
        parts.append("pinned")
    label.append("  " + ", ".join(parts), style="dim")
    if relative["id"] == mark:
        label.append("  ←", style="bold")
    return label
