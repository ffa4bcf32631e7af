"""Logs as server-sent events: one JSON string per line of the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from stillframe.api.auth import ScopedRoute, needs
from stillframe.api.border import Engine
from stillframe.api.errors import problems
from stillframe.model.errors import StillframeError

router = APIRouter(route_class=ScopedRoute, tags=["instances"])

_LOG = logging.getLogger("stillframe.api")
# How long a followed log may be silent before its headers are sent all the same.
_FIRST_LINE_SECONDS = 0.25
# A comment now and then finds clients that went without a word.
_HEARTBEAT_SECONDS = 15.0
_HEADERS = {"Cache-Control": "no-cache", "Connection": "keep-alive", "X-Accel-Buffering": "no"}


@router.get(
    "/instances/{id}/logs",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **problems(404, 409),
    },
    openapi_extra=needs("instance:read"),
)
async def stream_logs(
    engine: Engine,
    id: str,
    tail: Annotated[int, Query(ge=0, le=2**31 - 1)] = 100,
    follow: bool = False,
    source: Literal["app", "vmm", "hypeman"] = "app",
) -> StreamingResponse:
    """Stream the last lines of a log, then, with ``follow``, every new one."""
    instance = engine.find_instance(id)
    lines = LineReader(engine.logs(instance.id, source=source, tail=tail, follow=follow))
    try:
        # A missing log must be a 404, not a stream that breaks off.
        await lines.ready(_FIRST_LINE_SECONDS)
    except BaseException:
        await lines.close()
        raise
    return LogResponse(lines)


class LineReader:
    """Reads an iterator of lines ahead by one, so that waiting for a line can be bounded."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines
        self._next: asyncio.Task[str | None] | None = None

    async def ready(self, seconds: float) -> bool:
        """Wait for a line or the end. Raises what the source raised; False when time is up."""
        if self._next is None:
            self._next = asyncio.create_task(self._read())
        done, _ = await asyncio.wait({self._next}, timeout=seconds)
        if done:
            self._next.result()
        return bool(done)

    async def take(self) -> str | None:
        """The next line, None at the end; ``ready`` has been true."""
        if self._next is None:
            return None
        task, self._next = self._next, None
        return await task

    async def close(self) -> None:
        """Let go of the source. Idempotent."""
        task, self._next = self._next, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if isinstance(self._lines, AsyncGenerator):
            await self._lines.aclose()

    async def _read(self) -> str | None:
        return await anext(self._lines, None)


class LogResponse(StreamingResponse):
    """The event stream of a LineReader, which is closed with it."""

    def __init__(self, lines: LineReader) -> None:
        super().__init__(_events(lines), media_type="text/event-stream", headers=_HEADERS)
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until the log ends or the client goes."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.close()


async def _events(lines: LineReader) -> AsyncIterator[bytes]:
    try:
        while True:
            if not await lines.ready(_HEARTBEAT_SECONDS):
                yield b": keep-alive\n\n"
                continue
            line = await lines.take()
            if line is None:
                return
            yield f"data: {json.dumps(line)}\n\n".encode()
    except StillframeError as error:
        # The headers are gone: all that is left is to end the stream.
        _LOG.warning("log stream ended: %s", error)
