"""Running a command in the guest: the ExecSession of the engine's interface."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Mapping, Sequence

from stillframe.guest import wire
from stillframe.guest.connection import AGENT_SAYS, AgentConnection, Channel
from stillframe.guest.wire import Frame, FrameType
from stillframe.model.errors import GuestFailure

_OUTPUT = {FrameType.STDOUT: 1, FrameType.STDERR: 2}


async def start_exec(
    connection: AgentConnection,
    command: Sequence[str],
    *,
    tty: bool = False,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    timeout: float | None = None,
    rows: int | None = None,
    cols: int | None = None,
) -> GuestExec:
    """Send a command to the guest; ``timeout`` in seconds (None or 0: no limit).

    Whether it could be started shows in ``output`` and ``wait``, which raise GuestFailure with
    code ``exec_failed`` and the fact ``errno`` if not. Raises GuestFailure when the request is
    too large or the agent is lost.
    """
    pairs = [("arg", part) for part in command]
    pairs += [("env", f"{key}={value}") for key, value in (env or {}).items()]
    optional = {"cwd": cwd, "user": user, "rows": rows, "cols": cols, "timeout": timeout}
    pairs += [(key, str(value)) for key, value in optional.items() if value]
    pairs.append(("tty", "1" if tty else "0"))
    try:
        payload = wire.text_list(pairs)
    except ValueError as error:
        raise GuestFailure(
            f"cannot run the command: {error}", code="exec_failed", errno="EINVAL"
        ) from error
    channel = connection.open_channel()
    try:
        await channel.send(FrameType.EXEC, payload)
    except BaseException:
        connection.forget(channel)
        raise
    doing = {
        "exec": f"run {command[0] if command else 'nothing'}",
        "cwd": f"enter {cwd or 'the working directory'}",
        "user": f"run as {user or 'the image says'}",
    }
    return GuestExec(channel, doing)


class GuestExec:
    """A command running in the guest. Use one reader: ``output`` to its end, or ``wait`` alone."""

    def __init__(self, channel: Channel, doing: Mapping[str, str]) -> None:
        """``doing`` says in words what the agent does at each stage of a start."""
        self._channel, self._doing = channel, doing
        self._exit_code: int | None = None

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield ``(1, stdout)`` and ``(2, stderr)`` until the command has ended.

        Raises GuestFailure: code ``exec_failed`` if it could not be started, or the agent is lost.
        """
        while self._exit_code is None:
            frame = await self._next()
            stream = _OUTPUT.get(FrameType(frame.type))
            if stream is not None:
                yield stream, frame.payload
            elif frame.type == FrameType.EXIT and len(frame.payload) == 4:
                (self._exit_code,) = struct.unpack("<i", frame.payload)

    async def write_stdin(self, data: bytes) -> None:
        """Send bytes to stdin, waiting for credit; empty bytes are end of file.

        Bytes for a command that has ended are dropped. Raises GuestFailure when the agent is lost.
        """
        if data:
            await self._channel.send_data(FrameType.STDIN, data)
        else:
            await self._channel.send(FrameType.STDIN)

    async def resize(self, rows: int, cols: int) -> None:
        """Set the terminal size; values are clamped to 0-65535."""
        size = struct.pack("<HH", min(max(rows, 0), 65535), min(max(cols, 0), 65535))
        await self._channel.send(FrameType.RESIZE, size)

    async def signal(self, number: int) -> None:
        """Send signal ``number`` (1-64) to the command's process group."""
        await self._channel.send(FrameType.SIGNAL, struct.pack("<I", number))

    async def wait(self) -> int:
        """Exit code, discarding output not yet consumed (124 on timeout, 128+N on signal N)."""
        async for _ in self.output():
            pass
        assert self._exit_code is not None  # noqa: S101 - output() ends in no other way
        return self._exit_code

    async def close(self) -> None:
        """Hang up: the command gets SIGHUP if it still runs. Idempotent."""
        await self._channel.close()

    async def _next(self) -> Frame:
        allowed = (FrameType.STDOUT, FrameType.STDERR, FrameType.EXIT)
        try:
            return await self._channel.expect(*allowed)
        except GuestFailure as error:
            if "errno" not in error.facts:
                raise
            raise GuestFailure(
                self._told(error.message), code="exec_failed", errno=error.facts["errno"]
            ) from error

    def _told(self, message: str) -> str:
        """The agent's message with what it is about; the agent names the stage and the reason."""
        stage, _, reason = message.removeprefix(AGENT_SAYS).partition(": ")
        doing = self._doing.get(stage)
        return message if doing is None else f"cannot {doing}: {reason}"
