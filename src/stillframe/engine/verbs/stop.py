"""Stop and delete: the end of a VMM, and of an instance."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from stillframe.engine.context import Context, LiveInstance, finish
from stillframe.engine.machines import clear_remains, dial, end, ending, exit_of
from stillframe.guest.identity import shutdown
from stillframe.host.files import remove_tree, storage_errors
from stillframe.model.errors import HostFailure, StillframeError
from stillframe.model.states import InstanceState, Permission, Verb, permission
from stillframe.model.values import Instance
from stillframe.store.records import Intent

_STOP_GRACE = 5.0  # seconds, as in the contract
_DELETE_GRACE = 2.0
_POWER_BUTTON_GRACE = 0.5


async def stop(context: Context, instance_id: str) -> Instance:
    """Shut the guest down by its agent, else end the VMM; the disks stay.

    Raises NotFound, InvalidState, VmmFailure.
    """
    async with context.exclusive(instance_id, "stop") as instance:
        if permission(Verb.STOP, instance.state) is Permission.NOTHING:
            return instance
        await shut_down(context, instance, _STOP_GRACE)
        code, message = exit_of(context, instance)
        stopped = context.moved(
            instance, InstanceState.STOPPED, process=None, stopped_at=context.now(),
            exit_code=code, exit_message=message,
        )  # fmt: skip
        context.witness(stopped, note="stopped")
        clear_remains(context.data.instance(instance_id))
        context.expanded.sweep()
        return stopped


async def shut_down(context: Context, instance: Instance, grace: float) -> None:
    """End the VMM of ``instance``, politely for ``grace`` seconds if the guest listens."""
    live = context.live.get(instance.id)
    if live is None:
        return
    running = instance.state is InstanceState.RUNNING
    with ending(live):
        if running or instance.state is InstanceState.INITIALIZING:
            grace = grace if running else _POWER_BUTTON_GRACE
            with contextlib.suppress(StillframeError, TimeoutError):
                async with asyncio.timeout(grace + 1):
                    await _ask_to_end(live, grace, agent=running)
        await end(context, instance.id)


async def _ask_to_end(live: LiveInstance, grace: float, *, agent: bool) -> None:
    """Have the guest shut itself down, by its agent or the power button; return when it is gone.

    Nothing says that it ever will, nor that it answers. Raises GuestFailure, VmmFailure.
    """
    gone = asyncio.ensure_future(live.machine.wait_exit())
    asked = asyncio.ensure_future(_by_agent(live, grace) if agent else live.machine.power_button())
    try:
        # The VMM may go before the answer comes.
        await asyncio.wait([gone, asked], return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            asked.result()
            await gone
    finally:
        gone.cancel()
        asked.cancel()
        await asyncio.gather(gone, asked, return_exceptions=True)


async def _by_agent(live: LiveInstance, grace: float) -> None:
    connection = await dial(live, grace)
    await shutdown(connection, grace_ms=int(grace * 1000))


async def delete(
    context: Context,
    instance_id: str,
    *,
    graceful: bool = True,
    only_if: Callable[[Instance], bool] = lambda _: True,
) -> None:
    """End the instance and remove all of it; snapshots stay.

    One that is still being made is called off, which leaves nothing of it either. ``only_if`` is
    asked when nobody else is at work on the instance: without it nothing is done.
    Raises NotFound; VmmFailure when its process cannot be ended (then nothing was removed);
    HostFailure when its files cannot (then it is Stopped; the next try or start removes it).
    """
    known = context.records.instances.get(instance_id)
    if known is not None and only_if(known) and await context.call_off(instance_id):
        return
    async with context.exclusive(instance_id, "delete") as instance:
        if not only_if(instance):
            return
        await context.compressor.cancel(instance_id)
        with contextlib.ExitStack() as undo:
            if instance_id not in context.records.intents:
                context.records.intend(Intent(instance_id, "delete", {}))
                undo.callback(context.records.fulfil, instance_id)
            if graceful and instance.state in (InstanceState.RUNNING, InstanceState.INITIALIZING):
                await shut_down(context, instance, _DELETE_GRACE)
            await end(context, instance_id)
            undo.pop_all()
        await finish(_remove(context, instance))


async def _remove(context: Context, instance: Instance) -> None:
    """Remove the files, then the record, of an instance without a VMM."""
    data = context.data
    try:
        with storage_errors("remove the files of the instance"):
            # What is left of a restore in place is in a directory beside.
            for paths in (data.instance_staged(instance.id), data.instance(instance.id)):
                await asyncio.to_thread(remove_tree, paths.directory)
    except HostFailure:  # the intent stays: what is left goes with the next try or start
        reason = "it could not be deleted completely; delete it again"
        stopped = context.moved(instance, InstanceState.STOPPED, process=None, state_error=reason)
        context.witness(stopped, note=reason)
        raise
    context.forget(instance.id)
    context.space_freed()
