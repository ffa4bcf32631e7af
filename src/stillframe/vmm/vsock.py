"""The agent's byte stream where the VMM offers vsock by a Unix socket.

Firecracker and Cloud Hypervisor share the protocol (Firecracker's docs/vsock.md): the host writes
``CONNECT port`` and a newline, the VMM answers ``OK port`` once the guest has accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from stillframe.host.sockets import connect_unix
from stillframe.host.watch import file_changes
from stillframe.model.errors import HostFailure, VmmFailure
from stillframe.vmm.driver import AgentStream

AGENT_VSOCK_PORT = 2222  # agent/agent.c
GUEST_CID = 3  # the first that is free; every VM has its own namespace of them here
AGENT_ARGUMENT = "stillframe.agent=vsock"  # tells the agent to listen there
_ANSWER_DEADLINE = 5.0  # seconds
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_SILENCE = 0.02, 0.5, 5.0  # seconds


async def dial_vsock(
    socket: Path, port: int, *, deadline: float, console: Path | None = None
) -> AgentStream:
    """Connect to a port of the guest, which may still boot. Raises VmmFailure after ``deadline`` s.

    While nobody listens in the guest the VMM hangs up, and it cannot tell when somebody will. The
    agent says so on the guest's ``console`` (docs/agent-protocol.md), so that is waited for; for a
    guest that says nothing this asks again all the same, less and less often.
    """
    wait = _FIRST_WAIT
    loop = asyncio.get_running_loop()
    until = loop.time() + deadline
    async with contextlib.AsyncExitStack() as held:
        printed = asyncio.Event()
        if console is not None:
            with contextlib.suppress(OSError, HostFailure):  # not there yet: then without
                printed = await held.enter_async_context(file_changes(console))
        while True:
            printed.clear()
            stream = await _connect(socket, port)
            if stream is not None:
                return stream
            if loop.time() + wait > until:
                raise VmmFailure(f"nobody listens on vsock port {port} of the guest")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(printed.wait(), wait)
            wait = min(2 * wait, _LONGEST_WAIT if console is None else _LONGEST_SILENCE)


async def _connect(socket: Path, port: int) -> AgentStream | None:
    reader, writer = await connect_unix(socket)
    try:
        writer.write(f"CONNECT {port}\n".encode())
        await writer.drain()
        async with asyncio.timeout(_ANSWER_DEADLINE):
            answer = await reader.readline()
    except (OSError, TimeoutError):
        answer = b""
    except BaseException:
        writer.close()
        raise
    if answer.startswith(b"OK "):
        return reader, writer
    writer.close()
    return None
