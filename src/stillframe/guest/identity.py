"""Making a forked or restored guest one of its own, and shutting a guest down."""

from __future__ import annotations

from collections.abc import Callable

from stillframe.guest import wire
from stillframe.guest.connection import AgentConnection, AgentHello, parse_hello
from stillframe.guest.wire import FrameType


async def _call(
    connection: AgentConnection, kind: FrameType, pairs: Callable[[], list[tuple[str, str]]]
) -> bytes:
    channel = connection.open_channel()
    try:
        await channel.send(kind, wire.text_list(pairs()))
        return (await channel.expect(FrameType.OK)).payload
    finally:
        await channel.close()


async def identify(
    connection: AgentConnection,
    *,
    seed: bytes,
    time_ns: Callable[[], int],
    hostname: str,
    machine_id: str,
    instance_id: str,
) -> AgentHello:
    """Give the guest fresh entropy (``seed``: 32 to 64 bytes), the time, and its names.

    ``time_ns`` (CLOCK_REALTIME) is read as late as possible; ``machine_id`` is 32 hex digits or
    empty. Returns the guest's state. Raises GuestFailure: until it succeeds, the guest's random
    numbers equal its siblings'.
    """

    def pairs() -> list[tuple[str, str]]:
        return [
            ("seed", seed.hex()),
            ("hostname", hostname),
            ("machine_id", machine_id),
            ("instance_id", instance_id),
            ("time_ns", str(time_ns())),
        ]

    return parse_hello(await _call(connection, FrameType.IDENTIFY, pairs))


async def shutdown(connection: AgentConnection, grace_ms: int) -> None:
    """Have the workload terminated (killed after ``grace_ms``) and the guest powered off.

    Returns when the guest has accepted, not when it is off. Raises GuestFailure.
    """
    await _call(connection, FrameType.SHUTDOWN, lambda: [("grace_ms", str(grace_ms))])
