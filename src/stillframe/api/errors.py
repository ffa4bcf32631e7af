"""Errors as answers: one body, two families of codes.

Refusals by the request layer (shape, auth, unknown route) bear the HTTP status text as their code,
those by the engine its snake_case code. Facts and the hint are in ``details``. What the caller must
not see (paths of this host, tracebacks) goes to the log under a reference that the answer names.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from stillframe.api.schemas.base import Error, ErrorDetail
from stillframe.model.errors import (
    GuestFailure,
    HostFailure,
    RateLimited,
    StillframeError,
    Unauthorized,
    VmmFailure,
)

_LOG = logging.getLogger("stillframe.api")
_MAX_PROBLEMS = 20
_NO_RETRY = {"x-should-retry": "false"}
Responses = dict[int | str, dict[str, Any]]


def problems(*statuses: int) -> Responses:
    """The ``responses`` of a route: Error for each status, and for any other refusal.

    400, 401, 403 and 500 are always among them; ``default`` also keeps FastAPI from documenting a
    422 that is never sent.
    """
    documented: Responses = {
        status: {"model": Error, "description": HTTPStatus(status).phrase}
        for status in sorted({400, 401, 403, 500, *statuses})
    }
    return {**documented, "default": {"model": Error, "description": "Any other refusal"}}


def install(app: FastAPI) -> None:
    """Make the app answer every failure with the contract's error body."""
    # One handler serves requests and WebSockets, which Starlette's types do not foresee.
    handlers: dict[type[Exception], Any] = {
        StillframeError: _on_error,
        RequestValidationError: _on_invalid,
        HTTPException: _on_http,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def describe(error: StillframeError, private: Iterable[str] = ()) -> Error:
    """The body for an error; ``private`` are texts (host paths) to be blotted out."""
    private = tuple(private)
    details = [
        ErrorDetail(code=name, message=blot(_text(value), private))
        for name, value in error.facts.items()
        if value is not None and not isinstance(value, Path)
    ]
    if error.hint:
        details.append(ErrorDetail(code="hint", message=blot(error.hint, private)))
    return Error(code=error.code, message=blot(error.message, private), details=details or None)


def blot(text: str, private: Iterable[str]) -> str:
    """The text without private paths, and without halves of surrogate pairs."""
    for secret in private:
        text = text.replace(secret, "<data>")
    return _sendable(text)


def _sendable(text: str) -> str:
    # What is refused for such a half is often quoted in the refusal.
    return text.encode("utf-8", "replace").decode()


def report(connection: HTTPConnection, error: StillframeError) -> Error:
    """The body for an error. Failures of the host are logged under a reference that it names."""
    body = describe(error, private_texts(connection))
    if isinstance(error, HostFailure):
        reference = secrets.token_hex(6)
        if error.hint is None:  # else it is known, and what to do: no traceback tells more
            _LOG.error("%s %s", reference, connection.url.path, exc_info=error)
        else:
            _LOG.warning("%s %s: %s", reference, connection.url.path, error)
        body.details = [
            *(body.details or []),
            ErrorDetail(code="reference", message=reference),
        ]
    return body


def error_response(
    connection: HTTPConnection, error: StillframeError, body: Error | None = None
) -> JSONResponse:
    """The HTTP answer for an error; ``body`` takes the place of the error's own report."""
    body = report(connection, error) if body is None else body
    headers = _retry_advice(connection, error)
    if isinstance(error, Unauthorized):
        headers = {**headers, "WWW-Authenticate": "Bearer"}
    return JSONResponse(body.plain(), error.status, headers)


def private_texts(connection: HTTPConnection) -> tuple[str, ...]:
    """Texts that no answer may contain."""
    texts: tuple[str, ...] = getattr(connection.app.state, "private_texts", ())
    return texts


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _retry_advice(connection: HTTPConnection, error: StillframeError) -> dict[str, str]:
    # Clients repeat 409 and 5xx, POST included, unless told otherwise.
    if isinstance(error, RateLimited):
        return {"Retry-After": "1"}
    method = connection.scope.get("method", "GET")
    if method in ("GET", "DELETE") and isinstance(error, VmmFailure | GuestFailure):
        return {}
    return dict(_NO_RETRY)


def _status_body(status: int, message: str, details: list[ErrorDetail] | None = None) -> Error:
    return Error(code=HTTPStatus(status).phrase, message=message, details=details)


async def _on_error(connection: HTTPConnection, error: Exception) -> Response | None:
    assert isinstance(error, StillframeError)  # noqa: S101 - registered for this class
    return await _reply(connection, error_response(connection, error))


async def _on_invalid(connection: HTTPConnection, error: Exception) -> Response | None:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    details = [
        ErrorDetail(code=_place(problem), message=_sendable(str(problem.get("msg", "invalid"))))
        for problem in error.errors()[:_MAX_PROBLEMS]
    ]
    first = details[0] if details else ErrorDetail(code="body", message="invalid")
    body = _status_body(400, f"{first.code}: {first.message}", details)
    return await _reply(connection, JSONResponse(body.plain(), 400))


def _place(problem: Mapping[str, Any]) -> str:
    return _sendable(".".join(str(part)[:64] for part in problem.get("loc", ())))


async def _on_http(connection: HTTPConnection, error: Exception) -> Response | None:
    assert isinstance(error, HTTPException)  # noqa: S101
    status = error.status_code
    if status == 404:
        body = Error(code="not_found", message="resource not found")
    else:
        body = _status_body(status, str(error.detail))
    return await _reply(connection, JSONResponse(body.plain(), status, error.headers))


async def _reply(connection: HTTPConnection, response: Response) -> Response | None:
    if isinstance(connection, WebSocket):
        await connection.send_denial_response(response)
        return None
    return response


@contextmanager
def contract_codes(codes: Mapping[type[StillframeError], str]) -> Iterator[None]:
    """Give errors of these classes the code the contract wants for this operation."""
    try:
        yield
    except StillframeError as error:
        recode(error, codes)
        raise


def recode(error: StillframeError, codes: Mapping[type[StillframeError], str]) -> None:
    """Give the error the code of its class in ``codes``, if it has one there."""
    error.code = next((code for kind, code in codes.items() if isinstance(error, kind)), error.code)


class Boundary:
    """ASGI middleware: an unforeseen exception becomes a 500 with a reference into the log.

    When the answer has begun there is no way to say so; the exception goes on and the server
    breaks the connection, so that the client does not take half an answer for a whole one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app behind the boundary."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            if begun:
                raise
            reference = secrets.token_hex(6)
            _LOG.exception("%s %s", reference, scope.get("path"))
            body = Error(
                code="internal_error",
                message="internal error",
                details=[ErrorDetail(code="reference", message=reference)],
            )
            await deny(body, 500, scope, receive, send)


async def deny(body: Error, status: int, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request or refuse a WebSocket upgrade from within a middleware."""
    # What failed unforeseen may have done something: only reading is repeated by itself.
    repeatable = status < 500 or scope.get("method") == "GET"
    response = JSONResponse(body.plain(), status, {} if repeatable else _NO_RETRY)
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await response(scope, receive, send)
