"""Requests that a client sends again because it did not get the answer.

The SDKs repeat any request, POST included, when its connection breaks or their patience ends, while
the work goes on here. Done twice it would make two snapshots of one wish, or call the success of
the first attempt a conflict. So a repetition joins the earlier attempt and gets its answer. There
are two ways of telling one from a second wish:

* The SDKs number their attempts (``x-stainless-retry-count``). One after the first joins an equal
  request of the same token that nobody waits for any more: its client went before the answer, at
  most ``WINDOW_SECONDS`` ago. An attempt that somebody still waits for, or that was answered, is
  never joined, and neither does a request join that does not call itself a repetition.
* An ``Idempotency-Key`` of the client's choice: the same key is the same request, until an hour
  after it succeeded. A failure lets go of the key, so that it can be tried again.

Nothing of this outlives the server. A request whose client went runs on to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from stillframe.model.errors import HostFailure, InvalidRequest

WINDOW_SECONDS: Final = 30.0  # the SDKs wait at most 8 s before they try again
KEY_SECONDS: Final = 3600.0
KEPT_BYTES: Final = 8 * 1024 * 1024
_LEAST_WEIGHT = 4096  # of a kept answer, so that their number is bounded too
_LONGEST_KEY = 255
_ATTEMPT_HEADER = "x-stainless-retry-count"
_KEY_HEADER = "idempotency-key"


@dataclass(eq=False, slots=True)
class _Attempt:
    """A request at work, or one whose answer may still be asked for.

    ``clients`` wait for its answer; the last of them ``left`` then (the loop's clock).
    """

    name: bytes
    fingerprint: bytes
    outcome: asyncio.Future[Response]
    keyed: bool
    clients: int = 0
    left: float = 0.0
    ended: float = 0.0

    @property
    def succeeded(self) -> bool:
        done = self.outcome.done() and self.outcome.exception() is None
        return done and self.outcome.result().status_code < 400

    @property
    def weight(self) -> int:
        body = len(self.outcome.result().body) if self.succeeded else 0
        return max(body, _LEAST_WEIGHT)

    def is_over(self, now: float) -> bool:
        """Whether nobody may ask for its answer any more."""
        return now - (self.ended if self.keyed else self.left) > (
            KEY_SECONDS if self.keyed else WINDOW_SECONDS
        )


class Repeats:
    """Answers of requests that change something, each wish carried out once.

    Used from the event loop's thread only.
    """

    def __init__(self) -> None:
        self._attempts: dict[bytes, list[_Attempt]] = {}
        self._kept: dict[_Attempt, None] = {}  # those that have ended, oldest first

    async def answer(
        self, request: Request, work: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """The answer of ``work``, or of an earlier attempt at the same thing.

        The request is authorised already. Raises what the work raises, InvalidRequest for a bad
        key or a client that goes early, HTTPException 422 for a key that stands for another.
        """
        try:
            body = await request.body()
        except ClientDisconnect as error:
            raise InvalidRequest("the request ends early: the client has gone") from error
        self._prune()
        key, fingerprint = _key(request), _fingerprint(request, body)
        name = key or fingerprint
        attempt = self._keyed(name, fingerprint) if key else self._abandoned(name, request)
        if attempt is not None:
            async with self._waiting(attempt, request):
                return await asyncio.shield(attempt.outcome)
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        attempt = _Attempt(name, fingerprint, future, keyed=key is not None)
        self._attempts.setdefault(name, []).append(attempt)
        async with self._waiting(attempt, request):
            return await _settle(attempt, work(request))

    def _keyed(self, name: bytes, fingerprint: bytes) -> _Attempt | None:
        attempt = next(iter(self._attempts.get(name, ())), None)
        if attempt is not None and attempt.fingerprint != fingerprint:
            raise HTTPException(422, "the Idempotency-Key was used for another request")
        return attempt

    def _abandoned(self, name: bytes, request: Request) -> _Attempt | None:
        if request.headers.get(_ATTEMPT_HEADER, "0").strip() in ("", "0"):
            return None
        now = asyncio.get_running_loop().time()
        attempts = self._attempts.get(name, ())
        return next((a for a in attempts if not a.clients and not a.is_over(now)), None)

    @contextlib.asynccontextmanager
    async def _waiting(self, attempt: _Attempt, request: Request) -> AsyncIterator[None]:
        """Count a client that waits for the answer, and notice when it goes."""
        attempt.clients += 1
        watching = asyncio.create_task(_watch(attempt, request))
        try:
            yield
        finally:
            gone = watching.done()
            watching.cancel()
            attempt.clients -= not gone
            if attempt.outcome.done() and not attempt.clients:
                if attempt.succeeded if attempt.keyed else gone:
                    self._kept[attempt] = None
                else:
                    self._forget(attempt)
            await asyncio.gather(watching, return_exceptions=True)

    def _forget(self, attempt: _Attempt) -> None:
        self._kept.pop(attempt, None)
        attempts = self._attempts.get(attempt.name, [])
        if attempt in attempts:
            attempts.remove(attempt)
        if not attempts:
            self._attempts.pop(attempt.name, None)

    def _prune(self) -> None:
        """Forget what may not be asked for any more, then the oldest beyond the room there is."""
        now = asyncio.get_running_loop().time()
        for attempt in [one for one in self._kept if one.is_over(now)]:
            self._forget(attempt)
        room = KEPT_BYTES
        for attempt in reversed(list(self._kept)):
            room -= attempt.weight
            if room < 0:
                self._forget(attempt)


async def _settle(attempt: _Attempt, work: Awaitable[Response]) -> Response:
    """The answer of the work, told to all who wait for it."""
    try:
        response = await work
    except Exception as error:
        attempt.outcome.set_exception(error)
        raise
    except BaseException:  # cancelled: the server stops
        attempt.outcome.set_exception(HostFailure("the server stopped during the request"))
        raise
    else:
        attempt.outcome.set_result(response)
        return response
    finally:
        attempt.ended = asyncio.get_running_loop().time()
        attempt.outcome.exception()  # it is seen, also when nobody else waits


async def _watch(attempt: _Attempt, request: Request) -> None:
    """Note that the client has gone, when it has. Its request was received in full."""
    with contextlib.suppress(Exception):  # whatever it is, nobody is there to be answered
        while (await request.receive())["type"] != "http.disconnect":
            pass
    attempt.clients -= 1
    attempt.left = asyncio.get_running_loop().time()


def _key(request: Request) -> bytes | None:
    """What the client's key stands for: each token has keys of its own."""
    text = request.headers.get(_KEY_HEADER, "").strip()
    if not text:
        return None
    if len(text) > _LONGEST_KEY:
        raise InvalidRequest(f"the Idempotency-Key is longer than {_LONGEST_KEY} characters")
    return _digest(request.headers.get("authorization", ""), text)


def _fingerprint(request: Request, body: bytes) -> bytes:
    """Equal for equal requests of the same token."""
    scope = request.scope
    return _digest(
        request.headers.get("authorization", ""),
        request.method,
        scope["path"],
        bytes(scope.get("query_string", b"")),
        body,
    )


def _digest(*parts: str | bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()
