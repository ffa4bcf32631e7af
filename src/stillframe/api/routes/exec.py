"""Commands in the guest over a WebSocket.

The first text frame names the command. Then binary frames are stdin, and a text with a ``resize``
object sets the terminal's size (other texts are stdin); back come binary frames with stdout and
stderr merged, at last ``{"exitCode":N}``.
Stillframe's own: an empty binary frame is end of file on stdin, which the contract lacks.
A client that goes hangs up on the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field, TypeAdapter, ValidationError
from starlette.types import Message
from starlette.websockets import WebSocket

from stillframe.api.auth import RequiredScope
from stillframe.api.border import Engine
from stillframe.api.errors import blot, private_texts
from stillframe.api.routes.instances import running_instance
from stillframe.api.schemas.base import Body, Env, Flag, Text
from stillframe.api.sockets import (
    ClientGone,
    end_tasks,
    first_frame,
    hang_up,
    is_there,
    send_data,
    send_json,
    unless_done,
)
from stillframe.engine.interface import EngineInterface, ExecRequest, ExecSession
from stillframe.model.errors import InvalidRequest, StillframeError

router = APIRouter(tags=["instances"])

_LOG = logging.getLogger("stillframe.api")
_NOT_STARTED = 127
_BROKEN = 1011  # RFC 6455: the server met what kept it from fulfilling the request
# stdin that the guest has not taken yet. Reading on lets us see a client that goes.
_STDIN_BUFFER_BYTES = 4 * 1024 * 1024
_ASK_SECONDS = 15.0  # between two looks whether a client that is not read is still there

Cells = Annotated[int, Field(strict=True, ge=1, le=65535)]
_CELLS: TypeAdapter[int] = TypeAdapter(Cells)
_LONGEST_RESIZE = 1024  # characters; what is longer is not looked at
Seconds = Annotated[float, Field(ge=0, le=10**9, allow_inf_nan=False)]


class ExecBody(Body):
    """The first frame: what to run. ``timeout`` and ``wait_for_agent`` are seconds."""

    command: list[Text] | None = None
    tty: Flag | None = None
    env: Env | None = None
    cwd: Text | None = None
    timeout: Seconds | None = None
    wait_for_agent: Seconds | None = None
    rows: Cells | None = None
    cols: Cells | None = None

    def parse(self) -> ExecRequest:
        """The engine's request; no command means a shell, a time-out of zero none."""
        tty = bool(self.tty)
        return ExecRequest(
            command=tuple(self.command or ["/bin/sh"]),
            tty=tty,
            env=self.env,
            cwd=self.cwd or None,
            timeout=self.timeout or None,
            rows=self.rows if tty else None,
            cols=self.cols if tty else None,
            wait_for_agent=self.wait_for_agent or 0,
        )


@router.websocket("/instances/{id}/exec", dependencies=[Depends(RequiredScope("instance:write"))])
async def exec_command(websocket: WebSocket, engine: Engine, id: str) -> None:
    """Run a command in a Running guest; any other state is refused before the upgrade."""
    instance = running_instance(engine, id)
    await websocket.accept()
    try:
        request = (await first_frame(websocket, ExecBody)).parse()
        await _run(websocket, engine, instance.id, request)
    except ClientGone:
        _LOG.debug("the exec client of %s went", instance.id)
    except InvalidRequest as error:
        with contextlib.suppress(ClientGone):
            await send_json(websocket, error=error.message)
    finally:
        await hang_up(websocket)


async def _run(
    websocket: WebSocket, engine: EngineInterface, instance_id: str, request: ExecRequest
) -> None:
    inbox = _Inbox(websocket, tty=request.tty)
    reader = asyncio.create_task(inbox.read())
    began = False
    try:
        session = await unless_done(reader, engine.exec(instance_id, request))
        began = True
        feeder = asyncio.create_task(inbox.feed(session))
        try:
            await unless_done(reader, _relay_output(websocket, session))
        finally:
            await end_tasks(feeder)
            await session.close()
    except ClientGone:
        raise
    except StillframeError as error:
        text = blot(error.message, private_texts(websocket))
        if began and error.code != "exec_failed":
            # It ran, and nobody knows how it ended: an exit code would be made up.
            await hang_up(websocket, _BROKEN, text)
            return
        await send_data(websocket, f"Error: {text}\r\n".encode())
        await send_json(websocket, exitCode=_NOT_STARTED)
    finally:
        await end_tasks(reader)


async def _relay_output(websocket: WebSocket, session: ExecSession) -> None:
    async for _, data in session.output():
        await send_data(websocket, data)
    await send_json(websocket, exitCode=await session.wait())


class _Inbox:
    """What the client sent and the guest has not taken yet, bounded in bytes.

    Reading ahead of the guest is what lets us notice a client that goes while its command does
    not read. With a full buffer reading stops, which slows the client down; whether it is still
    there is then asked by writing.
    """

    def __init__(self, websocket: WebSocket, *, tty: bool) -> None:
        self._websocket = websocket
        self._tty = tty
        self._items: deque[bytes | tuple[int, int]] = deque()
        self._bytes = 0
        self._changed = asyncio.Condition()

    async def read(self) -> None:
        """Collect frames until the client goes."""
        while await self._room():
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            item = self._item(message)
            if item is None:
                continue
            async with self._changed:
                self._items.append(item)
                self._bytes += _weight(item)
                self._changed.notify_all()

    async def _room(self) -> bool:
        """Wait until there is room for more; False when the client went meanwhile."""
        while True:
            try:
                async with asyncio.timeout(_ASK_SECONDS), self._changed:
                    await self._changed.wait_for(lambda: self._bytes <= _STDIN_BUFFER_BYTES)
                    return True
            except TimeoutError:
                if not await is_there(self._websocket):
                    return False

    async def feed(self, session: ExecSession) -> None:
        """Pass what was collected to the command, in order, until cancelled or the guest fails."""
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: bool(self._items))
                    item = self._items.popleft()
                if isinstance(item, bytes):
                    await session.write_stdin(item)
                else:
                    await session.resize(*item)
                async with self._changed:
                    self._bytes -= _weight(item)
                    self._changed.notify_all()
        except StillframeError as error:
            # A command may end without reading its stdin; its output and exit code still count.
            _LOG.debug("stdin was not taken: %s", error)

    def _item(self, message: Message) -> bytes | tuple[int, int] | None:
        data: bytes | None = message.get("bytes")
        if data is not None:
            return data
        text: str = message.get("text") or ""
        resize = _resize(text)
        if resize is None:
            return text.encode() or None
        return _size(resize) if self._tty else None


def _weight(item: bytes | tuple[int, int]) -> int:
    return 64 + len(item)


def _resize(text: str) -> dict[str, Any] | None:
    """What a resize message says, else None: then the text is stdin."""
    if not text.startswith("{") or len(text) > _LONGEST_RESIZE:
        return None
    try:
        resize = json.loads(text).get("resize")
    except (ValueError, RecursionError):
        return None
    return resize if isinstance(resize, dict) else None


def _size(resize: dict[str, Any]) -> tuple[int, int] | None:
    """Its rows and columns; None for a size that no terminal has: the old one stays."""
    try:
        rows, columns = (_CELLS.validate_python(resize.get(key)) for key in ("rows", "cols"))
    except ValidationError:
        return None
    return rows, columns
