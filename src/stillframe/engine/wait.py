"""Waiting for a state, by the engine's own news of changes."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from stillframe.engine.context import Context
from stillframe.engine.interface import WaitResult
from stillframe.model.errors import InvalidRequest, Timeout, VmmFailure
from stillframe.model.states import InstanceState
from stillframe.model.values import Instance

_RESTING = (InstanceState.STOPPED, InstanceState.STANDBY)


def _settled(state: InstanceState, target: InstanceState) -> bool:
    """Whether waiting on is pointless: reached, or a state no guest leaves by itself."""
    return state in (target, InstanceState.UNKNOWN) or state in _RESTING


async def wait(
    context: Context, instance_id: str, *, state: InstanceState, timeout: timedelta
) -> WaitResult:
    """Wait until the instance reaches ``state`` or settles elsewhere.

    Raises InvalidRequest for the target Unknown, NotFound when the instance goes meanwhile.
    """
    if state is InstanceState.UNKNOWN:
        raise InvalidRequest("cannot wait for Unknown", code="invalid_state")
    context.instance(instance_id)
    try:
        async with asyncio.timeout(timeout.total_seconds()):
            with context.listening(instance_id) as changed:
                while not _settled(context.instance(instance_id).state, state):
                    await changed.wait()
                    changed.clear()
    except TimeoutError:
        pass
    instance = context.instance(instance_id)
    timed_out = not _settled(instance.state, state)
    return WaitResult(instance.state, timed_out, instance.state_error)


async def reached(
    context: Context, instance_id: str, state: InstanceState, seconds: float
) -> Instance:
    """The record once it is in ``state``. Raises Timeout, or VmmFailure if it settled elsewhere."""
    result = await wait(context, instance_id, state=state, timeout=timedelta(seconds=seconds))
    if result.timed_out:
        raise Timeout(f"the guest did not become {state.value} within {seconds:.0f} s")
    if result.state is not state:
        raise VmmFailure(f"the guest is {result.state.value} instead of {state.value}")
    return context.instance(instance_id)
