"""What a fork or a restore in place would do: every reason against it at once, and its bytes.

The verbs stop at the first reason; here all are collected, and nothing is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillframe.engine.context import Context
from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping.interface import RunPreview
from stillframe.engine.keeping.lineage import family_of, weigh
from stillframe.engine.keeping.quota import check_free, copied_bytes, expected_bytes
from stillframe.engine.loaded import check_stored
from stillframe.engine.moving.compatibility import image_reasons, machine_reasons
from stillframe.engine.verbs.fork import (
    check_child,
    check_instance_target,
    name_taken,
    target_hypervisor_of,
    target_of,
)
from stillframe.engine.verbs.restore_snapshot import check_own
from stillframe.host.files import storage_errors
from stillframe.model.errors import StillframeError
from stillframe.model.states import InstanceState, Verb, permission
from stillframe.model.units import check_name, check_tags
from stillframe.model.values import Hypervisor, Snapshot
from stillframe.store.paths import Payload


async def preview_fork(context: Context, snapshot_id: str, request: ForkRequest) -> RunPreview:
    """What ``fork_snapshot`` would do, doing nothing. Raises NotFound."""
    (preview,) = await preview_forks(context, snapshot_id, [request])
    return preview


async def preview_forks(
    context: Context, snapshot_id: str, requests: Sequence[ForkRequest]
) -> list[RunPreview]:
    """What ``fork_many`` would do, one answer each, doing nothing. Raises NotFound.

    A later one finds less room, by what the earlier ones take; the memory is expanded once.
    """
    previews: list[RunPreview] = []
    async with context.using(snapshot_id) as snapshot:
        for request in requests:
            collected = _Collected()
            await _check_wishes(context, request, collected)
            async with collected:
                check_child(context, snapshot.template, request)
            earlier = sum(one.bytes_copied for one in previews)
            one = await _preview(
                context, snapshot, collected, name=request.name, state=request.target_state,
                hypervisor=request.target_hypervisor, earlier=earlier,
            )  # fmt: skip
            previews.append(one)
    return previews


async def _check_wishes(context: Context, request: ForkRequest, collected: _Collected) -> None:
    async with collected:
        check_name(request.name)
    async with collected:
        if request.tags is not None:
            check_tags(request.tags)
    async with collected:
        if context.records.instance_by_name(request.name) is not None:
            raise name_taken(request.name)


async def preview_instance_fork(
    context: Context,
    instance_id: str,
    *,
    name: str,
    from_running: bool = False,
    target_state: InstanceState | None = None,
) -> RunPreview:
    """What ``fork_instance`` would do, doing nothing. Raises NotFound."""
    instance, paths = context.instance(instance_id), context.data.instance(instance_id)
    collected, target = _Collected(), target_state or instance.state
    await _check_wishes(context, ForkRequest(name), collected)
    async with collected:
        permission(Verb.FORK_RUNNING if from_running else Verb.FORK, instance.state)
        check_instance_target(target)
    async with collected:
        if target is InstanceState.RUNNING:
            await context.available_driver(instance.hypervisor)
    copied, captured, expanded = copied_bytes(context, paths.overlay), 0, 0
    if instance.state is InstanceState.RUNNING:
        captured = expected_bytes(context, instance)
    elif instance.state is InstanceState.STANDBY:
        async with collected:
            await check_stored(paths.standby)
        async with collected:
            if target is InstanceState.RUNNING:
                expanded = await _missing_bytes(context, paths.standby)
    async with collected:
        if copied + captured + expanded:
            check_free(context, copied + captured + expanded)
    return RunPreview(
        instance, name=name, state=target, hypervisor=instance.hypervisor,
        memory_bytes=instance.memory_bytes, bytes_copied=copied, bytes_expanded=expanded,
        bytes_captured=captured, refused=tuple(collected.reasons),
    )  # fmt: skip


async def _missing_bytes(context: Context, payload: Payload) -> int:
    with storage_errors("look at the compressed image"):
        return await context.expanded.missing_bytes(payload)


async def preview_restore(
    context: Context,
    instance_id: str,
    snapshot_id: str,
    *,
    target_state: InstanceState | None = None,
    target_hypervisor: Hypervisor | None = None,
) -> RunPreview:
    """What ``restore_snapshot`` would do, doing nothing. Raises NotFound.

    ``bytes_lost`` is what the instance alone holds now, which the restore gives up.
    """
    instance = context.instance(instance_id)
    async with context.using(snapshot_id) as snapshot:
        collected = _Collected()
        async with collected:
            check_own(snapshot, instance_id)
        async with collected:
            permission(Verb.RESTORE_SNAPSHOT, instance.state)
        (itself,) = await weigh(context, [family_of(context).instance(instance_id)])
        return await _preview(
            context, snapshot, collected, name=instance.name, state=target_state,
            hypervisor=target_hypervisor, lost=itself.exclusive_bytes or 0,
        )  # fmt: skip


class _Collected:
    """The errors of several blocks, in order; a block that raises one is left, no more."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, StillframeError):
            return False
        self.reasons.append(error.message)
        return True


async def _preview(
    context: Context,
    snapshot: Snapshot,
    collected: _Collected,
    *,
    name: str,
    state: InstanceState | None,
    hypervisor: Hypervisor | None,
    lost: int = 0,
    earlier: int = 0,
) -> RunPreview:
    target: InstanceState | None = None
    async with collected:
        target = target_of(snapshot.kind, state)
    found, advice = hypervisor or snapshot.source_hypervisor, list[str]()
    async with collected:
        found = await target_hypervisor_of(context, snapshot, hypervisor)
        if hypervisor is None:  # one that was asked for has been looked at
            against, advice = await machine_reasons(context, snapshot)
            collected.reasons += against
    collected.reasons += image_reasons(context, snapshot)
    payload = context.data.snapshot(snapshot.id)
    async with collected:
        await check_stored(payload)
    copied, expanded = copied_bytes(context, payload.overlay), 0
    async with collected:
        if target is InstanceState.RUNNING:  # else the memory stays as it is
            expanded = await _missing_bytes(context, payload)
        if copied + expanded:
            check_free(context, earlier + copied + expanded)
    return RunPreview(
        snapshot,
        name=name,
        state=target,
        hypervisor=found,
        memory_bytes=snapshot.template.memory_bytes,
        bytes_copied=copied,
        bytes_expanded=expanded,
        bytes_lost=lost,
        refused=tuple(collected.reasons),
        advice=tuple(advice),
    )
