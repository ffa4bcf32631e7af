"""HTTP over a Unix socket, which is how Firecracker and Cloud Hypervisor are controlled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from stillframe.model.errors import VmmFailure

_DEADLINE = 60.0  # seconds; a VMM that answers later hangs
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
        """``name`` is the VMM's, for messages."""
        self._name = name
        self._client = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(uds=str(socket)),
            base_url="http://localhost",
            timeout=_DEADLINE,
            trust_env=False,
        )

    async def call(self, call: Call) -> Any:
        """Send a request; the answer's JSON, or None where there is none."""
        what = f"{call.method} {call.path}"
        content = None if call.body is None else json.dumps(call.body).encode()
        headers = {"Content-Type": "application/json"} if content else {}
        try:
            response = await self._client.request(
                call.method, call.path, content=content, headers=headers
            )
        except httpx2.TimeoutException as error:
            raise VmmFailure(
                f"{self._name} did not answer {what} within {_DEADLINE:.0f} s", command=what
            ) from error
        except httpx2.TransportError as error:
            raise VmmFailure(
                f"{self._name} was lost during {what}: {error}", command=what
            ) from error
        if response.is_success:
            return response.json() if response.content else None
        raise VmmFailure(
            f"{self._name} refused {what}: {_reason(response)}",
            command=what, refused=True, status=response.status_code,
        )  # fmt: skip

    async def close(self) -> None:
        """End the conversation; the VMM runs on."""
        await self._client.aclose()


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
