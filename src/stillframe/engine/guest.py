"""What is done inside a Running guest: commands and files."""

from __future__ import annotations

from collections.abc import AsyncIterator

import stillframe.guest.files as guest_files
from stillframe.engine.context import Context
from stillframe.engine.greeting import connect
from stillframe.engine.interface import ExecRequest, ExecSession, ReadEntry
from stillframe.guest.connection import AgentConnection
from stillframe.guest.exec import start_exec
from stillframe.model.errors import InvalidRequest, InvalidState
from stillframe.model.states import InstanceState
from stillframe.model.values import PathInfo


async def connection_to(context: Context, instance_id: str, patience: float = 0) -> AgentConnection:
    """The agent of a Running instance. Raises NotFound, InvalidState, GuestFailure.

    ``patience`` is how many seconds a silent agent is given; 0 means the settings' limit.
    """
    instance = context.instance(instance_id)
    if instance.state is not InstanceState.RUNNING:
        raise InvalidState(
            f"instance must be running (current state: {instance.state.value})",
            state=instance.state.value,
        )
    seconds = patience or context.settings.agent_timeout
    return await connect(context, instance, seconds)


async def execute(context: Context, instance_id: str, request: ExecRequest) -> ExecSession:
    """Start a command in the guest. Raises what ``connection_to`` raises, GuestFailure."""
    connection = await connection_to(context, instance_id, request.wait_for_agent)
    return await start_exec(
        connection,
        command=request.command,
        tty=request.tty,
        # A fork may have another environment than the boot it descends from.
        env={**context.instance(instance_id).env, **(request.env or {})},
        cwd=request.cwd,
        timeout=request.timeout,
        rows=request.rows,
        cols=request.cols,
    )


async def stat(context: Context, instance_id: str, path: str, *, follow: bool) -> PathInfo:
    """What is at ``path`` in the guest."""
    connection = await connection_to(context, instance_id)
    async with connection.answering(context.settings.agent_timeout):
        return await guest_files.stat(connection, check_path(path), follow=follow)


async def write_path(
    context: Context,
    instance_id: str,
    path: str,
    data: AsyncIterator[bytes] | None,
    *,
    mode: int | None,
    uid: int | None,
    gid: int | None,
) -> int:
    """Write a file, or make a directory when ``data`` is None; bytes written."""
    connection = await connection_to(context, instance_id)
    return await guest_files.write_path(
        connection,
        check_path(path),
        data,
        mode=mode,
        uid=uid,
        gid=gid,
        patience=context.settings.agent_timeout,
    )


async def read_path(
    context: Context, instance_id: str, path: str, *, follow: bool
) -> AsyncIterator[ReadEntry]:
    """A file or tree out of the guest, depth first."""
    connection = await connection_to(context, instance_id)
    async for entry in guest_files.read_path(connection, check_path(path), follow=follow):
        yield ReadEntry(
            path=entry.path,
            mode=entry.mode,
            kind=entry.kind,
            link_target=entry.link_target,
            size=entry.size,
            mtime=entry.mtime,
            uid=entry.uid,
            gid=entry.gid,
            data=entry.data,
        )


def check_path(path: str) -> str:
    """Return a path for the guest if it is absolute and sane; else raise InvalidRequest."""
    if not path.startswith("/") or "\0" in path or len(path.encode(errors="replace")) > 4095:
        raise InvalidRequest("path must be absolute, without NUL, at most 4095 bytes")
    return path
