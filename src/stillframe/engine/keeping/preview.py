"""What a fork or a restore in place would do: every reason against it at once, and its bytes.

The verbs stop at the first reason; here all are collected, and nothing is touched.
"""

from __future__ import annotations

import asyncio

from stillframe.engine.context import Context
from stillframe.engine.interface import ForkRequest
from stillframe.engine.keeping.interface import RunPreview
from stillframe.engine.keeping.lineage import family_of, weigh
from stillframe.engine.keeping.quota import check_free, copied_bytes
from stillframe.engine.moving.compatibility import image_reasons, machine_reasons
from stillframe.engine.verbs.create import check_environment
from stillframe.engine.verbs.fork import name_taken, target_hypervisor_of, target_of
from stillframe.engine.verbs.restore_snapshot import check_own
from stillframe.host.files import storage_errors
from stillframe.model.errors import StillframeError
from stillframe.model.states import InstanceState, Verb, permission
from stillframe.model.units import check_name, check_tags
from stillframe.model.values import Hypervisor, Snapshot
from stillframe.store.payloads import check


async def preview_fork(context: Context, snapshot_id: str, request: ForkRequest) -> RunPreview:
    """What ``fork_snapshot`` would do, doing nothing. Raises NotFound."""
    async with context.using(snapshot_id) as snapshot:
        collected = _Collected()
        async with collected:
            check_name(request.name)
        async with collected:
            if request.tags is not None:
                check_tags(request.tags)
        async with collected:
            check_environment(request.env)
        async with collected:
            if context.records.instance_by_name(request.name) is not None:
                raise name_taken(request.name)
        return await _preview(
            context, snapshot, collected,
            name=request.name, state=request.target_state, hypervisor=request.target_hypervisor,
        )  # fmt: skip


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
        await asyncio.to_thread(check, payload)
    copied, expanded = copied_bytes(context, payload.overlay), 0
    async with collected:
        if target is InstanceState.RUNNING:  # else the memory stays as it is
            with storage_errors("look at the compressed image"):
                expanded = await context.expanded.missing_bytes(payload)
        if copied + expanded:
            check_free(context, copied + expanded)
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
