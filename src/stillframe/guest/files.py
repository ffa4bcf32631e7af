"""Files in and out of the guest. What the guest says of paths is not trusted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from stillframe.guest import wire
from stillframe.guest.connection import (
    AgentConnection,
    Channel,
    parse_fields,
    parse_names,
    silent,
)
from stillframe.guest.wire import FrameType
from stillframe.model.errors import GuestFailure
from stillframe.model.values import PathInfo

MAX_PATH = 4096
_KINDS = frozenset({"file", "dir", "link"})


@dataclass(frozen=True, slots=True)
class GuestEntry:
    """One entry of a copy out of the guest; consume ``data`` before the next (empty if no file)."""

    path: str
    mode: int
    kind: str
    link_target: str | None
    size: int
    mtime: int
    uid: int
    gid: int
    data: AsyncIterator[bytes]


@asynccontextmanager
async def _operation(
    connection: AgentConnection, kind: FrameType, fields: dict[str, str]
) -> AsyncIterator[Channel]:
    try:
        payload = wire.text_list(fields.items())
    except ValueError as error:
        raise GuestFailure(f"not a path: {error}", errno="EINVAL") from error
    channel = connection.open_channel()
    try:
        await channel.send(kind, payload)
        yield channel
    finally:
        await channel.close()


async def stat(connection: AgentConnection, path: str, *, follow: bool = True) -> PathInfo:
    """What is at ``path``; absence is an answer. Raises GuestFailure."""
    fields = {"path": path, "follow": "1" if follow else "0"}
    async with _operation(connection, FrameType.STAT, fields) as channel:
        answer = parse_fields((await channel.expect(FrameType.OK)).payload)
    if answer.get("exists") != "1":
        return PathInfo(exists=False)
    kind = answer.get("type")
    return PathInfo(
        exists=True,
        is_dir=kind == "dir",
        is_file=kind == "file",
        is_symlink=kind == "link",
        link_target=answer.get("target"),
        mode=_number(answer, "mode", base=8) & 0o7777,
        size=_number(answer, "size"),
    )


async def write_path(
    connection: AgentConnection,
    path: str,
    data: AsyncIterator[bytes] | None,
    *,
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    patience: float,
) -> int:
    """Write a file (``data`` its bytes) or make a directory (``data`` None); missing parents too.

    Returns the bytes written. Raises GuestFailure: with the fact ``errno`` when the guest refuses,
    without when it takes nothing for ``patience`` seconds.
    """
    fields = {"path": path, "kind": "dir" if data is None else "file"}
    if mode is not None:
        fields["mode"] = f"{mode & 0o7777:o}"
    fields |= {k: str(v) for k, v in (("uid", uid), ("gid", gid)) if v is not None}
    async with _operation(connection, FrameType.WRITE, fields) as channel:
        if data is not None:
            async for chunk in data:
                async with _patient(patience):
                    await channel.send_data(FrameType.DATA, chunk)
        async with _patient(patience):
            await channel.send(FrameType.END)
            answer = parse_fields((await channel.expect(FrameType.OK)).payload)
    return _number(answer, "bytes")


@asynccontextmanager
async def _patient(seconds: float) -> AsyncIterator[None]:
    """Raises GuestFailure when the block takes longer. The session is left as it is.

    What a guest writes to may hang, and the guest be in the best of health.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise silent(seconds) from error


async def read_path(
    connection: AgentConnection, path: str, *, follow: bool = False
) -> AsyncIterator[GuestEntry]:
    """A file (one entry, by its own name) or a tree (entries below it), depth first.

    Each entry's ``data`` yields exactly ``size`` bytes; what the caller leaves is skipped.
    Raises GuestFailure, also for a path from the guest that is absolute or leaves the tree.
    """
    fields = {"path": path, "follow": "1" if follow else "0"}
    if connection.hello.charges_entries:
        fields["charge"] = "entries"
    async with _operation(connection, FrameType.READ, fields) as channel:
        while True:
            frame = await channel.expect(FrameType.ENTRY, FrameType.END)
            if frame.type == FrameType.END:
                channel.end()
                return
            entry = _entry(parse_names(frame.payload), channel)
            yield entry
            async for _ in entry.data:
                pass


def _entry(fields: dict[str, str], channel: Channel) -> GuestEntry:
    kind = fields.get("type", "")
    if kind not in _KINDS:
        raise GuestFailure(
            "the guest named an unknown kind of file", kind=wire.printable(kind[:32])
        )
    size = _number(fields, "size") if kind == "file" else 0
    return GuestEntry(
        path=_safe_path(fields.get("path", "")),
        mode=_number(fields, "mode", base=8) & 0o7777,
        kind=kind,
        link_target=fields.get("target", "")[:MAX_PATH] if kind == "link" else None,
        size=size,
        mtime=max(0, _number(fields, "mtime")),
        uid=_number(fields, "uid"),
        gid=_number(fields, "gid"),
        data=_entry_data(channel, size),
    )


async def _entry_data(channel: Channel, size: int) -> AsyncIterator[bytes]:
    left = size
    while (frame := await channel.expect(FrameType.DATA, FrameType.END)).type == FrameType.DATA:
        left -= len(frame.payload)
        if left < 0:
            break
        yield frame.payload
    if left:
        raise GuestFailure("the guest sent another number of bytes than announced", size=size)


def _safe_path(path: str) -> str:
    """``path`` if it is relative and stays inside; GuestFailure otherwise."""
    parts = path.split("/")
    bad = not path or len(path) > MAX_PATH or "\\" in path
    if bad or any(part in ("", ".", "..") or len(part) > 255 for part in parts):
        raise GuestFailure(
            "the guest named a path outside what was asked for", path=wire.printable(path[:200])
        )
    return path


def _number(fields: dict[str, str], key: str, *, base: int = 10) -> int:
    try:
        value = int(fields[key][:20], base)
    except (KeyError, ValueError) as error:
        raise GuestFailure(f"the guest's answer lacks {key}") from error
    if not -(2**63) <= value < 2**63 or (value < 0 and key != "mtime"):
        raise GuestFailure(f"the guest's {key} is out of range", value=value)
    return value
