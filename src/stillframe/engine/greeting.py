"""Making a loaded guest itself, and talking to its agent once it is.

A guest whose memory was loaded has the random numbers, clock and names of another moment or another
VM. ``LiveInstance.greeting`` gives it its own, and whoever wants its agent waits for that. One that
fails is begun anew for whoever comes next: a guest may be busy once. Only a fork is ended then.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import replace

from stillframe.engine.context import Context, LiveInstance
from stillframe.engine.machines import dial, end_because, machine_id
from stillframe.engine.space import LACKS_SPACE, until_it_goes_on
from stillframe.guest.connection import AgentConnection, silent
from stillframe.guest.identity import identify
from stillframe.model.errors import GuestFailure, NotFound
from stillframe.model.values import Instance

_NO_IDENTITY = "the guest could not be given an identity of its own"
_TRY_AGAIN = 1.0  # seconds until a guest that broke off is greeted anew for one who has time


async def connect(context: Context, instance: Instance, timeout: float) -> AgentConnection:
    """The connection to the agent of a guest that has its own identity (see ``loaded.let_run``).

    A guest that could not be given one, and is no fork, is greeted anew. Raises GuestFailure when
    all that takes more than ``timeout`` seconds, InvalidState without a VMM, VmmFailure.
    """
    live = context.live_instance(instance)
    if live.machine.lacks_space.is_set():
        raise GuestFailure(LACKS_SPACE, hint="free space in the data directory")
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout
    try:
        async with asyncio.timeout_at(until):
            await _itself(context, instance, live)
    except TimeoutError as error:
        raise silent(timeout) from error
    return await dial(live, max(0.0, until - loop.time()))


async def _itself(context: Context, instance: Instance, live: LiveInstance) -> None:
    """Return when the guest has its own identity. Raises GuestFailure when it will not get one."""
    ours: asyncio.Task[None] | None = None
    while (greeting := live.greeting) is not None:
        await asyncio.wait([greeting])
        error = _failure(greeting)
        if error is None and not live.sibling:
            return
        lost = greeting.cancelled() or live.ending or live.sibling or context.closing
        refused = isinstance(error, GuestFailure) and "errno" in error.facts
        if lost or (greeting is ours and refused):
            raise GuestFailure(
                f"the guest has no identity of its own: {error or 'it is being ended'}",
                hint="look at the instance's state and its app log; a fork is ended without one, "
                "any other guest is asked again by the next command",
            ) from error
        if greeting is ours:  # it broke off, or took its time, and we have more
            await asyncio.sleep(_TRY_AGAIN)
        if live.greeting is greeting:  # else another who waited was first
            ours = begin(context, instance, live)


def _failure(greeting: asyncio.Task[None]) -> BaseException | None:
    return None if greeting.cancelled() else greeting.exception()


def begin(context: Context, instance: Instance, live: LiveInstance) -> asyncio.Task[None]:
    """Begin to make the guest itself, in the background, and see to what comes of it."""
    work = greet(context, instance, live)
    live.greeting = context.spawn(work, name=f"identify {instance.id}")
    see_to(context, instance.id, live)
    return live.greeting


async def greet(context: Context, instance: Instance, live: LiveInstance) -> None:
    """Make the guest itself, and say so. Raises GuestFailure, unless it is being ended."""
    try:
        await identify_guest(context, instance, live)
    except GuestFailure:
        if not live.ending:  # else somebody has just stopped or deleted it
            raise
        return
    live.sibling = False
    with contextlib.suppress(OSError):  # then the next server asks it once more
        context.data.instance(instance.id).unidentified.unlink(missing_ok=True)


async def identify_guest(context: Context, instance: Instance, live: LiveInstance) -> None:
    """Give a restored or forked guest its own entropy, clock and names. Raises GuestFailure.

    One that is silent because it lacks space is asked again when it goes on.
    """
    while True:
        try:
            return await _identify_once(context, instance, live)
        except GuestFailure:
            if not live.machine.lacks_space.is_set():
                raise
        await until_it_goes_on(context, instance.id)


async def _identify_once(context: Context, instance: Instance, live: LiveInstance) -> None:
    patience = context.settings.agent_timeout
    connection = await dial(live, patience)
    async with connection.answering(patience):
        await identify(
            connection,
            seed=secrets.token_bytes(64),
            time_ns=time.time_ns,
            hostname=instance.name,
            machine_id=machine_id(instance.id),
            instance_id=instance.id,
        )


def see_to(context: Context, instance_id: str, live: LiveInstance) -> None:
    """In the background, draw the consequences of the greeting under way.

    A fork that got no identity is ended; of any other guest, which runs on, it is said in the
    record's ``state_error`` until a later greeting succeeds.
    """
    assert live.greeting is not None  # noqa: S101 - for the type checker
    context.spawn(_after(context, instance_id, live, live.greeting), name="after greeting")


async def _after(
    context: Context, instance_id: str, live: LiveInstance, greeting: asyncio.Task[None]
) -> None:
    await asyncio.wait([greeting])
    error = _failure(greeting)
    known = context.records.instances.get(instance_id)
    if context.closing or known is None or (error is None and not _is_noted(known)):
        return
    async with contextlib.AsyncExitStack() as held:
        try:
            instance = await held.enter_async_context(context.exclusive(instance_id, "identify"))
        except NotFound:
            return
        # A later greeting tells itself.
        if (
            live.greeting is not greeting
            or live.ending
            or context.live.get(instance_id) is not live
        ):
            return
        reason = f"{_NO_IDENTITY}: {error}"
        if error is None:
            if _is_noted(instance):
                context.witness(replace(instance, state_error=None), note="the guest is itself")
        elif live.sibling:
            await end_because(context, instance_id, reason)
        else:
            context.witness(replace(instance, state_error=reason), note=reason)


def _is_noted(instance: Instance) -> bool:
    return (instance.state_error or "").startswith(_NO_IDENTITY)
