"""``stillframe snapshot verify``, ``export`` and ``import``, and whether one runs here."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer

from stillframe.cli import output
from stillframe.cli.client import Client, Unreachable
from stillframe.cli.output import JsonFlag
from stillframe.model.errors import Conflict, HostFailure, InvalidRequest, NotFound, StillframeError
from stillframe.model.units import format_size, new_id

Snapshot = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Id, name or unique prefix.")]
_CHUNK = 1024 * 1024
_TAG = re.compile("[0-9a-f]{32}")  # of an archive, as the server makes them
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
    """Compare what is stored with its digests; exit 1 when damage is found.

    One that cannot be verified does not keep the others from it; then it is 1, too.
    """
    if bool(snapshots) == every:
        raise typer.BadParameter("name snapshots, or give --all")
    client: Client = context.obj
    if every:
        chosen = client.request("GET", "/snapshots")
    else:
        chosen = [client.find_snapshot(reference) for reference in snapshots or ()]
    results, failed = [], False
    for snapshot in chosen:
        path = f"/snapshots/{snapshot['id']}/verify"
        with output.working(f"verifying {snapshot.get('name') or snapshot['id']}"):
            try:
                found = client.request("POST", path, body={"depth": depth})
            except NotFound:
                if not every:
                    raise
                continue  # deleted since we asked for the list
            except HostFailure as error:  # it is neither intact nor damaged
                if len(chosen) == 1 or isinstance(error, Unreachable):
                    raise
                name = snapshot.get("name") or snapshot["id"]
                output.say(f"error: {name} was not verified: {error.message}")
                failed = True
                continue
        results.append({"name": snapshot.get("name"), **found})
    output.print_json(results) if as_json else _table(results)
    damaged = [result for result in results if not result["intact"]]
    for result in damaged:
        _say_damage(result)
    if damaged or failed:
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
    """Write a snapshot into one file, for another server or for keeping.

    When it is broken off, what has come stays beside FILE, and the same command goes on there.
    """
    client: Client = context.obj
    found = client.find_snapshot(snapshot)
    path = f"/snapshots/{found['id']}/export"
    query = {"image": "true"} if image else {}
    with output.progress(f"exporting {snapshot}") as advance:
        if file == "-":
            size = _to_stdout(_Download(client, path, query), advance)
        else:
            size = _to_file(_Download(client, path, query), Path(file), force, advance)
    output.say(f"exported {format_size(size)} to {'stdout' if file == '-' else file}")


@dataclass(slots=True)
class _Download:
    """An archive on its way here: ``received`` bytes of the one that the ETag ``tag`` names."""

    client: Client
    path: str
    query: dict[str, str]
    tag: str = ""
    received: int = 0

    def __iter__(self) -> Iterator[bytes]:
        """The bytes that are missing; a connection that breaks is made again where it broke."""
        while True:
            before = self.received
            query = {**self.query, "offset": str(before)}
            headers = {"If-Match": f'"{self.tag}"'} if before else {}
            try:
                with self.client.download(self.path, query, headers) as answer:
                    self.tag = answer.headers.get("etag", "").strip('"')
                    for data in answer.iter_bytes():
                        self.received += len(data)
                        yield data
                return
            except Unreachable:
                # Without progress there is no use in trying again; with it, the server tells why.
                if self.received == before:
                    raise


def _to_stdout(download: _Download, advance: Callable[[int], None]) -> int:
    """Write an archive to stdout; its size."""
    if sys.stdout.isatty():
        raise InvalidRequest("an archive is nothing for a terminal", hint="name a file")
    for data in download:
        sys.stdout.buffer.write(data)
        advance(len(data))
    sys.stdout.buffer.flush()
    return download.received


def _to_file(download: _Download, final: Path, force: bool, advance: Callable[[int], None]) -> int:
    """Write an archive into a file, which gets its name when all has come; its size."""
    if final.exists() and not force:
        raise Conflict(f"{final} exists", hint="--force replaces it")
    try:
        for part in _parts(final):  # of an export that was broken off
            with _opened(part, "r+b") as sink:
                download.tag = part.name.split(".")[-2]
                download.received = sink.seek(0, os.SEEK_END)
                advance(download.received)
                try:
                    return _fill(part, sink, download, final, advance)
                except (Conflict, InvalidRequest):  # the snapshot has another archive by now
                    advance(-download.received)
                    download.tag, download.received = "", 0
        pieces = iter(download)
        first = next(pieces, b"")  # with it comes the tag
        part, known = _part(final, download.tag)
        with _opened(part, "xb" if known else "wb") as sink:
            return _fill(part, sink, download, final, advance, itertools.chain([first], pieces))
    except OSError as error:
        raise HostFailure(f"cannot write {final}: {error.strerror or error}") from error


def _fill(
    part: Path,
    sink: IO[bytes],
    download: _Download,
    final: Path,
    advance: Callable[[int], None],
    pieces: Iterable[bytes] | None = None,
) -> int:
    """Write what is missing of an archive, and give the file its name; the archive's size."""
    try:
        for data in download if pieces is None else pieces:
            sink.write(data)
            advance(len(data))
    except (Conflict, InvalidRequest, NotFound):  # there is no such archive any more
        part.unlink()
        raise
    except (StillframeError, OSError, KeyboardInterrupt) as error:
        if getattr(error, "code", "") == "damaged" or not _part(final, download.tag)[1]:
            part.unlink()
        else:
            output.say(f"what has come is kept in {part}; the same command goes on there")
        raise
    sink.flush()
    os.fsync(sink.fileno())
    part.replace(final)
    return download.received


@contextlib.contextmanager
def _opened(part: Path, mode: str) -> Iterator[IO[bytes]]:
    """A file that no other export writes to meanwhile."""
    with part.open(mode) as sink:
        try:
            fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HostFailure(f"another export writes to {part}") from error
        yield sink


def _part(final: Path, tag: str) -> tuple[Path, bool]:
    """Where an archive lies while it comes, and whether its name tells which archive it is."""
    known = _TAG.fullmatch(tag) is not None
    return final.with_name(f"{final.name}.{tag}.part" if known else f"{final.name}.part"), known


def _parts(final: Path) -> list[Path]:
    """The beginnings of archives that were to be written to a file."""
    around = re.compile(rf"{re.escape(final.name)}\.{_TAG.pattern}\.part")
    return [path for path in sorted(final.parent.iterdir()) if around.fullmatch(path.name)]


def import_(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="An archive; - is stdin.")],
    name: Annotated[str | None, typer.Option("--name", "-n", help="Instead of its own.")] = None,
    allow_foreign: Annotated[
        bool, typer.Option("--allow-foreign", help="Also memory that cannot run there.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a snapshot from an exported file; it is verified on its way.

    When it is broken off, the same command goes on there for half an hour, while the server runs.
    """
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

    upload = _upload_id(source, query)
    offset = _begun(client, upload)
    if offset is None:
        upload, offset = new_id(), 0
    elif offset:
        advance(source.seek(offset))
    while True:
        here = {**query, "upload": upload, "offset": str(offset)}
        try:
            return client.request("POST", "/snapshots/import", query=here, content=chunks())
        except Unreachable as error:
            status = _status(client, upload)
            if status is not None and "snapshot_id" in status:
                return client.request("GET", f"/snapshots/{status['snapshot_id']}")
            if source.seekable():
                error.hint = "the same command goes on where it broke"
            # Without progress there is no use in trying again.
            if status is None or status["offset"] <= offset or not source.seekable():
                raise
            advance(status["offset"] - source.tell())
            offset = source.seek(status["offset"])


def _upload_id(source: IO[bytes], query: dict[str, str]) -> str:
    """The id under which a file is sent: always the same, so that another call can go on."""
    try:
        about = os.fstat(source.fileno())
    except OSError:
        return new_id()
    if not source.seekable():
        return new_id()
    told = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, sorted(query.items()))
    return "u" + hashlib.sha256(repr(told).encode()).hexdigest()[:23]


def _begun(client: Client, upload: str) -> int | None:
    """From where an upload goes on, 0 for a new one; None when it has come whole already."""
    status = _status(client, upload)
    if status is None:
        return 0
    return None if "snapshot_id" in status else int(status["offset"])


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
