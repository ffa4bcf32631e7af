"""Forks: a new instance from a snapshot or from another instance.

A fork maps its parent's memory image by a hard link of its own, so its cost does not depend on the
guest's memory, and nobody's deletion takes the image from under it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stillframe.engine.capture import capture
from stillframe.engine.context import Context, Phases, finish, remove
from stillframe.engine.interface import ForkOutcome, ForkRequest
from stillframe.engine.keeping.quota import check_free, copied_bytes, expected_bytes
from stillframe.engine.keeping.verify import refuse_damaged
from stillframe.engine.loaded import check_stored, run_loaded
from stillframe.engine.machines import boot_and_commit, boot_pairs, end
from stillframe.engine.telemetry import Operation
from stillframe.engine.verbs.create import check_environment, make_directory
from stillframe.engine.verbs.standby import standby
from stillframe.engine.verbs.stop import delete
from stillframe.engine.wait import reached
from stillframe.host.files import (
    begin_clone,
    copy_into,
    fsync_data,
    fsync_directory,
    fsync_file,
    storage_errors,
)
from stillframe.images.boot import boot_configuration, write_config_disk
from stillframe.model.errors import (
    Conflict,
    InvalidRequest,
    NameConflict,
    NotFound,
    StillframeError,
)
from stillframe.model.states import InstanceState, Verb, permission
from stillframe.model.units import check_name, check_tags
from stillframe.model.values import Hypervisor, Instance, Snapshot, SnapshotKind
from stillframe.store.paths import Payload
from stillframe.store.payloads import share_memory, without_file
from stillframe.store.records import Intent
from stillframe.vmm.moments import Moment

log = logging.getLogger("stillframe.fork")
_TARGETS: dict[SnapshotKind, tuple[InstanceState, ...]] = {  # the default comes first
    SnapshotKind.STANDBY: (InstanceState.RUNNING, InstanceState.STANDBY, InstanceState.STOPPED),
    SnapshotKind.STOPPED: (InstanceState.STOPPED, InstanceState.RUNNING),
}


@dataclass(frozen=True, slots=True)
class Source:
    """What a fork starts from: the instance as it was, its disk, and its memory if it has any.

    ``moment`` is the one at which it was captured for this fork: see ``Captured``.
    """

    template: Instance
    overlay: Path
    memory: Payload | None
    snapshot_id: str | None = None
    moment: Moment | None = None


def target_of(kind: SnapshotKind, wanted: InstanceState | None) -> InstanceState:
    """The state to bring a snapshot of ``kind`` to. Raises InvalidRequest for a forbidden one."""
    allowed = _TARGETS[kind]
    target = wanted or allowed[0]
    if target not in allowed:
        raise InvalidRequest(
            f"a {kind.value} snapshot cannot be brought to {target.value}",
            hint="target_state may be " + ", ".join(state.value for state in allowed),
        )
    return target


async def target_hypervisor_of(
    context: Context, snapshot: Snapshot, wanted: Hypervisor | None
) -> Hypervisor:
    """The hypervisor to run a snapshot under. Raises InvalidRequest, NotSupported."""
    if wanted is None:
        return snapshot.source_hypervisor
    if snapshot.kind is SnapshotKind.STANDBY:
        raise InvalidRequest(
            "target_hypervisor is only possible for Stopped snapshots",
            hint="memory can only run under the hypervisor that captured it",
        )
    await context.available_driver(context.offered(wanted), snapshot.template.limits)
    return wanted


async def template_under(context: Context, snapshot: Snapshot, hypervisor: Hypervisor) -> Instance:
    """The snapshot's record under a hypervisor, with what that one is like if it is another.

    Raises NotSupported.
    """
    if hypervisor is snapshot.template.hypervisor:
        return snapshot.template
    _, probe = await context.available_driver(hypervisor)
    return replace(
        snapshot.template,
        hypervisor=hypervisor,
        hypervisor_version=probe.version,
        accelerator=probe.accelerator,
        processor=probe.processor,
    )


async def fork_snapshot(context: Context, snapshot_id: str, request: ForkRequest) -> Instance:
    """A new instance from a snapshot, in the target state on return.

    Raises InvalidRequest, NotFound, Conflict (name), DamagedData, NotSupported, StorageFull,
    VmmFailure; then nothing of the fork is left.
    """
    (outcome,) = await fork_many(context, snapshot_id, [request])
    if outcome.error is not None:
        raise outcome.error
    assert outcome.instance is not None  # noqa: S101 - for the type checker
    return outcome.instance


async def fork_many(
    context: Context, snapshot_id: str, requests: Sequence[ForkRequest]
) -> list[ForkOutcome]:
    """Forks of one snapshot, started side by side; one outcome for each request, in order.

    What is common to them is done once. A fork that fails leaves nothing and hinders no other.
    Raises NotFound, DamagedData: then there is none.
    """
    async with context.using(snapshot_id) as snapshot:
        refuse_damaged(snapshot)
        payload = context.data.snapshot(snapshot_id)
        checked = asyncio.ensure_future(check_stored(payload))
        try:
            outcomes = await asyncio.gather(
                *(_outcome(context, snapshot, request, checked) for request in requests)
            )
        finally:
            await asyncio.gather(checked, return_exceptions=True)  # warm forks do not ask for it
    return outcomes


async def _outcome(
    context: Context, snapshot: Snapshot, request: ForkRequest, checked: asyncio.Future[None]
) -> ForkOutcome:
    try:
        return ForkOutcome(request.name, await _fork_one(context, snapshot, request, checked))
    except NameConflict as error:
        conflict = Conflict(error.message, hint=error.hint, name=request.name)
        return ForkOutcome(request.name, error=conflict)
    except StillframeError as error:
        return ForkOutcome(request.name, error=error)
    except Exception as error:  # a fault of ours: it must not take the other forks with it
        log.exception("fork %s of snapshot %s failed", request.name, snapshot.id)
        return ForkOutcome(request.name, error=StillframeError(f"internal error: {error!r}"))


async def _fork_one(
    context: Context, snapshot: Snapshot, request: ForkRequest, checked: asyncio.Future[None]
) -> Instance:
    phases = Phases()
    check_name(request.name)
    tags = None if request.tags is None else check_tags(request.tags)
    target = target_of(snapshot.kind, request.target_state)
    hypervisor = await target_hypervisor_of(context, snapshot, request.target_hypervisor)
    check_child(context, snapshot.template, request)
    if context.records.instance_by_name(request.name) is not None:
        raise name_taken(request.name)
    if target is InstanceState.RUNNING and (warm := context.warm.take(snapshot.id)) is not None:
        return await context.warm.claim(warm, request, tags, phases)
    payload = context.data.snapshot(snapshot.id)
    memory = payload if snapshot.kind is SnapshotKind.STANDBY else None
    template = await template_under(context, snapshot, hypervisor)
    source = Source(template, payload.overlay, memory, snapshot.id)
    with phases.measure("check"):
        await asyncio.shield(checked)  # it is the siblings' too
    child = child_of(context, source, request, tags)
    return await _fork(context, source, child, target, phases)


def check_child(context: Context, template: Instance, request: ForkRequest) -> None:
    """Raises InvalidRequest when a fork could not boot, or run commands, with its environment."""
    if not request.env:  # then it has its source's
        return
    environment = {**template.env, **(request.env or {})}
    check_environment(environment)
    child = replace(template, name=request.name, env=environment)
    boot_configuration(boot_pairs(child, context.images.by_digest(template.image_digest)))


async def fork_instance(
    context: Context,
    instance_id: str,
    *,
    name: str,
    from_running: bool = False,
    target_state: InstanceState | None = None,
) -> Instance:
    """A new instance from another one; a Running source (``from_running``) stays Running.

    Raises InvalidRequest, NotFound, InvalidState, NameConflict and what ``fork_snapshot`` raises.
    """
    check_name(name)
    phases = Phases()
    async with contextlib.AsyncExitStack() as held:
        instance = await held.enter_async_context(context.exclusive(instance_id, "fork"))
        permission(Verb.FORK_RUNNING if from_running else Verb.FORK, instance.state)
        target = target_state or instance.state
        check_instance_target(target)
        if context.records.instance_by_name(name) is not None:
            raise name_taken(name)
        source = await _source_of(context, instance, held, phases)
        child = child_of(context, source, ForkRequest(name))
        fork = await _fork(context, source, child, target, phases)
        if source.moment is not None:  # the fork has the only image of this moment
            paths = context.data.instance(fork.id)
            at_rest = target is InstanceState.STANDBY
            source.moment.has_moved_to(paths.standby.memory if at_rest else paths.memory)
        return fork


def check_instance_target(target: InstanceState) -> None:
    """Raises InvalidRequest for a state that no fork of an instance can be brought to."""
    if target not in _TARGETS[SnapshotKind.STANDBY]:
        raise InvalidRequest(f"target_state cannot be {target.value}")


async def _source_of(
    context: Context, instance: Instance, held: contextlib.AsyncExitStack, phases: Phases
) -> Source:
    paths = context.data.instance(instance.id)
    template = replace(instance, process=None)
    if instance.state is InstanceState.RUNNING:
        # The capture, and the fork's own copy of its disk: refused before the guest stands still.
        copied = copied_bytes(context, paths.overlay)
        check_free(context, expected_bytes(context, instance) + copied)
        capture_id = context.new_id()
        payload = context.data.snapshot_new(capture_id)
        context.records.intend(Intent(capture_id, "snapshot", {"source": instance.id}))
        held.callback(context.records.fulfil, capture_id)
        held.push_async_callback(remove, payload.directory)
        with storage_errors("make room for the capture"):
            payload.directory.mkdir(mode=0o700)
        live = context.live_instance(instance)
        captured = await capture(context, instance, live, payload, phases)
        return Source(template, payload.overlay, payload, moment=captured.moment)
    if instance.state is InstanceState.STANDBY:
        await check_stored(paths.standby)
        return Source(template, paths.overlay, paths.standby)
    return Source(template, paths.overlay, None)


async def _fork(
    context: Context, source: Source, child: Instance, target: InstanceState, phases: Phases
) -> Instance:
    """Make the fork and bring it to ``target``; undo all of it on failure."""
    async with context.making(child.id), contextlib.AsyncExitStack() as undo:
        try:
            context.records.reserve_instance(child, Intent(child.id, "fork", {}))
        except NameConflict as error:
            raise name_taken(child.name) from error
        undo.callback(context.forget, child.id)
        with phases.measure("disk"):
            disk = await make_disks(context, child, source, undo)
        undo.push_async_callback(end, context, child.id)
        child = await _bring_to(context, child, source, target, phases, disk=disk)
        undo.pop_all()
    if target is InstanceState.STANDBY and child.state is InstanceState.INITIALIZING:
        return await _put_to_sleep(context, child)
    return child


async def _put_to_sleep(context: Context, child: Instance) -> Instance:
    """Standby of a fork that has to boot for it; it is deleted if that fails."""
    try:
        await reached(context, child.id, InstanceState.RUNNING, context.settings.boot_timeout)
        return await standby(context, child.id)
    except BaseException:
        with contextlib.suppress(NotFound):
            await finish(delete(context, child.id, graceful=False))
        raise


def child_of(
    context: Context,
    source: Source,
    request: ForkRequest,
    tags: Mapping[str, str] | None = None,
) -> Instance:
    """The record of a fork: inherited but for identity, history and what belongs to one life."""
    template, now = source.template, context.now()
    return replace(
        template,
        id=context.new_id(),
        name=request.name,
        tags=template.tags if tags is None else tags,
        env={**template.env, **(request.env or {})},
        state=InstanceState.CREATED,
        created_at=now,
        phase_since=now,
        phase_durations_ms={},
        process=None,
        started_at=None,
        stopped_at=None,
        exit_code=None,
        exit_message=None,
        state_error=None,
        expires_at=None,
        timings_ms={},
        resumed_at=None,
        parent_snapshot_id=source.snapshot_id or template.parent_snapshot_id,
        parent_instance_id=None if source.snapshot_id else template.id,
    )


async def make_disks(
    context: Context, child: Instance, source: Source, undo: contextlib.AsyncExitStack
) -> asyncio.Future[None]:
    """The directory of a fork with its disks; ``undo`` removes it.

    On return the writable disk is not durable yet, and where the file system cannot share blocks
    it is still being copied: a VMM can be started meanwhile. The future is done when it is whole
    and durable. Raises StorageFull, and so does the future.
    """
    if copied := copied_bytes(context, source.overlay):
        check_free(context, copied)
    whole = await finish(asyncio.to_thread(_begin_disks, context, child, source, undo))
    disk = asyncio.get_running_loop().run_in_executor(
        context.copying, _finish_disk, context, child, source, whole
    )
    undo.push_async_callback(asyncio.wait, [disk])
    return disk


def _begin_disks(
    context: Context, child: Instance, source: Source, undo: contextlib.AsyncExitStack
) -> bool:
    paths = context.data.instance(child.id)
    with storage_errors("clone the disk"), contextlib.ExitStack() as local:
        make_directory(paths.directory, local)
        whole = begin_clone(source.overlay, paths.overlay)
        # The configuration disk is only read at boot, but a loaded guest needs it to be there.
        write_config_disk(paths.config, [])
        undo.callback(local.pop_all().close)
        return whole


def _finish_disk(context: Context, child: Instance, source: Source, whole: bool) -> None:
    paths = context.data.instance(child.id)
    with storage_errors("clone the disk"):
        if not whole:
            copy_into(source.overlay, paths.overlay)
        # Before the record says that there is such an instance. The record's own flush, for which
        # the guest has to wait, then finds little left to do.
        fsync_data(paths.overlay)
        fsync_directory(paths.directory)
        fsync_directory(paths.directory.parent)


async def _bring_to(
    context: Context,
    child: Instance,
    source: Source,
    target: InstanceState,
    phases: Phases,
    *,
    disk: asyncio.Future[None],
) -> Instance:
    if source.memory is not None and target is InstanceState.RUNNING:
        return await run_loaded(
            context, child, source.memory, phases,
            operation=Operation.FORK if source.snapshot_id else Operation.FORK_INSTANCE,
            fulfils=child.id, note="forked", disk=disk,
        )  # fmt: skip
    await asyncio.shield(disk)
    if source.memory is not None and target is InstanceState.STANDBY:
        await finish(asyncio.to_thread(_link_standby, context, child, source.memory))
        return _commit_resting(context, child, InstanceState.STANDBY)
    if target is InstanceState.STOPPED:
        return _commit_resting(context, child, InstanceState.STOPPED)
    return await boot_and_commit(context, child, fulfils=child.id, note="forked")


def _link_standby(context: Context, child: Instance, memory: Payload) -> None:
    standby = context.data.instance(child.id).standby
    with storage_errors("share the memory image"):
        standby.directory.mkdir(mode=0o700)
        share_memory(memory, standby)
        # The manifest of a snapshot lists its disk too; here the disk lies beside.
        standby.manifest.write_bytes(without_file(memory.manifest.read_bytes(), "overlay.raw"))
        for path in (standby.manifest, context.data.instance(child.id).overlay):
            fsync_file(path)
        fsync_directory(standby.directory)


def _commit_resting(context: Context, child: Instance, state: InstanceState) -> Instance:
    with storage_errors("store the fork"):
        fsync_file(context.data.instance(child.id).overlay)
        fsync_directory(context.data.instance(child.id).directory)
    resting = context.moved(child, state, stopped_at=context.now())
    return context.commit(resting, fulfils=child.id, note="forked")


def name_taken(name: str) -> NameConflict:
    """The error for a fork whose name another instance has."""
    return NameConflict(
        f"an instance named {name!r} already exists", hint="choose another name", name=name
    )
