"""HTTP over a Unix socket, which is how Firecracker and Cloud Hypervisor are controlled."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from stillframe.host.sockets import open_socket
from stillframe.model.errors import StorageFull, VmmFailure
from stillframe.model.units import MIB

_DEADLINE = 60.0  # seconds; a VMM that answers later hangs
_MAX_ANSWER = 16 * MIB  # bytes; they tell of one VM
_NO_SPACE = ("(os error 28)", "(os error 122)")  # how Rust prints ENOSPC and EDQUOT
_MESSAGE_FIELDS = ("fault_message", "error", "message")


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a VMM: ``body`` becomes JSON, None is no body."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None


class UnixHttp:
    """A conversation with the VMM that listens at ``socket``. All methods raise VmmFailure."""

    def __init__(self, socket: Path, name: str) -> None:
        """``name`` is the VMM's, for messages. Nothing is connected before the first request."""
        self._name, self._socket = name, socket
        self._client: httpx2.AsyncClient | None = None
        self._fd = -1
        self._ended = False

    def _opened(self) -> httpx2.AsyncClient:
        if self._ended:
            raise VmmFailure(f"the conversation with {self._name} has ended")
        if self._client is None:
            try:
                self._fd = open_socket(self._socket)
            except OSError as error:
                raise VmmFailure(f"{self._name} is gone: {error.strerror}") from error
            # Without verify=False a TLS context is made, which takes longer than all the rest.
            transport = httpx2.AsyncHTTPTransport(uds=f"/proc/self/fd/{self._fd}", verify=False)
            self._client = httpx2.AsyncClient(
                transport=transport, base_url="http://localhost", trust_env=False
            )
        return self._client

    async def call(self, call: Call, *, deadline: float = _DEADLINE) -> Any:
        """Send a request; the answer's JSON, or None where there is none.

        ``deadline`` is in seconds, for the whole answer. Raises StorageFull too.
        """
        what = f"{call.method} {call.path}"
        try:
            async with asyncio.timeout(deadline):
                status, answer = await self._exchange(call, what)
        except TimeoutError as error:
            raise VmmFailure(
                f"{self._name} did not answer {what} within {deadline:.0f} s", command=what
            ) from error
        except httpx2.TransportError as error:
            raise VmmFailure(
                f"{self._name} was lost during {what}: {error or type(error).__name__}",
                command=what,
            ) from error
        if 200 <= status < 300:
            return _parsed(answer, f"{self._name} answered {what}") if answer else None
        reason = _reason(status, answer)
        if any(words in reason for words in _NO_SPACE):
            raise StorageFull(f"no space for what {self._name} writes: {reason}")
        raise VmmFailure(
            f"{self._name} refused {what}: {reason}",
            command=what, refused=True, status=status,
        )  # fmt: skip

    async def _exchange(self, call: Call, what: str) -> tuple[int, bytes]:
        """Status and body of the answer. Raises VmmFailure for a body too long to be one."""
        content = None if call.body is None else json.dumps(call.body).encode()
        headers = {"Content-Type": "application/json"} if content else {}
        body = bytearray()
        async with self._opened().stream(
            call.method, call.path, content=content, headers=headers, timeout=None
        ) as response:
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > _MAX_ANSWER:
                    raise VmmFailure(
                        f"{self._name} answered {what} with more than {_MAX_ANSWER} bytes",
                        command=what,
                    )
            return response.status_code, bytes(body)

    async def close(self) -> None:
        """End the conversation; the VMM runs on."""
        client, self._client, self._ended = self._client, None, True
        if client is not None:
            await client.aclose()
            os.close(self._fd)


def _parsed(answer: bytes, what: str) -> Any:
    """The JSON of an answer. Raises VmmFailure."""
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise VmmFailure(f"{what} with what is no JSON") from error


def _reason(status: int, answer: bytes) -> str:
    """Why a VMM refuses, in its own words: a JSON field, a list of causes, or text."""
    try:
        told = json.loads(answer)
    except (ValueError, RecursionError):
        return answer.decode(errors="replace").strip() or f"HTTP {status}"
    if isinstance(told, list):
        return ": ".join(map(str, told))
    if isinstance(told, Mapping):
        for field in _MESSAGE_FIELDS:
            if field in told:
                return str(told[field])
    return str(told)
