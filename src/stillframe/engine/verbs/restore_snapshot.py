"""Restore in place: an instance goes back to one of its snapshots.

The restored state is prepared beside and takes the instance's place by a rename; the old state is
kept until the new one runs, and put back if it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import replace

from stillframe.engine.context import Context, Phases, finish
from stillframe.engine.keeping.quota import check_free, copied_bytes
from stillframe.engine.keeping.verify import refuse_damaged
from stillframe.engine.loaded import check_stored, run_loaded
from stillframe.engine.machines import boot_and_commit, end
from stillframe.engine.telemetry import Operation
from stillframe.engine.verbs.fork import target_hypervisor_of, target_of, template_under
from stillframe.host.files import (
    clone,
    exchange,
    fsync_directory,
    fsync_file,
    remove_tree,
    storage_errors,
)
from stillframe.images.boot import write_config_disk
from stillframe.model.errors import InvalidRequest
from stillframe.model.states import InstanceState, Verb, permission
from stillframe.model.values import Hypervisor, Instance, Snapshot
from stillframe.store.paths import InstancePaths, Payload
from stillframe.store.payloads import memory_file, share_memory, without_file
from stillframe.store.records import Intent

log = logging.getLogger("stillframe.restore")


async def restore_snapshot(
    context: Context,
    instance_id: str,
    snapshot_id: str,
    *,
    target_state: InstanceState | None = None,
    target_hypervisor: Hypervisor | None = None,
) -> Instance:
    """Put a Stopped or Standby instance back to one of its own snapshots.

    Raises InvalidRequest (another instance's snapshot, target), NotFound, InvalidState,
    DamagedData, NotSupported, StorageFull, VmmFailure, GuestFailure; it is then as before.
    """
    async with (
        context.exclusive(instance_id, "restore snapshot") as instance,
        context.using(snapshot_id) as snapshot,
    ):
        check_own(snapshot, instance_id)
        target = target_of(snapshot.kind, target_state)
        hypervisor = await target_hypervisor_of(context, snapshot, target_hypervisor)
        permission(Verb.RESTORE_SNAPSHOT, instance.state)
        refuse_damaged(snapshot)
        payload = context.data.snapshot(snapshot_id)
        await check_stored(payload)
        template = await template_under(context, snapshot, hypervisor)
        if copied := copied_bytes(context, payload.overlay):
            check_free(context, copied)
        restored = _restored(instance, snapshot, template)
        await context.compressor.cancel(instance_id)
        with contextlib.ExitStack() as undo:
            undo.callback(context.compressor.want_standby, instance)
            result = await _swap(context, instance, restored, payload, target)
            undo.pop_all()
        return result


def check_own(snapshot: Snapshot, instance_id: str) -> None:
    """Raises InvalidRequest for a snapshot of another instance."""
    if snapshot.source_instance_id != instance_id:
        raise InvalidRequest(
            "the snapshot belongs to another instance",
            hint="fork it instead",
            source_instance_id=snapshot.source_instance_id,
        )


def _restored(instance: Instance, snapshot: Snapshot, template: Instance) -> Instance:
    """The snapshot's record under the instance's identity, its life cleared."""
    return replace(
        template,
        id=instance.id,
        name=instance.name,
        created_at=instance.created_at,
        expires_at=instance.expires_at,
        phase_since=instance.phase_since,
        phase_durations_ms=instance.phase_durations_ms,
        process=None,
        started_at=None,
        stopped_at=None,
        exit_code=None,
        exit_message=None,
        timings_ms={},
        state=instance.state,
        parent_snapshot_id=snapshot.id,
    )


async def _swap(
    context: Context,
    instance: Instance,
    restored: Instance,
    payload: Payload,
    target: InstanceState,
) -> Instance:
    data, phases = context.data, Phases()
    current, staged = data.instance(instance.id), data.instance_staged(instance.id)

    intent = Intent(instance.id, "restore snapshot", {})

    async def take_back() -> None:
        """If this fails the intent stays, and the next server does it."""
        if instance.id not in context.records.intents:  # the restored record is there already
            context.witness(instance, intent=intent, note="restoring a snapshot is undone")
        await end(context, instance.id)
        put_back(current, staged)
        context.records.fulfil(instance.id)

    await end(context, instance.id)  # a VMM that could not be ended when it was to be
    with storage_errors("begin the restore"):
        current.restored.unlink(missing_ok=True)  # an earlier restore's, or it would mislead
    async with contextlib.AsyncExitStack() as undo:
        context.records.intend(intent)
        undo.push_async_callback(take_back)
        with phases.measure("disk"), storage_errors("stage the snapshot"):
            await finish(asyncio.to_thread(_stage, current, staged, payload, target))
        with storage_errors("put the restored state in place"):
            exchange(staged.directory, current.directory)
            fsync_directory(data.instances)
        result = await _run(context, restored, payload, target, phases)
        undo.pop_all()
    try:
        await asyncio.to_thread(give_up, current, staged)
    except OSError as error:  # it is restored all the same; the next start removes the rest
        log.warning("what %s was before cannot be removed: %s", instance.name, error)
    context.expanded.sweep()
    return result


def _stage(
    current: InstancePaths, staged: InstancePaths, payload: Payload, target: InstanceState
) -> None:
    """Build the restored instance directory beside the current one; its logs are shared."""
    remove_tree(staged.directory)
    (staged.directory / "logs").mkdir(parents=True, mode=0o700)
    staged.restored.touch()
    for log in (current.directory / "logs").iterdir():
        os.link(log, staged.directory / "logs" / log.name)
    clone(payload.overlay, staged.overlay)
    write_config_disk(staged.config, [])
    if target is InstanceState.STANDBY:
        standby = staged.standby
        standby.directory.mkdir(mode=0o700)
        share_memory(payload, standby)
        standby.manifest.write_bytes(without_file(payload.manifest.read_bytes(), "overlay.raw"))
        fsync_file(standby.manifest)
        fsync_directory(standby.directory)
    fsync_file(staged.overlay)
    fsync_directory(staged.directory)


def put_back(current: InstancePaths, staged: InstancePaths) -> None:
    """Give an instance its old state again after a failed or interrupted restore.

    It can be interrupted, and asked for again. Raises OSError, HostFailure; then the old state is
    still in one of the two places.
    """
    with storage_errors("put the old state back"):
        if current.restored.exists():
            exchange(staged.directory, current.directory)
            fsync_directory(current.directory.parent)
        remove_tree(staged.directory)


def give_up(current: InstancePaths, staged: InstancePaths) -> None:
    """Remove the old state, once the record tells of the restored one. Raises OSError.

    What cannot be removed is tried once more.
    """
    remove_tree(staged.directory)
    with contextlib.suppress(OSError):
        current.restored.unlink(missing_ok=True)
    current.restored.unlink(missing_ok=True)


async def _run(
    context: Context, restored: Instance, payload: Payload, target: InstanceState, phases: Phases
) -> Instance:
    with storage_errors("read what is stored"):
        loaded = memory_file(payload) is not None
    if target is InstanceState.RUNNING and loaded:
        return await run_loaded(
            context,
            restored,
            payload,
            phases,
            operation=Operation.RESTORE_SNAPSHOT,
            fulfils=restored.id,
            note="snapshot restored",
        )
    if target is InstanceState.RUNNING:
        return await boot_and_commit(
            context, restored, fulfils=restored.id, note="snapshot restored"
        )
    resting = context.moved(restored, target, stopped_at=context.now())
    return context.commit(resting, fulfils=restored.id, note="snapshot restored")
