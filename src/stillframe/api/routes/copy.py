"""Files into and out of the guest over a WebSocket.

The first text frame says which way; one connection carries one upload (a file or a directory
itself), one download (a file or a tree), or one question about a path.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.websockets import WebSocket

from stillframe.api.auth import RequiredScope
from stillframe.api.border import Engine
from stillframe.api.errors import blot, private_texts
from stillframe.api.routes.instances import running_instance
from stillframe.api.schemas.base import Body, Flag, Int, Text
from stillframe.api.schemas.instances import PathInfoAnswer
from stillframe.api.sockets import (
    ClientGone,
    first_frame,
    hang_up,
    parse_frame,
    send_data,
    send_json,
    while_connected,
)
from stillframe.engine.interface import EngineInterface, ReadEntry
from stillframe.model.errors import StillframeError

router = APIRouter(tags=["instances"])

_LOG = logging.getLogger("stillframe.api")
# The SDK refuses set-id bits in a download's mode.
_PERMISSIONS = 0o777
Owner = Annotated[Int, Field(ge=0, le=2**32 - 2)]


class CopyBody(Body):
    """The first frame of a session."""

    direction: Literal["to", "from", "stat"]
    guest_path: Annotated[Text, Field(min_length=1, max_length=4096)]
    is_dir: Flag | None = None
    mode: Annotated[Int, Field(ge=0, le=0o7777)] | None = None
    follow_links: Flag | None = None
    src_basename: Text | None = None
    uid: Owner | None = None
    gid: Owner | None = None


class _EndFrame(Body):
    type: Literal["end"]


@router.websocket("/instances/{id}/cp", dependencies=[Depends(RequiredScope("instance:write"))])
async def copy_path(websocket: WebSocket, engine: Engine, id: str) -> None:
    """Copy to or from a Running guest; any other state is refused before the upgrade."""
    instance = running_instance(engine, id)
    await websocket.accept()
    try:
        request = await first_frame(websocket, CopyBody)
        if request.direction == "to":
            await _upload(websocket, engine, instance.id, request)
        elif request.direction == "from":
            await while_connected(websocket, _download(websocket, engine, instance.id, request))
        else:
            await while_connected(websocket, _stat(websocket, engine, instance.id, request))
    except ClientGone:
        _LOG.debug("the cp client of %s went", instance.id)
    except StillframeError as error:
        message = blot(error.message, private_texts(websocket))
        with contextlib.suppress(ClientGone):
            await send_json(websocket, type="error", message=message)
    finally:
        await hang_up(websocket)


async def _upload(
    websocket: WebSocket, engine: EngineInterface, instance_id: str, request: CopyBody
) -> None:
    incoming = _Incoming(websocket)
    if request.is_dir:
        await incoming.drain()
    default_mode = 0o755 if request.is_dir else 0o644
    try:
        written = await engine.write_path(
            instance_id,
            request.guest_path,
            None if request.is_dir else incoming.chunks(),
            mode=default_mode if request.mode is None else request.mode,
            uid=request.uid,
            gid=request.gid,
        )
    except ClientGone:
        raise
    except StillframeError as error:
        # The client sends all before it listens: take it in, or it never sees the reason.
        await incoming.drain()
        message = blot(error.message, private_texts(websocket))
        await send_json(websocket, type="result", success=False, error=message)
        return
    await incoming.drain()
    await send_json(websocket, type="result", success=True, bytes_written=written)


class _Incoming:
    """The bytes of an upload up to its end frame."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._ended = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes. Raises ClientGone before the end frame, InvalidRequest for others."""
        while not self._ended:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise ClientGone("the client went in the middle of an upload")
            data: bytes | None = message.get("bytes")
            if data is None:
                parse_frame(message.get("text") or "", _EndFrame)
                self._ended = True
            elif data:
                yield data

    async def drain(self) -> None:
        """Take in what is left, up to the end frame."""
        async for _ in self.chunks():
            pass


async def _download(
    websocket: WebSocket, engine: EngineInterface, instance_id: str, request: CopyBody
) -> None:
    entries = engine.read_path(instance_id, request.guest_path, follow=bool(request.follow_links))
    name = PurePosixPath(request.guest_path).name or "root"
    pending = False
    async for entry in entries:
        if entry.kind == "dir" and entry.path.strip("./") == "":
            # The root of a tree is the destination itself, for which the protocol has no name.
            continue
        # "final" belongs to the last entry, which is known only when no other follows.
        if pending:
            await send_json(websocket, type="end", final=False)
        await send_json(websocket, type="header", **_header(entry, name))
        async for data in entry.data:
            await send_data(websocket, data)
        pending = True
    if not pending:
        # An empty tree must consist of something: an empty directory of its name.
        empty = {"mode": 0o755, "is_dir": True, "size": 0, "mtime": 0}
        await send_json(websocket, type="header", path=name, **empty)
    await send_json(websocket, type="end", final=True)


def _header(entry: ReadEntry, name: str) -> dict[str, Any]:
    # A single file is named after its source.
    path = entry.path.strip("/")
    path = name if path in ("", ".") else path
    header: dict[str, Any] = {
        "path": path,
        "mode": entry.mode & _PERMISSIONS,
        "is_dir": entry.kind == "dir",
        "size": entry.size if entry.kind == "file" else 0,
        "mtime": max(0, entry.mtime),
        "uid": max(0, entry.uid),
        "gid": max(0, entry.gid),
    }
    if entry.kind == "link":
        header.update(is_symlink=True, link_target=entry.link_target or "")
    return header


async def _stat(
    websocket: WebSocket, engine: EngineInterface, instance_id: str, request: CopyBody
) -> None:
    info = await engine.stat(instance_id, request.guest_path, follow=bool(request.follow_links))
    await send_json(websocket, type="stat", **PathInfoAnswer.of(info).plain())
