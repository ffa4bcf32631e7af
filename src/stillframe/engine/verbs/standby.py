"""Standby and restore of an instance: memory to disk, the VMM gone, and back again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from datetime import timedelta

from stillframe.engine.capture import capture
from stillframe.engine.context import Context, Phases, finish, remove
from stillframe.engine.keeping.compression import chosen, delay_of
from stillframe.engine.keeping.quota import check_free, expected_bytes
from stillframe.engine.loaded import check_stored, run_loaded, take_back
from stillframe.engine.machines import clear_remains, end
from stillframe.engine.telemetry import Operation
from stillframe.host.files import remove_tree, storage_errors
from stillframe.model.errors import InvalidState
from stillframe.model.states import InstanceState, Permission, Verb, permission
from stillframe.model.values import CompressionConfig, Instance
from stillframe.store.paths import InstancePaths
from stillframe.store.payloads import publish

log = logging.getLogger("stillframe.standby")


async def standby(
    context: Context,
    instance_id: str,
    *,
    compression: CompressionConfig | None = None,
    compression_delay: timedelta | None = None,
) -> Instance:
    """Capture memory and devices durably, then end the VMM. It runs on if anything fails.

    Its memory is compressed in the background, after the delay, as request, instance or server say.
    Raises InvalidRequest, NotFound, InvalidState, StorageFull, VmmFailure.
    """
    async with context.exclusive(instance_id, "standby") as instance:
        if permission(Verb.STANDBY, instance.state) is Permission.NOTHING:
            if compression is not None or compression_delay is not None:
                raise InvalidState("instance is in Standby already; options cannot be applied")
            return instance
        return await enter_standby(
            context, instance, compression=compression, compression_delay=compression_delay
        )


async def enter_standby(
    context: Context,
    instance: Instance,
    *,
    compression: CompressionConfig | None = None,
    compression_delay: timedelta | None = None,
) -> Instance:
    """Standby of a Running instance whose lock is held."""
    config, delay = chosen(context, instance, compression), delay_of(instance, compression_delay)
    paths = context.data.instance(instance.id)
    live = context.live_instance(instance)
    check_free(context, expected_bytes(context, instance, disk=False))
    phases = Phases()
    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(remove, paths.standby_new.directory)
        undo.push_async_callback(remove, paths.standby.directory)
        with storage_errors("make room for the standby image"):
            await remove(paths.standby.directory)  # one that could not be removed after a restore
            paths.standby_new.directory.mkdir(mode=0o700)
        await capture(context, instance, live, paths.standby_new, phases, stay_paused=True)
        undo.push_async_callback(live.machine.resume)
        with storage_errors("store the standby image"):
            await finish(asyncio.to_thread(publish, paths.standby_new, paths.standby))
        asleep = context.moved(
            instance, InstanceState.STANDBY, process=None, stopped_at=context.now(),
            timings_ms=phases.total(), standby_compression=config,
        )  # fmt: skip
        if config is not None and asleep.stopped_at is not None:
            asleep = replace(asleep, standby_compression_at=asleep.stopped_at + delay)
        live.ending = True
        undo.callback(setattr, live, "ending", False)
        context.commit(asleep, note="in standby")
        undo.pop_all()
    context.compressor.want_standby(asleep)
    context.telemetry.observe(Operation.STANDBY, phases.total())
    await finish(end(context, instance.id))
    clear_remains(paths)
    context.expanded.sweep()
    return asleep


async def restore(context: Context, instance_id: str) -> Instance:
    """Bring an instance in Standby back to Running. It stays in Standby if that fails.

    Only if its VMM is lost just when the guest is let run is it Stopped. Raises NotFound,
    InvalidState, DamagedData, NotSupported, VmmFailure, GuestFailure.
    """
    async with context.exclusive(instance_id, "restore") as instance:
        if permission(Verb.RESTORE, instance.state) is Permission.NOTHING:
            return instance
        paths = context.data.instance(instance_id)
        phases = Phases()
        await context.compressor.cancel(instance_id)
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: context.compressor.want_standby(context.instance(instance_id)))
            with phases.measure("check"):
                await check_stored(paths.standby)
            try:
                restored = await run_loaded(
                    context, instance, paths.standby, phases,
                    operation=Operation.RESTORE, note="restored",
                )  # fmt: skip
            except BaseException as error:
                await finish(take_back(context, instance, str(error) or "it was cancelled"))
                raise
            finally:
                if context.instance(instance_id).state is not InstanceState.STANDBY:
                    await finish(asyncio.to_thread(_give_up_image, paths))
            undo.pop_all()
        return restored


def _give_up_image(paths: InstancePaths) -> None:
    """Remove a standby image that the record no longer stands for."""
    try:
        remove_tree(paths.standby.directory)
    except OSError as error:  # it runs all the same; the next standby or start removes it
        log.warning("the standby image in %s cannot be removed: %s", paths.directory, error)
