"""Guests that were stopped because the host had no space for what they wrote, and go on later.

A guest's disk is sparse, so it can find the file system full. QEMU then has the guest stand still
instead of failing its write (the default of ``werror``), and repeats the write when told to go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace

from stillframe.engine.context import Context, LiveInstance
from stillframe.model.errors import NotFound, VmmFailure

log = logging.getLogger("stillframe.space")
LACKS_SPACE = "the guest stands still: there is no space for what it writes; it goes on by itself"
# Others than us free space too, so it is tried again after so many seconds.
_INTERVAL = 10.0
_SETTLED = 1.0  # seconds in which a write that is repeated fails if it does


async def look_after(context: Context, instance_id: str, live: LiveInstance) -> None:
    """Say so while the guest of ``live`` is stopped for want of space, and have it go on.

    Ends with the instance. What is said is its ``state_error``, which may be from an earlier
    server. A guest that stands still for a capture is left to that: the instance's lock says so.
    """
    lacks_space = live.machine.lacks_space
    while (instance := context.records.instances.get(instance_id)) is not None:
        if instance.state_error != LACKS_SPACE:
            await lacks_space.wait()
            instance = context.records.instances.get(instance_id)
            if instance is not None:
                said = replace(instance, state_error=LACKS_SPACE)
                context.witness(said, note=LACKS_SPACE)
        elif lacks_space.is_set():
            await context.space_freed_within(_INTERVAL)
            await _go_on(context, instance_id, live)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SETTLED):
                    await lacks_space.wait()
            await _unsay(context, instance_id, live)


async def until_it_goes_on(context: Context, instance_id: str) -> None:
    """Return when it is not said of the instance that it lacks space, or it is gone."""
    with context.listening(instance_id) as changed:
        while (instance := context.records.instances.get(instance_id)) is not None:
            if instance.state_error != LACKS_SPACE:
                return
            await changed.wait()
            changed.clear()


async def _go_on(context: Context, instance_id: str, live: LiveInstance) -> None:
    with contextlib.suppress(NotFound):
        async with context.exclusive(instance_id, "going on"):
            if live.machine.lacks_space.is_set() and not live.ending:
                try:
                    await live.machine.resume()
                except VmmFailure as error:
                    log.warning("%s cannot go on: %s", instance_id, error)


async def _unsay(context: Context, instance_id: str, live: LiveInstance) -> None:
    with contextlib.suppress(NotFound):
        async with context.exclusive(instance_id, "going on") as instance:
            if instance.state_error == LACKS_SPACE and not live.machine.lacks_space.is_set():
                runs = replace(instance, state_error=None)
                context.witness(runs, note="there is space again: the guest goes on")
