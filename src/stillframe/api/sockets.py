"""What the exec and cp WebSockets share: the first frame, and noticing that the client went."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from stillframe.model.errors import InvalidRequest

# The SDK refuses messages over 1 MiB; the contract's server sends 32 KiB at a time.
CHUNK_BYTES = 32 * 1024
# The largest message taken: the SDK sends stdin that it was given as bytes in one.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_FIRST_FRAME_SECONDS = 30.0
_REASON_BYTES = 123
_ANSWER_SECONDS = 1.0

BodyT = TypeVar("BodyT", bound=BaseModel)
ResultT = TypeVar("ResultT")


class ClientGone(InvalidRequest):
    """The client closed the connection in the middle of its request."""


async def first_frame(websocket: WebSocket, schema: type[BodyT]) -> BodyT:
    """The opening request of a session, at most 30 s after the upgrade.

    Raises InvalidRequest when it is late or wrong, ClientGone when it never comes.
    """
    try:
        async with asyncio.timeout(_FIRST_FRAME_SECONDS):
            message = await websocket.receive()
    except TimeoutError as error:
        raise InvalidRequest("no request came in time") from error
    if message["type"] == "websocket.disconnect":
        raise ClientGone("the client went before it asked for anything")
    text = message.get("text")
    if text is None:
        raise InvalidRequest("the first message must be a text frame with JSON")
    return parse_frame(text, schema)


def parse_frame(text: str, schema: type[BodyT]) -> BodyT:
    """A text frame as ``schema``. Raises InvalidRequest naming the first problem."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the message is not valid JSON") from error
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part)[:64] for part in problem["loc"])
        raise InvalidRequest(f"{place or 'message'}: {problem['msg']}") from error


async def while_connected(websocket: WebSocket, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run ``work`` while the client stays; what the client sends meanwhile is dropped.

    Raises ClientGone after cancelling the work when the client goes first.
    """
    watching = asyncio.create_task(_until_gone(websocket))
    try:
        return await unless_done(watching, work)
    finally:
        await end_tasks(watching)


async def unless_done(watching: asyncio.Task[None], work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of ``work``, unless ``watching`` ends first: then the work is cancelled.

    Raises ClientGone in that case. Work that completes in spite of its cancellation counts, so
    that what it made is not lost.
    """
    working = asyncio.create_task(work)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
            if working.cancelled():
                raise ClientGone("the client went")
        return working.result()
    finally:
        await end_tasks(working)


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended; their results are forgotten."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def send_json(websocket: WebSocket, **body: object) -> None:
    """Send a control frame. Raises ClientGone when nobody listens any more."""
    try:
        await websocket.send_text(json.dumps(body, separators=(",", ":")))
    except (WebSocketDisconnect, RuntimeError) as error:
        raise ClientGone("the client went") from error


async def send_data(websocket: WebSocket, data: bytes) -> None:
    """Send bytes in frames the SDK accepts. Raises ClientGone when nobody listens any more."""
    view = memoryview(data)
    try:
        for start in range(0, len(view), CHUNK_BYTES):
            await websocket.send_bytes(bytes(view[start : start + CHUNK_BYTES]))
    except (WebSocketDisconnect, RuntimeError) as error:
        raise ClientGone("the client went") from error


async def is_there(websocket: WebSocket) -> bool:
    """Whether the client of a stream of bytes is still there, as far as writing nothing tells."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await websocket.send_bytes(b"")
    except TimeoutError:
        return True  # it does not read just now
    except (WebSocketDisconnect, RuntimeError):
        return False
    return True


async def hang_up(websocket: WebSocket, code: int = 1000, reason: str = "") -> None:
    """Close the connection unless it is closed already."""
    # A close frame has room for 123 bytes of reason (RFC 6455, section 5.5).
    reason = reason.encode()[:_REASON_BYTES].decode(errors="ignore")
    if websocket.application_state is WebSocketState.CONNECTED:
        with suppress(WebSocketDisconnect, RuntimeError):
            await websocket.close(code, reason)


async def _until_gone(websocket: WebSocket) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
