"""Running captured memory: map it, load the devices, commit, let the guest run, make it itself."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from stillframe.engine import greeting
from stillframe.engine.context import Context, LiveInstance, Phases, finish
from stillframe.engine.keeping.expanded import link_in_place
from stillframe.engine.machines import (
    attach,
    check_loadable,
    clear_remains,
    end,
    end_because,
    load,
)
from stillframe.engine.telemetry import Operation
from stillframe.host.files import storage_errors
from stillframe.model.errors import StillframeError, VmmFailure
from stillframe.model.states import InstanceState
from stillframe.model.values import Instance
from stillframe.store.paths import Payload
from stillframe.store.payloads import check
from stillframe.vmm.driver import Machine, MachineStatus

_FORKS = (Operation.FORK, Operation.WARM_FORK, Operation.FORK_INSTANCE)


async def check_stored(payload: Payload) -> None:
    """What must be right before a load, see ``payloads.check``. Raises DamagedData, HostFailure."""
    with storage_errors("read what is stored"):
        await asyncio.to_thread(check, payload)


async def load_paused(
    context: Context,
    instance: Instance,
    source: Payload,
    phases: Phases,
    undo: contextlib.AsyncExitStack,
) -> Machine:
    """A VMM with captured memory mapped and devices loaded; its guest stands still.

    ``undo`` ends it and unlinks the mapped image. Raises DamagedData, NotSupported, StorageFull,
    VmmFailure.
    """
    paths = context.data.instance(instance.id)
    raw = source.memory.exists()
    measured = phases.measure("map_memory") if raw else phases.measure("expand")
    with measured, storage_errors("map the memory image"):
        undo.callback(context.expanded.sweep)  # when the link is gone, maybe the last one
        undo.callback(paths.memory.unlink, missing_ok=True)
        undo.callback(paths.memory_table.unlink, missing_ok=True)
        await context.expanded.link(source, paths.memory)
        paths.memory_table.unlink(missing_ok=True)
        if source.table(source.memory.name).exists():
            link_in_place(source.table(source.memory.name), paths.memory_table)
        check_loadable(source.devices, paths.memory, instance)
    with phases.measure("load"):
        machine = await load(context, instance, source.devices)
    undo.push_async_callback(machine.kill)
    return machine


async def run_loaded(
    context: Context,
    instance: Instance,
    source: Payload,
    phases: Phases,
    *,
    operation: Operation,
    fulfils: str | None = None,
    note: str,
    disk: asyncio.Future[None] | None = None,
) -> Instance:
    """Run ``instance`` from captured memory; it is Running on return (see ``let_run``).

    ``disk`` is what the guest must wait for, though its VMM need not: the rest of its disk. Until
    the record is committed any failure ends the VMM and commits nothing.
    """
    async with contextlib.AsyncExitStack() as undo:
        machine = await load_paused(context, instance, source, phases, undo)
        if disk is not None:
            with phases.measure("disk"):
                await asyncio.shield(disk)
        with phases.measure("rush"):
            await context.rush_over()
        return await let_run(
            context,
            instance,
            machine,
            phases,
            operation=operation,
            fulfils=fulfils,
            note=note,
            undo=undo,
        )


async def let_run(
    context: Context,
    instance: Instance,
    machine: Machine,
    phases: Phases,
    *,
    operation: Operation,
    fulfils: str | None = None,
    note: str,
    undo: contextlib.AsyncExitStack,
) -> Instance:
    """Commit Running for a loaded VMM that stands still, then let its guest run.

    The record comes before the guest's first step: from then on its disk may differ from what the
    captured memory believes, so there is no way back to it. ``undo`` is dropped at the commit.

    The guest is then given its own identity (entropy, clock, names) in the background; whoever
    talks to it through us waits for that (``greeting.connect``). A fork that cannot be given one is
    ended: it would go on with its siblings' random numbers.
    """
    unidentified = context.data.instance(instance.id).unidentified
    if operation in _FORKS:  # said for the next server, too
        with storage_errors("mark the fork"):
            unidentified.touch()
    running = context.moved(
        instance, InstanceState.RUNNING, process=machine.process, stopped_at=None,
        started_at=instance.started_at or context.now(),
    )  # fmt: skip
    with phases.measure("record"):
        context.commit(running, fulfils=fulfils, note=note)
    undo.pop_all()
    live = attach(context, running, machine)
    live.sibling = unidentified.exists()
    # Greet before the first step: the agent then finds us waiting instead of an empty line.
    live.greeting = context.spawn(
        _greet(context, running, live, phases, operation), name=f"identify {running.id}"
    )
    with phases.measure("resume"):
        await finish(_resume(machine))
    greeting.see_to(context, running.id, live)
    context.telemetry.observe(operation, phases.total())
    return _remember(context, running, phases, resumed=True)


async def _resume(machine: Machine) -> None:
    """Let the guest run. A lost answer does not matter if the VMM says that it does."""
    try:
        await machine.resume()
    except VmmFailure:
        if await _status(machine) is not MachineStatus.RUNNING:
            raise


async def _status(machine: Machine) -> MachineStatus:
    try:
        return await machine.status()
    except StillframeError:
        return MachineStatus.UNKNOWN


async def take_back(context: Context, before: Instance, reason: str) -> None:
    """After a failed ``run_loaded`` of an instance: its record is true again.

    Until the record was committed there is nothing to do. A guest that certainly has not run stays
    what it was ``before``, so that it can be tried again; of any other, the disk may differ from
    what its captured memory believes: it is Stopped, for that ``reason``. Raises VmmFailure when
    the VMM cannot be ended.
    """
    live = context.live.get(before.id)
    if live is None:
        return
    status = await _status(live.machine)
    if status is MachineStatus.RUNNING:  # only the caller was cancelled
        return
    if status is MachineStatus.PAUSED:
        context.witness(before, note=f"it could not run: {reason}")
        await end(context, before.id)
        clear_remains(context.data.instance(before.id))
    else:
        await end_because(context, before.id, f"its VMM was lost when it was to run: {reason}")
    context.expanded.sweep()


async def _greet(
    context: Context, instance: Instance, live: LiveInstance, phases: Phases, operation: Operation
) -> None:
    with phases.measure("identify"):
        await greeting.greet(context, instance, live)
    if not live.ending:
        _remember(context, instance, phases)
        context.telemetry.observe(operation, {"identify": phases.milliseconds["identify"]})


def _remember(
    context: Context, instance: Instance, phases: Phases, *, resumed: bool = False
) -> Instance:
    """Keep the phases with the instance, in memory only: they are not worth an fsync."""
    current = context.records.instances.get(instance.id, instance)
    timings = phases.total() if resumed else {**current.timings_ms, **phases.milliseconds}
    current = replace(current, timings_ms=timings)
    if resumed:
        current = replace(current, resumed_at=context.now())
    if instance.id in context.records.instances:
        context.records.instances[instance.id] = current
    return current
