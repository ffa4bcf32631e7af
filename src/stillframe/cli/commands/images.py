"""``stillframe image``: list, pull, import, rm."""

from __future__ import annotations

import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from stillframe.cli import output
from stillframe.cli.client import Client, image_path, parse_pairs
from stillframe.cli.output import JsonFlag
from stillframe.model.errors import HostFailure, InvalidRequest, NotFound
from stillframe.model.units import format_size

app = typer.Typer(help="Images: root file systems to boot from.", no_args_is_help=True)
_CHUNK = 1024 * 1024
# The contract has no event for an image's progress, only its status to look at again.
_LOOK_AGAIN_SECONDS = 0.25


@app.command("list")
def list_(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only names.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List images."""
    images = context.obj.request("GET", "/images")
    if as_json:
        output.print_json(images)
    elif quiet:
        print(*(i["name"] for i in images), sep="\n", end="\n" if images else "")
    else:
        _table(images)


@app.command()
def pull(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="For example alpine:3 or stillframe/base.")],
    platform: Annotated[
        str | None, typer.Option("--platform", help="For example linux/amd64.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", metavar="KEY=VALUE")] = None,
    username: Annotated[
        str | None, typer.Option("--username", "-u", help="Of a private registry.")
    ] = None,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read its password from stdin, else ask.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it is ready.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Fetch an image from its registry."""
    client: Client = context.obj
    wishes = {
        "name": name,
        "platform": platform,
        "tags": parse_pairs(tag, "--tag") or None,
        "credentials": _credentials(username, password_stdin),
    }
    body = {key: value for key, value in wishes.items() if value is not None}
    with output.working(f"pulling {name}"):
        image = client.request("POST", "/images", body=body)
        while wait and image["status"] not in ("ready", "failed"):
            threading.Event().wait(_LOOK_AGAIN_SECONDS)
            image = client.request("GET", image_path(image["name"]))
    if image["status"] == "failed":
        raise HostFailure(f"pulling {name} failed: {image.get('error') or 'no reason given'}")
    output.print_json(image) if as_json else _table([image])


@app.command("import")
def import_(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What to call it.")],
    source: Annotated[
        Path, typer.Argument(help="Tar of a root file system, or an OCI layout (directory or tar).")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Make an image from a local archive."""
    if not source.exists():
        raise NotFound(f"no such file: {source}")
    if source.is_dir() and not (source / "index.json").is_file():
        raise InvalidRequest(
            f"{source} is a directory and no OCI layout",
            hint=f"make a tar of it: tar -C {source} -cf image.tar .",
        )
    with output.working(f"importing {source}"):
        image = context.obj.request(
            "POST",
            "/images/import",
            query={"name": name},
            content=_as_tar(source) if source.is_dir() else _chunks(source),
        )
    output.print_json(image) if as_json else _table([image])


@app.command()
def tag(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="An image that is here.")],
    target: Annotated[str, typer.Argument(help="Another name for it, for example team/app:1.0.")],
    as_json: JsonFlag = False,
) -> None:
    """Give an image another name as well."""
    image = context.obj.request("POST", image_path(name) + "/tag", body={"target": target})
    output.print_json(image) if as_json else _table([image])


@app.command()
def rm(context: typer.Context, names: list[str]) -> None:
    """Forget images that nothing needs."""

    def remove(name: str) -> None:
        context.obj.request("DELETE", image_path(name))
        print(name)

    output.each(names, "removing", remove)


def _credentials(username: str | None, from_stdin: bool) -> dict[str, str] | None:
    """What a private registry wants to see. A password on the command line would be for all to see.

    Without a user name what stdin gives is a token of the registry.
    """
    if username is None and not from_stdin:
        return None
    if from_stdin:
        secret = sys.stdin.read().rstrip("\r\n")
    elif sys.stdin.isatty():
        secret = str(typer.prompt("Password", hide_input=True, err=True))
    else:
        raise typer.BadParameter("--username needs --password-stdin where nobody can be asked")
    if username is None:
        return {"registry_token": secret}
    return {"username": username, "password": secret}


def _as_tar(layout: Path) -> Iterator[bytes]:
    """The files of an OCI layout directory as a tar stream, made as it is sent."""
    for path in sorted(layout.rglob("*")):
        if not path.is_file():
            continue
        info = tarfile.TarInfo(str(path.relative_to(layout)))
        info.size = path.stat().st_size
        yield info.tobuf()
        yield from _chunks(path)
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _chunks(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _table(images: list[dict[str, Any]]) -> None:
    output.print_table(
        ("NAME", "DIGEST", "STATUS", "SIZE", "AGE"),
        [
            (
                i["name"], i["digest"][:19], i["status"],
                format_size(i["size_bytes"]) if i.get("size_bytes") else None,
                output.age(i["created_at"]),
            )
            for i in images
        ],
    )  # fmt: skip
