"""Snapshots: create and delete. A Running source stays Running."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from stillframe.engine.capture import capture, manifest_facts
from stillframe.engine.context import Context, Phases, finish, remove
from stillframe.engine.keeping.compression import begun, chosen
from stillframe.engine.keeping.quota import EXPECTED, check_room, expected_bytes, expected_stored
from stillframe.engine.keeping.stored import measure_heirs, measured, nearest_living
from stillframe.engine.telemetry import Operation
from stillframe.host.files import clone, remove_tree, storage_errors
from stillframe.model.errors import Conflict, InvalidRequest, NameConflict
from stillframe.model.schedules import check_snapshot_tags
from stillframe.model.states import InstanceState, Verb, permission
from stillframe.model.units import check_name
from stillframe.model.values import (
    CompressionConfig,
    Instance,
    Snapshot,
    SnapshotKind,
)
from stillframe.store.paths import Payload
from stillframe.store.payloads import PayloadSize, check, publish, seal, share_memory
from stillframe.store.records import Intent
from stillframe.vmm.moments import Moment


@dataclass(frozen=True, slots=True)
class Filled:
    """A sealed payload; of a guest that ran, its pause (ms), and see ``Captured``."""

    size: PayloadSize
    pause_ms: float | None = None
    moment: Moment | None = None


async def snapshot(
    context: Context,
    instance_id: str,
    *,
    kind: SnapshotKind,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    compression: CompressionConfig | None = None,
) -> Snapshot:
    """Capture an instance. Data, manifest and record are on disk, in that order, on return.

    Its memory is compressed in the background, as request, instance or server say.
    Raises InvalidRequest, NotFound, Conflict (state, name or quota), StorageFull, VmmFailure; then
    the source is as before and nothing is left.
    """
    if name is not None:
        check_name(name, what="snapshot name")
    tags = check_snapshot_tags(tags)
    if kind is SnapshotKind.STOPPED and compression is not None and compression.enabled:
        raise InvalidRequest("a Stopped snapshot has no memory to compress")
    async with context.exclusive(instance_id, "snapshot") as instance:
        verb = Verb.SNAPSHOT_STANDBY if kind is SnapshotKind.STANDBY else Verb.SNAPSHOT_STOPPED
        permission(verb, instance.state, refusal_code="conflict")
        if name is not None and context.records.snapshot_name_taken(instance_id, name):
            raise _name_taken(name)
        standby = kind is SnapshotKind.STANDBY
        config = chosen(context, instance, compression) if standby else None
        stored = await expected_stored(context, instance, kind)
        check_room(context, expected_bytes(context, instance), stored)
        wanted = Snapshot(
            id=context.new_id(),
            kind=kind,
            name=name,
            tags=tags,
            source_instance_id=instance.id,
            source_instance_name=instance.name,
            source_hypervisor=instance.hypervisor,
            created_at=context.now(),
            size_bytes=0,
            parent_snapshot_id=instance.head_snapshot_id or instance.parent_snapshot_id,
            template=instance,
        )
        taken = await _take(context, instance, replace(wanted, stored_bytes=stored), config)
    context.compressor.want_snapshot(taken)
    return taken


async def _take(
    context: Context, instance: Instance, wanted: Snapshot, config: CompressionConfig | None
) -> Snapshot:
    snapshot_id, name = wanted.id, wanted.name
    building, final = context.data.snapshot_new(snapshot_id), context.data.snapshot(snapshot_id)
    phases = Phases()
    facts = {"source": instance.id, "name": name or "", EXPECTED: str(wanted.stored_bytes)}
    context.records.intend(Intent(snapshot_id, "snapshot", facts))
    async with contextlib.AsyncExitStack() as undo:
        undo.callback(context.records.fulfil, snapshot_id)
        undo.callback(context.expanded.sweep)
        undo.push_async_callback(remove, final.directory)
        undo.push_async_callback(remove, building.directory)
        with storage_errors("make room for the snapshot"):
            building.directory.mkdir(mode=0o700)
        filled = await _fill(context, instance, building, phases, config)
        size, pause_ms = filled.size, filled.pause_ms
        wanted = await measured(context, wanted, building)
        with phases.measure("publish"), storage_errors("store the snapshot"):
            await finish(asyncio.to_thread(publish, building, final))
        taken = replace(
            wanted,
            created_at=context.now(),
            size_bytes=size.size,
            pause_ms=pause_ms,
            timings_ms=phases.total(),
            template=_template(context, instance, wanted.kind),
        )
        with storage_errors("look at the compressed image"):
            taken = begun(taken, final, config)
        try:
            context.records.put_snapshot(taken, head=True)
        except NameConflict as error:
            raise _name_taken(name or "") from error
        undo.pop_all()
    context.telemetry.observe(Operation.SNAPSHOT, taken.timings_ms)
    if pause_ms is not None:
        context.telemetry.observe_pause(pause_ms)
    live = context.live.get(instance.id)
    if live is not None and taken.kind is SnapshotKind.STANDBY:
        live.captured = final
    if filled.moment is not None:
        filled.moment.has_moved_to(final.memory)
    context.note(instance.id, f"snapshot {taken.id} ({taken.kind.value}) taken")
    return taken


async def _fill(
    context: Context,
    instance: Instance,
    payload: Payload,
    phases: Phases,
    config: CompressionConfig | None,
) -> Filled:
    """Put the captured state of the instance into ``payload``."""
    if instance.state is InstanceState.RUNNING:
        live = context.live_instance(instance)
        captured = await capture(context, instance, live, payload, phases)
        return Filled(captured.size, captured.pause_ms, captured.moment)
    as_it_is = config is not None and config == instance.standby_compression
    if instance.state is InstanceState.STANDBY and not as_it_is:
        # It may be compressed, but not as this one is to be: begin from the raw image.
        with phases.measure("copy"), storage_errors("copy the instance"):
            await context.expanded.link(context.data.instance(instance.id).standby, payload.memory)
    copying = asyncio.to_thread(_copy_resting, context, instance, payload, phases)
    return Filled(await finish(copying))  # cancelled, it must not write beside what undoes it


def _copy_resting(
    context: Context, instance: Instance, payload: Payload, phases: Phases
) -> PayloadSize:
    """Capture an instance without a VMM: the standby image is shared, the disk cloned."""
    paths = context.data.instance(instance.id)
    tables: dict[str, str] = {}
    with storage_errors("copy the instance"), phases.measure("copy"):
        if instance.state is InstanceState.STANDBY:
            check(paths.standby)
            tables = share_memory(paths.standby, payload)
        clone(paths.overlay, payload.overlay)
    with storage_errors("store the snapshot"), phases.measure("durable"):
        return seal(payload, manifest_facts(instance), tables)


def _template(context: Context, instance: Instance, kind: SnapshotKind) -> Instance:
    """The instance as a fork will find it: at rest, without a process."""
    standby = kind is SnapshotKind.STANDBY
    resting = InstanceState.STANDBY if standby else InstanceState.STOPPED
    return context.moved(instance, resting, process=None, timings_ms={}, head_snapshot_id=None)


def _name_taken(name: str) -> Conflict:
    return Conflict(
        f"this instance already has a snapshot named {name!r}",
        hint="choose another name or delete that snapshot",
        name=name,
    )


async def delete_snapshot(context: Context, snapshot_id: str) -> None:
    """Delete a snapshot. Forks go on: they hold the memory image by a link of their own.

    Raises NotFound; HostFailure when files of it cannot be removed (it is deleted all the same).
    """
    known, subject = context.snapshot(snapshot_id), snapshot_id
    template, beside = known.template, known.stored_beside
    facts = {"image": template.image_digest, "boot": template.boot}  # forks under way need them
    context.records.drop_snapshot(snapshot_id, Intent(subject, "delete snapshot", facts))
    await context.compressor.cancel(snapshot_id)
    await context.warm.forget(snapshot_id)
    await context.snapshot_unused(snapshot_id)
    with storage_errors("remove the files of the snapshot; the next start will"):
        await asyncio.to_thread(remove_tree, context.data.snapshot(snapshot_id).directory)
    await measure_heirs(context, snapshot_id, nearest_living(context, beside))
    context.records.fulfil(subject)
    context.release(template)
    context.expanded.sweep()  # it may have had the last link of an image
    context.space_freed()
