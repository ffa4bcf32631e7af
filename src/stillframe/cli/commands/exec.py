"""``stillframe exec``: run a command in a guest over the contract's WebSocket."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillframe.cli.client import (
    Client,
    broken_stream,
    guest_command,
    instance_path,
    parse_pairs,
)

if TYPE_CHECKING:
    from types import FrameType

    from websockets.sync.client import ClientConnection

_CHUNK = 32 * 1024
# Stillframe's own addition to the contract, which has no end of file.
_END_OF_STDIN = b""


def exec_(
    context: typer.Context,
    instance: Annotated[str, typer.Argument(help="Name, id or unique id prefix.")],
    command: Annotated[list[str] | None, typer.Argument(help="Default: /bin/sh.")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Send stdin, up to its end.")
    ] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE")] = None,
    cwd: Annotated[str | None, typer.Option("--cwd", "-w")] = None,
    timeout: Annotated[int | None, typer.Option("--timeout", min=1, help="Seconds.")] = None,
    wait: Annotated[int, typer.Option("--wait", min=0, help="Seconds to wait for the agent.")] = 10,
) -> None:
    """Run a command in an instance; exits with its exit code."""
    client: Client = context.obj
    request: dict[str, Any] = {
        "command": guest_command(command) or ["/bin/sh"],
        "tty": tty,
        "wait_for_agent": wait,
    }
    if variables := parse_pairs(env, "--env"):
        request["env"] = variables
    if cwd:
        request["cwd"] = cwd
    if timeout:
        request["timeout"] = timeout
    if tty:
        size = shutil.get_terminal_size()
        request |= {"rows": size.lines, "cols": size.columns}
    with client.websocket(instance_path(instance, "exec")) as connection:
        connection.send(json.dumps(request))
        with contextlib.ExitStack() as stack:
            if tty and sys.stdin.isatty():
                stack.enter_context(_raw_terminal())
            if interactive or tty:
                stack.enter_context(_input(connection, tty=tty, read_stdin=interactive))
            else:
                _end_input(connection)
            code = _print_output(connection)
    raise typer.Exit(code)


def run_command(client: Client, instance: str, command: list[str]) -> tuple[int, bytes]:
    """Run a command without input; its exit code and its merged output."""
    output = bytearray()
    with client.websocket(instance_path(instance, "exec")) as connection:
        connection.send(json.dumps({"command": command, "tty": False, "wait_for_agent": 30}))
        _end_input(connection)
        code = _receive(connection, output.extend)
    return code, bytes(output)


def _end_input(connection: ClientConnection) -> None:
    from websockets.exceptions import ConnectionClosed

    # A command that could not be started is over by now; what was said of it is still to be read.
    with contextlib.suppress(ConnectionClosed):
        connection.send(_END_OF_STDIN)


def _print_output(connection: ClientConnection) -> int:
    def write(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    return _receive(connection, write)


def _receive(connection: ClientConnection, write: Any) -> int:
    from websockets.exceptions import ConnectionClosed

    try:
        for frame in connection:
            if isinstance(frame, bytes):
                write(frame)
                continue
            message = json.loads(frame)
            if "exitCode" in message:
                return int(message["exitCode"])
            raise broken_stream(str(message.get("error", "an unknown message came")))
    except ConnectionClosed as error:
        told = error.rcvd.reason if error.rcvd is not None else ""
        raise broken_stream(told or str(error)) from error
    except ValueError as error:
        raise broken_stream("a malformed message came") from error
    raise broken_stream("it was closed before the exit code")


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _input(connection: ClientConnection, *, tty: bool, read_stdin: bool) -> Iterator[None]:
    """Forward stdin and window changes from a thread while the context lasts.

    A pipe wakes the thread: the signal handler must not send itself, because the main thread may
    hold the connection's lock at that moment.
    """
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)

    def window_changed(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(wake_write, b"w")

    before = signal.signal(signal.SIGWINCH, window_changed) if tty else None
    thread = threading.Thread(
        target=_forward, args=(connection, wake_read, read_stdin), name="stdin", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        if tty:
            signal.signal(signal.SIGWINCH, before)
        with contextlib.suppress(BlockingIOError):
            os.write(wake_write, b"q")
        thread.join(timeout=2)
        os.close(wake_write)


def _forward(connection: ClientConnection, wake: int, read_stdin: bool) -> None:
    from websockets.exceptions import ConnectionClosed

    sources = [wake, sys.stdin.fileno()] if read_stdin else [wake]
    try:
        while True:
            ready, _, _ = select.select(sources, [], [])
            if wake in ready:
                word = os.read(wake, 64)
                if b"q" in word:
                    return
                size = os.get_terminal_size(sys.stdout.fileno())
                resize = {"resize": {"rows": size.lines, "cols": size.columns}}
                connection.send(json.dumps(resize))
            elif data := os.read(sources[1], _CHUNK):
                connection.send(data)
            else:
                connection.send(_END_OF_STDIN)
                sources = [wake]
    except (ConnectionClosed, OSError):
        return
    finally:
        os.close(wake)
