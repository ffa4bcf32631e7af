"""``stillframe cp``: files into and out of a guest, over the contract's WebSocket (4.2)."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillframe.cli import output
from stillframe.cli.client import Client, broken_stream, instance_path
from stillframe.model.errors import GuestFailure, HostFailure, InvalidRequest, NotFound

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

_CHUNK = 32 * 1024


def cp(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="PATH, or INSTANCE:PATH.")],
    target: Annotated[str, typer.Argument(help="PATH, or INSTANCE:PATH.")],
) -> None:
    """Copy a file or directory into or out of an instance."""
    client: Client = context.obj
    from_guest, to_guest = _split(source), _split(target)
    if "-" in (source, target):
        raise InvalidRequest(
            "cp copies files, not streams",
            hint="use exec: `stillframe exec -i web sh -c 'tar x -C /srv' < site.tar`",
        )
    if (from_guest is None) == (to_guest is None):
        raise typer.BadParameter("exactly one side must be INSTANCE:PATH")
    with output.working(f"copying {source}"):
        try:
            if to_guest is not None:
                count = _upload(client, Path(source), *to_guest)
            elif from_guest is not None:
                count = _download(client, *from_guest, Path(target))
        except OSError as error:
            raise HostFailure(f"{error.filename}: {error.strerror}") from error
    output.say(f"{count} {'entry' if count == 1 else 'entries'} copied")


def _split(text: str) -> tuple[str, str] | None:
    """``INSTANCE:PATH`` apart; None for a local path (which may hold a colon after a slash)."""
    name, separator, path = text.partition(":")
    if not separator or "/" in name or not name or name.startswith("."):
        return None
    return name, path or "/"


def _upload(client: Client, source: Path, instance: str, guest_path: str) -> int:
    if not source.exists():
        raise NotFound(f"no such file: {source}")
    if guest_path.endswith("/") or _guest_stat(client, instance, guest_path).get("is_dir"):
        guest_path = str(PurePosixPath(guest_path) / source.resolve().name)
    count = 0
    for local, remote in _walk(source, guest_path):
        info = local.stat()
        is_dir = stat.S_ISDIR(info.st_mode)
        request = {
            "direction": "to",
            "guest_path": remote,
            "is_dir": is_dir,
            "mode": stat.S_IMODE(info.st_mode),
        }
        with client.websocket(instance_path(instance, "cp")) as connection:
            connection.send(json.dumps(request))
            if not is_dir:
                with local.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        connection.send(chunk)
            connection.send('{"type":"end"}')
            result = _control(connection)
        if not result.get("success"):
            raise GuestFailure(f"cannot write {remote}: {result.get('error', 'no reason given')}")
        count += 1
    return count


def _walk(source: Path, guest_path: str) -> Iterator[tuple[Path, str]]:
    """A path and everything below it, directories first. Links to files are followed."""
    yield source, guest_path
    if not source.is_dir():
        return
    for child in sorted(source.iterdir()):
        inner = str(PurePosixPath(guest_path) / child.name)
        if child.is_symlink() and child.is_dir():
            yield child, inner
        elif child.is_dir() or child.is_file():
            yield from _walk(child, inner)


def _download(client: Client, instance: str, guest_path: str, target: Path) -> int:
    base = target / PurePosixPath(guest_path).name if target.is_dir() else target
    count, single = 0, not _guest_stat(client, instance, guest_path).get("is_dir")
    if not single:
        # The guest sends what is in the directory, not the directory itself.
        base.mkdir(exist_ok=True)
    with client.websocket(instance_path(instance, "cp")) as connection:
        connection.send(json.dumps({"direction": "from", "guest_path": guest_path}))
        final = False
        while not final:
            header = _control(connection)
            if header.get("type") == "end":
                final = bool(header.get("final"))
                continue
            final = _receive_entry(connection, header, _destination(base, header, single))
            count += 1
    return count


def _destination(base: Path, header: dict[str, Any], single: bool) -> Path:
    """Where an entry goes; refuses a path that would leave ``base`` (the guest is not trusted)."""
    if single:
        return base
    relative = PurePosixPath(str(header["path"]))
    if relative.is_absolute() or ".." in relative.parts:
        raise GuestFailure(f"the guest sent an unsafe path {str(relative)!r}")
    destination = base / relative
    for parent in destination.relative_to(base).parents:
        if (base / parent).is_symlink():
            raise GuestFailure(f"the guest sent a path through a link: {str(relative)!r}")
    return destination


def _receive_entry(connection: ClientConnection, header: dict[str, Any], destination: Path) -> bool:
    """Write one entry; whether it was the last."""
    mode = int(header.get("mode", 0o644)) & 0o777
    if header.get("is_dir"):
        destination.mkdir(parents=True, exist_ok=True)
        return _expect_end(connection)
    if header.get("is_symlink"):
        destination.unlink(missing_ok=True)
        destination.symlink_to(str(header.get("link_target", "")))
        return _expect_end(connection)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    received = 0
    with os.fdopen(os.open(destination, flags, 0o600), "wb") as file:
        while isinstance(frame := connection.recv(), bytes):
            file.write(frame)
            received += len(frame)
        os.fchmod(file.fileno(), mode)
    end = _checked(frame)
    if received != header.get("size", received):
        raise broken_stream(f"{received} bytes of {destination.name} came, not {header['size']}")
    return bool(end.get("final"))


def _expect_end(connection: ClientConnection) -> bool:
    return bool(_control(connection).get("final"))


def _guest_stat(client: Client, instance: str, path: str) -> dict[str, Any]:
    query = {"path": path, "follow_links": "true"}
    answer = client.request("GET", instance_path(instance, "stat"), query=query)
    return dict(answer)


def _control(connection: ClientConnection) -> dict[str, Any]:
    frame = connection.recv()
    if isinstance(frame, bytes):
        raise broken_stream("data came where a message was due")
    return _checked(frame)


def _checked(frame: str) -> dict[str, Any]:
    try:
        message = json.loads(frame)
    except ValueError as error:
        raise broken_stream("a malformed message came") from error
    if not isinstance(message, dict):
        raise InvalidRequest("the server sent a message that is not an object")
    if message.get("type") == "error":
        raise GuestFailure(f"the guest says: {message.get('message', 'no reason given')}")
    return message
