"""Room for one more snapshot: quotas, and the space that is kept free. Asked before any pause."""

from __future__ import annotations

import contextlib
from pathlib import Path

from stillframe.engine.context import Context
from stillframe.host.capacity import private_bytes
from stillframe.host.files import allocated_bytes, available_bytes, storage_errors
from stillframe.model.errors import InsufficientResources, StorageFull
from stillframe.model.states import InstanceState
from stillframe.model.units import format_size
from stillframe.model.values import Instance

_MAKING = ("snapshot", "import snapshot")


def check_room(context: Context, expected_bytes: int) -> None:
    """Return if a snapshot of about ``expected_bytes`` on disk may be taken; touches nothing.

    Raises InsufficientResources beyond a quota, StorageFull when less than ``min_free_bytes``
    would stay free; message and facts bear the figures.
    """
    settings = context.settings
    count = len(context.records.snapshots) + sum(
        # A live fork's capture is no snapshot that stays: its intent names none.
        intent.verb in _MAKING and "name" in intent.facts
        for intent in context.records.intents.values()
    )
    if 0 < settings.max_snapshots <= count:
        raise InsufficientResources(
            f"the server has {count} snapshots, {settings.max_snapshots} are allowed",
            hint="delete some, or raise limits.max_snapshots",
            snapshots=count,
            max_snapshots=settings.max_snapshots,
        )
    check_space(context, expected_bytes)


def check_space(context: Context, expected_bytes: int, written_bytes: int = 0) -> None:
    """Return if ``expected_bytes`` more may be written of a snapshot, of which some are written.

    Raises as ``check_room``, but for the number of snapshots.
    """
    settings, used = context.settings, stored_bytes(context) + written_bytes
    if settings.max_snapshot_bytes and used + expected_bytes > settings.max_snapshot_bytes:
        raise InsufficientResources(
            f"the snapshots take {format_size(used)} and this one about "
            f"{format_size(expected_bytes)} more; {format_size(settings.max_snapshot_bytes)} are "
            "allowed",
            hint="delete some, or raise limits.max_snapshot_bytes",
            stored_bytes=used,
            expected_bytes=expected_bytes,
            max_snapshot_bytes=settings.max_snapshot_bytes,
        )
    check_free(context, expected_bytes)


def check_free(context: Context, expected_bytes: int) -> None:
    """Return if ``expected_bytes`` more may be written. Raises StorageFull, with the figures.

    What is kept free stays free.
    """
    settings = context.settings
    with storage_errors("look at the free space"):
        free = available_bytes(context.data.root)
    if free - expected_bytes < settings.min_free_bytes:
        raise StorageFull(
            f"{format_size(free)} are free and this takes about "
            f"{format_size(expected_bytes)}; {format_size(settings.min_free_bytes)} are kept free",
            hint="free space in the data directory, or lower limits.min_free",
            free_bytes=free,
            expected_bytes=expected_bytes,
            min_free_bytes=settings.min_free_bytes,
        )


def stored_bytes(context: Context) -> int:
    """What all snapshots take on disk, by their records."""
    return sum(snapshot.stored_bytes for snapshot in context.records.snapshots.values())


def copied_bytes(context: Context, *files: Path) -> int:
    """How many bytes on disk clones of the files take: none where blocks can be shared."""
    if context.shares_blocks:
        return 0
    with contextlib.suppress(FileNotFoundError):
        return sum(allocated_bytes(path) for path in files)
    return 0


def expected_bytes(context: Context, instance: Instance, *, disk: bool = True) -> int:
    """About how many bytes on disk a capture of ``instance``, its ``disk`` included, takes now.

    Clones cost nothing where blocks can be shared, and their data elsewhere; to that come the pages
    that the VMM holds privately, which is what the guest wrote and the VMM's own memory.
    """
    paths = context.data.instance(instance.id)
    cloned = [paths.overlay] if disk else []
    written = 0
    if instance.state is InstanceState.RUNNING and instance.process is not None:
        if instance.hypervisor.seals_memory:  # all of it is written, and its process has none
            written = instance.memory_bytes
        else:
            cloned.append(paths.memory)
            written = min(instance.memory_bytes, private_bytes(instance.process.pid))
    return written + copied_bytes(context, *cloned)
