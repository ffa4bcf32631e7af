"""What is done inside a Running guest: commands, files, logs."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import stillframe.guest.files as guest_files
from stillframe.engine.context import Context
from stillframe.engine.interface import ExecRequest, ExecSession, ReadEntry
from stillframe.engine.machines import connect
from stillframe.guest.connection import AgentConnection
from stillframe.guest.exec import start_exec
from stillframe.host.watch import file_changes
from stillframe.model.errors import InvalidRequest, InvalidState, NotFound
from stillframe.model.states import InstanceState
from stillframe.model.values import PathInfo

LOG_SOURCES = ("app", "vmm", "hypeman")
_TAIL_BLOCK = 1 << 16
_MAX_LINE = 1 << 16


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
    return await connect(context, context.live_instance(instance), seconds)


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


async def logs(
    context: Context, instance_id: str, *, source: str, tail: int, follow: bool
) -> AsyncIterator[str]:
    """The last ``tail`` lines of a log and, with ``follow``, every later one until deletion.

    Raises InvalidRequest, NotFound (code ``log_not_found``).
    """
    if source not in LOG_SOURCES:
        raise InvalidRequest(f"log source must be one of {', '.join(LOG_SOURCES)}")
    context.instance(instance_id)
    path = context.data.instance(instance_id).log(source)
    if not path.exists():
        raise NotFound(f"no {source} log yet", code="log_not_found")
    lines, position = await asyncio.to_thread(_tail, path, tail)
    for line in lines:
        yield line
    if not follow:
        return
    async with file_changes(path) as changed:
        partial = b""
        while path.exists():
            changed.clear()
            block = await asyncio.to_thread(_read_from, path, position)
            position += len(block)
            *whole, partial = (partial + block).split(b"\n")
            for raw in whole:
                yield _text(raw)
            if len(partial) > _MAX_LINE:  # a guest may never end its line
                yield _text(partial)
                partial = b""
            if not block:
                await changed.wait()


def _tail(path: Path, count: int) -> tuple[list[str], int]:
    """The last ``count`` whole lines and the position behind them."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        start, data = end, b""
        while start > 0 and data.count(b"\n") <= count and len(data) < (64 << 20):
            step = min(_TAIL_BLOCK, start)
            start -= step
            file.seek(start)
            data = file.read(step) + data
    whole, _, rest = data.rpartition(b"\n")
    lines = deque(whole.split(b"\n") if whole else (), maxlen=count)
    return [_text(line) for line in lines], end - len(rest)


def _read_from(path: Path, position: int) -> bytes:
    with path.open("rb") as file:
        file.seek(position)
        return file.read(_TAIL_BLOCK)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\r").decode("utf-8", "replace")
