"""Whether a snapshot can be forked on this host, and if not, why: asked before anything is tried.

Memory runs only under the hypervisor, version and accelerator that it was captured with, on the
same processor where guests see the host's, and with the same kernel and initrd. A disk runs
anywhere.
"""

from __future__ import annotations

from stillframe.engine.context import Context
from stillframe.engine.keeping.interface import Compatibility
from stillframe.engine.machines import foreign_to
from stillframe.model.errors import MissingComponent, NotFound, NotSupported, StillframeError
from stillframe.model.values import DeviceLimits, Hypervisor, Instance, Snapshot, SnapshotKind
from stillframe.vmm.driver import DEVICE_LAYOUT, unkept


async def compatibility(context: Context, snapshot_id: str) -> Compatibility:
    """Whether the snapshot can be forked here, with reasons. Raises NotFound."""
    snapshot = context.snapshot(snapshot_id)
    against = image_reasons(context, snapshot)
    machine, advice = await machine_reasons(context, snapshot)
    against += machine
    return Compatibility(fork=not against, reasons=(*against, *advice))


def image_reasons(context: Context, snapshot: Snapshot) -> list[str]:
    """Why the snapshot's own files or its image are no base for a fork."""
    against = [] if snapshot.damaged is None else [f"it is damaged: {snapshot.damaged}"]
    try:
        context.images.by_digest(snapshot.template.image_digest)
    except NotFound:
        against.append(f"its image {snapshot.template.image} is not here")
    return against


async def machine_reasons(
    context: Context, snapshot: Snapshot, *, boot_pair_comes: bool = False
) -> tuple[list[str], list[str]]:
    """Why this host's hypervisors cannot run the snapshot, and advice for where they can.

    ``boot_pair_comes`` says that its kernel and initrd need not be here: they come along.
    """
    if snapshot.kind is SnapshotKind.STANDBY:
        against, advice = await _memory_reasons(context, snapshot.template)
        if not boot_pair_comes and not await _has_boot_pair(context, snapshot.template):
            against.append("its memory belongs to a kernel and initrd that are not here")
        return against, advice
    limits = snapshot.template.limits
    available = [
        driver.hypervisor.value
        for driver in context.drivers.values()
        if (await driver.probe()).available and not unkept(limits, driver.limits)
    ]
    wanted = snapshot.source_hypervisor.value
    if not available:
        keeping = "" if limits == DeviceLimits() else " that can keep its limits"
        return [f"no hypervisor is available{keeping}"], []
    if wanted in available:
        return [], []
    return [], [f"{wanted} is not available: fork it with target_hypervisor {available[0]}"]


async def _memory_reasons(context: Context, template: Instance) -> tuple[list[str], list[str]]:
    try:
        _, probe = await context.available_driver(template.hypervisor, template.limits)
    except NotSupported as error:
        return [error.message], []
    reasons, advice = foreign_to(template, probe), []
    if template.accelerator == "kvm" and not template.processor:
        advice.append(
            "it is not known on which processor its memory was captured: its guest may find "
            "instructions missing on another"
        )
    if template.device_layout > DEVICE_LAYOUT:
        reasons.append(
            f"its memory was captured with device layout {template.device_layout}, "
            f"this version knows layouts up to {DEVICE_LAYOUT}"
        )
    return reasons, advice


async def _has_boot_pair(context: Context, template: Instance) -> bool:
    if template.hypervisor is Hypervisor.FAKE and not template.boot:
        return True  # it needs none
    try:
        await context.boot_pair(template.boot)
    except MissingComponent:
        try:  # never needed here so far: ours may be the same
            return (await context.boot_pair()).digest == template.boot
        except StillframeError:
            return False
    except StillframeError:
        return False
    return True
