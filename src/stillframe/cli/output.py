"""What people and programs see: tables, columns, JSON on stdout; progress on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from stillframe.model.errors import StillframeError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def json_line(value: Any) -> str:
    """A value as JSON on one line, for streams of them."""
    return json.dumps(value, ensure_ascii=False)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under headings: a rich table on a terminal, aligned plain columns elsewhere."""
    cells = [["-" if cell in (None, "") else str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            # An identifier is there to be copied: a narrow terminal folds other columns.
            table.add_column(column, overflow="fold", no_wrap=column == "ID")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def print_facts(facts: Mapping[str, object]) -> None:
    """Print ``key: value`` lines, aligned, without empty values."""
    shown = {k: v for k, v in facts.items() if v not in (None, "", {}, [])}
    width = max((len(k) for k in shown), default=0) + 1
    for key, value in shown.items():
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
        print(f"{key + ':':<{width}}  {text}")


@contextlib.contextmanager
def answers(columns: Sequence[str], as_json: bool) -> Iterator[list[dict[str, Any]]]:
    """A list for the answers of a command on several things, printed at the end as one.

    Also printed when one of them fails: what was done before it stays done. Columns are the
    answers' keys in capitals; JSON is an array, whatever the number.
    """
    collected: list[dict[str, Any]] = []
    try:
        yield collected
    finally:
        if as_json:
            print_json(collected)
        elif collected:
            rows = [[answer.get(column.lower()) for column in columns] for answer in collected]
            print_table(columns, rows)


def each(things: Sequence[str], doing: str, work: Callable[[str], None]) -> None:
    """Do ``work`` with each of several things, whether or not it fails with others.

    What failed is said on stderr, and the command exits with 1 then. With a single one the error
    itself is raised.
    """
    failed = False
    for thing in things:
        try:
            with working(f"{doing} {thing}"):
                work(thing)
        except StillframeError as error:
            if len(things) == 1:
                raise
            hint = f" (hint: {error.hint})" if error.hint else ""
            say(f"error: {thing}: {error.message}{hint}")
            failed = True
    if failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Show a spinner on stderr while the context lasts, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes on stderr, if stderr is a terminal; yields what moves it on.

    ``total`` bytes are expected (None: nobody knows how many).
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)


def age(timestamp: str | None) -> str:
    """How long ago an RFC3339 time was, in its largest unit (``3m``)."""
    if not timestamp:
        return ""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(timestamp)) / timedelta(seconds=1)
    except (ValueError, TypeError):
        return timestamp
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def say(text: str) -> None:
    """One line of news on stderr, so that stdout stays for results."""
    print(text, file=sys.stderr)
