"""QMP, QEMU's own protocol, by QEMU's own client (qemu.qmp), with its errors translated.

Two of that client's habits are mended here: it keeps every event for ever (we hand each to a
callback instead), and closing a connection that QEMU has already dropped raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message

from stillframe.model.errors import VmmFailure

Event = Mapping[str, Any]
_COMMAND_DEADLINE = 60.0  # seconds; a VMM that answers later hangs


class _Client(QMPClient):
    """A QMP client that hands events on instead of hoarding them."""

    def __init__(self, name: str, on_event: Callable[[Event], None]) -> None:
        super().__init__(name)
        self._on_event = on_event
        # Lost connections are reported by us, with their consequence.
        self.logger = logging.getLogger("stillframe.qmp")

    async def _event_dispatch(self, msg: Message) -> None:
        self._on_event(dict(msg))


class QmpConnection:
    """A conversation with one QEMU. All methods raise VmmFailure."""

    def __init__(self, name: str, on_event: Callable[[Event], None]) -> None:
        """``name`` is for messages; ``on_event`` is called with each event, on the loop."""
        self._name = name
        self._client = _Client(name, on_event)

    async def open(self, connection: socket.socket) -> None:
        """Take over a connected socket and negotiate; waits for QEMU to come up."""
        try:
            async with asyncio.timeout(_COMMAND_DEADLINE):
                await self._client.connect(connection)
        except (QMPError, OSError, EOFError, ValueError, TimeoutError) as error:
            raise VmmFailure(f"QEMU ({self._name}) does not answer: {error}") from error

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command and return its result. Concurrent calls are pipelined."""
        try:
            async with asyncio.timeout(_COMMAND_DEADLINE):
                return await self._client.execute(command, arguments or None)
        except ExecuteError as error:
            raise VmmFailure(
                f"QEMU refused {command}: {error}", command=command, refused=True
            ) from error
        except TimeoutError as error:
            raise VmmFailure(
                f"QEMU did not answer {command} within {_COMMAND_DEADLINE:.0f} s", command=command
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise VmmFailure(f"QEMU was lost during {command}: {error}", command=command) from error

    async def close(self) -> None:
        """End the conversation; QEMU runs on. Idempotent."""
        # ValueError is the client's word for a line beyond its limit of 10 MiB.
        with contextlib.suppress(QMPError, OSError, EOFError, ValueError):
            await self._client.disconnect()
