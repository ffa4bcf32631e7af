"""What is turned away before any route sees it: oversized bodies and smuggled slashes.

Also the parts of a request that FastAPI does not read by itself: the engine, and
``tags[key]=value`` filters; and the listener that answers ``/metrics`` alone.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Depends
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stillframe.api.errors import deny
from stillframe.api.schemas.base import Error
from stillframe.engine.interface import EngineInterface
from stillframe.model.errors import InvalidRequest

MAX_BODY_BYTES = 8 * 1024 * 1024
# The version of the format is part of its name (Prometheus' exposition formats).
METRICS_TYPE = "text/plain; version=0.0.4"
# Bodies that are not held in memory: two are written down as they come, two are refused unread.
UPLOAD_PATHS = frozenset(
    {"/images/import", "/snapshots/import", "/volumes/from-archive", "/builds"}
)
_TAG_KEY = re.compile(r"tags\[(.*)\]", re.DOTALL)
_TOO_LARGE = f"the body exceeds {MAX_BODY_BYTES} bytes"


async def get_engine(connection: HTTPConnection) -> EngineInterface:
    """The engine this app serves."""
    engine: EngineInterface = connection.app.state.engine
    return engine


Engine = Annotated[EngineInterface, Depends(get_engine)]

TAGS_QUERY: dict[str, Any] = {
    "name": "tags",
    "in": "query",
    "required": False,
    "style": "deepObject",
    "explode": True,
    "description": "Exact, case-sensitive matches that must all hold: tags[key]=value",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}


async def get_tags(connection: HTTPConnection) -> dict[str, str]:
    """The ``tags[key]=value`` pairs of the query. Raises InvalidRequest for any other ``tags``."""
    tags = {}
    for key, value in connection.query_params.multi_items():
        match = _TAG_KEY.fullmatch(key)
        if match is not None and match[1]:
            tags[match[1]] = value
        elif key == "tags" or key.startswith("tags["):
            raise InvalidRequest(
                "tags must be given as tags[key]=value", code="Bad Request", parameter=key[:64]
            )
    return tags


TagFilter = Annotated[dict[str, str], Depends(get_tags)]


class Border:
    """ASGI middleware for limits on what comes in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Turn the request away, or let it pass with its body counted."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif _smuggles_slash(scope):
            body = Error(code="not_found", message="resource not found")
            await deny(body, 404, scope, receive, send)
        elif scope["type"] == "websocket" or scope["path"] in UPLOAD_PATHS:
            await self._app(scope, receive, send)
        elif _declared_length(scope) > MAX_BODY_BYTES:
            body = Error(code="Request Entity Too Large", message=_TOO_LARGE)
            await deny(body, 413, scope, receive, send)
        else:
            await self._app(scope, _counted(receive), send)


class MetricsListener:
    """ASGI middleware: what comes in at ``address`` (host, port) may read ``/metrics``, no more.

    No token is asked for there, so the address must be one that only this machine reaches.
    """

    def __init__(self, app: ASGIApp, engine: EngineInterface, address: tuple[str, int]) -> None:
        self._app, self._engine, self._address = app, engine, address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer here, or pass on what came in elsewhere."""
        # The server takes this from the socket; no header of the request can change it.
        if scope["type"] == "lifespan" or tuple(scope.get("server") or ()) != self._address:
            await self._app(scope, receive, send)
        elif scope.get("method") not in ("GET", "HEAD") or scope["path"] != "/metrics":
            body = Error(code="not_found", message="only GET /metrics is answered here")
            await deny(body, 404, scope, receive, send)
        else:
            answer = Response(self._engine.metrics(), media_type=METRICS_TYPE)
            await answer(scope, receive, send)


def _smuggles_slash(scope: Scope) -> bool:
    # Routes match the decoded path. Only image names contain slashes; anywhere else an encoded
    # one would make "/instances/a%2Fstop" mean another route than it says.
    raw: bytes = scope.get("raw_path") or b""
    return b"%2f" in raw.lower() and not scope["path"].startswith("/images/")


def _declared_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length", "0")
    return int(text) if text.isdecimal() else 0


def _counted(receive: Receive) -> Receive:
    received = 0

    async def counted_receive() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return counted_receive
