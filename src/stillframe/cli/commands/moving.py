"""``stillframe snapshot verify``, ``export`` and ``import``, and whether one runs here."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer

from stillframe.cli import output
from stillframe.cli.client import Client
from stillframe.cli.output import JsonFlag
from stillframe.model.errors import Conflict, HostFailure, InvalidRequest, NotFound, StillframeError
from stillframe.model.units import format_size, new_id

Snapshot = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Id, name or unique prefix.")]
_CHUNK = 1024 * 1024
_MOST_PLACES = 10  # of damage, printed for one snapshot
Depth = Literal["manifest", "sample", "full"]


def verify(
    context: typer.Context,
    snapshots: Annotated[list[str] | None, typer.Argument(metavar="SNAPSHOT")] = None,
    every: Annotated[bool, typer.Option("--all", help="All snapshots.")] = False,
    depth: Annotated[
        Depth, typer.Option("--depth", help="sample reads a part, manifest no contents.")
    ] = "full",
    as_json: JsonFlag = False,
) -> None:
    """Compare what is stored with its digests; exit 1 when damage is found."""
    if bool(snapshots) == every:
        raise typer.BadParameter("name snapshots, or give --all")
    client: Client = context.obj
    if every:
        chosen = client.request("GET", "/snapshots")
    else:
        chosen = [client.find_snapshot(reference) for reference in snapshots or ()]
    results = []
    for snapshot in chosen:
        path = f"/snapshots/{snapshot['id']}/verify"
        with output.working(f"verifying {snapshot.get('name') or snapshot['id']}"):
            try:
                found = client.request("POST", path, body={"depth": depth})
            except NotFound:
                if not every:
                    raise
                continue  # deleted since we asked for the list
        results.append({"name": snapshot.get("name"), **found})
    output.print_json(results) if as_json else _table(results)
    damaged = [result for result in results if not result["intact"]]
    for result in damaged:
        _say_damage(result)
    if damaged:
        raise typer.Exit(1)


def _table(results: list[dict[str, Any]]) -> None:
    output.print_table(
        ("NAME", "ID", "RESULT", "CHECKED", "SECONDS", "RATE", "DAMAGED"),
        [
            (
                r["name"], r["snapshot_id"], "intact" if r["intact"] else "damaged",
                format_size(r["checked_bytes"]), f"{r['seconds']:.2f}",
                f"{format_size(int(r['bytes_per_second']))}/s",
                format_size(r["damaged_bytes"]) if not r["intact"] else None,
            )
            for r in results
        ],
    )  # fmt: skip


def _say_damage(result: dict[str, Any]) -> None:
    name, places = result["name"] or result["snapshot_id"], result["damage"]
    for place in places[:_MOST_PLACES]:
        output.say(
            f"damaged: {name}: {place['file']}, {place['length']} bytes at {place['offset']}: "
            f"{place['reason']}"
        )
    if len(places) > _MOST_PLACES:
        output.say(f"damaged: {name}: {len(places) - _MOST_PLACES} more places")


def compatibility(context: typer.Context, snapshot: Snapshot, as_json: JsonFlag = False) -> None:
    """Say whether a snapshot can be forked on the server's host; exit 1 if not."""
    client: Client = context.obj
    found = client.find_snapshot(snapshot)
    answer = client.request("GET", f"/snapshots/{found['id']}/compatibility")
    if as_json:
        output.print_json(answer)
    else:
        print("can be forked here" if answer["fork"] else "cannot be forked here")
        for reason in answer["reasons"]:
            print(f"  {reason}")
    if not answer["fork"]:
        raise typer.Exit(1)


def export(
    context: typer.Context,
    snapshot: Snapshot,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to; - is stdout.")],
    image: Annotated[bool, typer.Option("--image", help="With the root disk.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace FILE.")] = False,
) -> None:
    """Write a snapshot into one file, for another server or for keeping."""
    client: Client = context.obj
    found = client.find_snapshot(snapshot)
    path = f"/snapshots/{found['id']}/export"
    query = {"image": "true"} if image else {}
    with _destination(file, force) as sink, output.progress(f"exporting {snapshot}") as advance:
        received = 0
        for data in _download(client, path, query):
            sink.write(data)
            received += len(data)
            advance(len(data))
    output.say(f"exported {format_size(received)} to {'stdout' if file == '-' else file}")


def _download(client: Client, path: str, query: dict[str, str]) -> Iterator[bytes]:
    """The bytes of an archive; a connection that breaks is made again where it broke."""
    received, tag = 0, ""
    while True:
        before = received
        headers = {"If-Match": tag} if received else {}
        try:
            with client.download(path, {**query, "offset": str(received)}, headers) as answer:
                tag = answer.headers.get("etag", "")
                for data in answer.iter_bytes():
                    received += len(data)
                    yield data
            return
        except HostFailure:
            # Without progress there is no use in trying again; with it, the server tells why.
            if received == before:
                raise


@contextlib.contextmanager
def _destination(file: str, force: bool) -> Iterator[IO[bytes]]:
    """The open file or stdout; the file gets its name when all has been written."""
    if file == "-":
        if sys.stdout.isatty():
            raise InvalidRequest("an archive is nothing for a terminal", hint="name a file")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    final = Path(file)
    if final.exists() and not force:
        raise Conflict(f"{file} exists", hint="--force replaces it")
    part = final.with_name(f"{final.name}.part")
    try:
        with part.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        part.replace(final)
    except OSError as error:
        raise HostFailure(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def import_(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="An archive; - is stdin.")],
    name: Annotated[str | None, typer.Option("--name", "-n", help="Instead of its own.")] = None,
    allow_foreign: Annotated[
        bool, typer.Option("--allow-foreign", help="Also memory that cannot run there.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a snapshot from an exported file; it is verified on its way."""
    client: Client = context.obj
    query = {"name": name} if name else {}
    if allow_foreign:
        query["allow_foreign"] = "true"
    with _source(file) as (source, size), output.progress(f"importing {file}", size) as advance:
        made = _upload(client, query, source, advance)
    output.print_json(made) if as_json else output.print_table(
        ("NAME", "ID", "KIND", "SOURCE", "SIZE"),
        [
            (made.get("name"), made["id"], made["kind"], made["source_instance_name"],
             format_size(made["size_bytes"])),
        ],
    )  # fmt: skip


def _upload(
    client: Client, query: dict[str, str], source: IO[bytes], advance: Callable[[int], None]
) -> Any:
    """Send an archive; a connection that breaks is made again where it broke. The answer."""

    def chunks() -> Iterator[bytes]:
        while data := source.read(_CHUNK):
            advance(len(data))
            yield data

    offset, upload = 0, new_id()
    while True:
        here = {**query, "upload": upload, "offset": str(offset)}
        try:
            return client.request("POST", "/snapshots/import", query=here, content=chunks())
        except HostFailure:
            status = _status(client, upload)
            if status is None or not source.seekable():
                raise
            if "snapshot_id" in status:
                return client.request("GET", f"/snapshots/{status['snapshot_id']}")
            if status["offset"] <= offset:  # no progress: there is no use in trying again
                raise
            advance(status["offset"] - source.tell())
            offset = source.seek(status["offset"])


def _status(client: Client, upload: str) -> dict[str, Any] | None:
    """How far an upload has come; None when the server knows of none or cannot be reached."""
    try:
        status: dict[str, Any] = client.request("GET", f"/snapshots/import/{upload}")
    except StillframeError:
        return None
    return status


@contextlib.contextmanager
def _source(file: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """The open file and its size, or stdin."""
    if file == "-":
        yield sys.stdin.buffer, None
        return
    try:
        with Path(file).open("rb") as source:
            yield source, os.fstat(source.fileno()).st_size
    except FileNotFoundError as error:
        raise NotFound(f"no such file: {file}") from error
    except OSError as error:
        raise HostFailure(f"cannot read {file}: {error.strerror or error}") from error
