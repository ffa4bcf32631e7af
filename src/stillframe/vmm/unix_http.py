"""HTTP over a Unix socket, which is how Firecracker and Cloud Hypervisor are controlled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from stillframe.model.errors import StorageFull, VmmFailure

_DEADLINE = 60.0  # seconds; a VMM that answers later hangs
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
        self._name = name
        try:
            # sun_path holds 108 bytes (unix(7)): the directory's descriptor makes any path short.
            self._directory = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise VmmFailure(f"{name} is gone: {error.strerror}") from error
        self._client = httpx2.AsyncClient(
            # Without verify=False a TLS context is made, which takes longer than all the rest.
            transport=httpx2.AsyncHTTPTransport(
                uds=f"/proc/self/fd/{self._directory}/{socket.name}", verify=False
            ),
            base_url="http://localhost",
            trust_env=False,
        )

    async def call(self, call: Call, *, deadline: float = _DEADLINE) -> Any:
        """Send a request; the answer's JSON, or None where there is none.

        ``deadline`` is in seconds. Raises StorageFull too.
        """
        if self._directory < 0:
            raise VmmFailure(f"the conversation with {self._name} has ended")
        what = f"{call.method} {call.path}"
        content = None if call.body is None else json.dumps(call.body).encode()
        headers = {"Content-Type": "application/json"} if content else {}
        try:
            response = await self._client.request(
                call.method, call.path, content=content, headers=headers, timeout=deadline
            )
        except httpx2.TimeoutException as error:
            raise VmmFailure(
                f"{self._name} did not answer {what} within {deadline:.0f} s", command=what
            ) from error
        except httpx2.TransportError as error:
            raise VmmFailure(
                f"{self._name} was lost during {what}: {error or type(error).__name__}",
                command=what,
            ) from error
        if response.is_success:
            return response.json() if response.content else None
        reason = _reason(response)
        if any(words in reason for words in _NO_SPACE):
            raise StorageFull(f"no space for what {self._name} writes: {reason}")
        raise VmmFailure(
            f"{self._name} refused {what}: {reason}",
            command=what, refused=True, status=response.status_code,
        )  # fmt: skip

    async def close(self) -> None:
        """End the conversation; the VMM runs on."""
        directory, self._directory = self._directory, -1
        if directory >= 0:
            await self._client.aclose()
            os.close(directory)


def _reason(response: httpx2.Response) -> str:
    """Why a VMM refuses, in its own words: a JSON field, a list of causes, or text."""
    try:
        told = response.json()
    except ValueError:
        return response.text.strip() or f"HTTP {response.status_code}"
    if isinstance(told, list):
        return ": ".join(map(str, told))
    if isinstance(told, Mapping):
        for field in _MESSAGE_FIELDS:
            if field in told:
                return str(told[field])
    return str(told)
