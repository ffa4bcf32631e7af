"""Conversations with VMMs over their API socket: recorded from real ones, played back to drivers.

A conversation is a list of ``{"request": {method, path, body}, "answer": {status, body}}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.vmm.unix_http import Call, UnixHttp

DIRECTORY = Path(__file__).resolve().parent / "conversations"
Exchange = dict[str, dict[str, Any]]


def recorded(vmm: str, name: str) -> list[Exchange]:
    """The conversation ``name`` with the real ``vmm`` (name and version)."""
    conversations: dict[str, list[Exchange]] = json.loads((DIRECTORY / f"{vmm}.json").read_text())
    return conversations[name]


@contextlib.contextmanager
def recording() -> Iterator[list[Exchange]]:
    """A list into which go all requests that drivers make meanwhile, with their answers."""
    heard: list[Exchange] = []
    patch = pytest.MonkeyPatch()
    plain = UnixHttp._exchange

    async def exchange(http: UnixHttp, call: Call, what: str) -> tuple[int, bytes]:
        status, answer = await plain(http, call, what)
        heard.append(
            {
                "request": {"method": call.method, "path": call.path, "body": call.body},
                "answer": {"status": status, "body": json.loads(answer) if answer else None},
            }
        )
        return status, answer

    patch.setattr(UnixHttp, "_exchange", exchange)
    try:
        yield heard
    finally:
        patch.undo()


class Player:
    """A VMM's socket that answers as the real one did, as long as it is asked the same.

    ``before`` is called with each request before it is answered, to do what the VMM would do.
    ``left`` are the exchanges that did not come; an unexpected request is answered with 500.
    """

    def __init__(
        self, conversation: list[Exchange], before: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.left = list(conversation)
        self._before = before

    @contextlib.asynccontextmanager
    async def listening(self, socket: Path) -> AsyncIterator[None]:
        """Listen at ``socket``."""
        server = await asyncio.start_unix_server(self._serve, socket)
        try:
            yield
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                line, *headers = head.split("\r\n")
                fields = dict(header.lower().split(": ", 1) for header in headers if header)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                method, path, _ = line.split(" ")
                said = {"method": method, "path": path, "body": json.loads(body) if body else None}
                writer.write(self._answer(said))
                await writer.drain()

    def _answer(self, said: dict[str, Any]) -> bytes:
        if self.left and self.left[0]["request"] == said:
            answer = self.left.pop(0)["answer"]
            if self._before is not None:
                self._before(said)
        else:
            expected = self.left[0]["request"] if self.left else "nothing"
            words = f"expected {expected}, not {said}"
            answer = {"status": 500, "body": {"fault_message": words}}
        body = b"" if answer["body"] is None else json.dumps(answer["body"]).encode()
        return b"HTTP/1.1 %d .\r\nContent-Length: %d\r\n\r\n%s" % (
            answer["status"], len(body), body,
        )  # fmt: skip
