"""Room for one more snapshot: quotas, and the space that is kept free. Asked before any pause."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from stillframe.engine.context import Context
from stillframe.engine.keeping.stored import nearest_living, payload_beside
from stillframe.host.capacity import private_bytes
from stillframe.host.extents import shared_bytes
from stillframe.host.files import allocated_bytes, available_bytes, storage_errors
from stillframe.model.errors import InsufficientResources, StorageFull
from stillframe.model.states import InstanceState
from stillframe.model.units import format_size
from stillframe.model.values import Instance, SnapshotKind
from stillframe.store.payloads import memory_file
from stillframe.store.records import Intent

_MAKING = ("snapshot", "import snapshot")
EXPECTED = "expected_bytes"  # the fact of such an intent that says what it will take, or has


def check_room(context: Context, expected_bytes: int, stored_bytes: int = 0) -> None:
    """Return if a snapshot may be taken that writes about ``expected_bytes``; touches nothing.

    ``stored_bytes`` is what will count for it: see ``expected_stored``. Raises
    InsufficientResources beyond a quota, StorageFull when less than ``min_free_bytes`` would stay
    free; message and facts bear the figures.
    """
    settings = context.settings
    count = len(context.records.snapshots) + len(_being_made(context))
    if 0 < settings.max_snapshots <= count:
        raise InsufficientResources(
            f"the server has {count} snapshots, {settings.max_snapshots} are allowed",
            hint="delete some, or raise limits.max_snapshots",
            snapshots=count,
            max_snapshots=settings.max_snapshots,
        )
    _check_quota(context, stored_bytes)
    check_free(context, expected_bytes)


def check_space(
    context: Context, expected_bytes: int, written_bytes: int = 0, *, own: str = ""
) -> None:
    """Return if ``expected_bytes`` more may be written of a snapshot, of which some are written.

    ``own`` is its id. Raises as ``check_room``, but for the number of snapshots.
    """
    _check_quota(context, expected_bytes + written_bytes, own)
    check_free(context, expected_bytes)


def _check_quota(context: Context, expected_bytes: int, own: str = "") -> None:
    allowed = context.settings.max_snapshot_bytes
    if not allowed:
        return
    used = stored_bytes(context)
    announced = (i.facts.get(EXPECTED, "") for i in _being_made(context) if i.subject != own)
    used += sum(int(size) for size in announced if size.isdecimal())  # it may be damaged
    if used + expected_bytes > allowed:
        raise InsufficientResources(
            f"the snapshots take {format_size(used)} and this one about "
            f"{format_size(expected_bytes)} more; {format_size(allowed)} are allowed",
            hint="delete some, or raise limits.max_snapshot_bytes",
            stored_bytes=used,
            expected_bytes=expected_bytes,
            max_snapshot_bytes=allowed,
        )


def _being_made(context: Context) -> list[Intent]:
    """The captures and imports under way whose snapshots will stay.

    A live fork's capture will not: its intent names none.
    """
    intents = context.records.intents.values()
    return [i for i in intents if i.verb in _MAKING and "name" in i.facts]


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
    """What all snapshots take on disk together: see ``stored.py``."""
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
        if not instance.hypervisor.seals_memory:
            cloned.append(paths.memory)
        written = _written_bytes(instance, instance.process.pid)
    return written + copied_bytes(context, *cloned)


async def expected_stored(context: Context, instance: Instance, kind: SnapshotKind) -> int:
    """About what will count for a snapshot of ``instance``: what it writes, links and clones.

    What it will share with the snapshot before it counts there. Without a quota it is not asked.
    """
    if not context.settings.max_snapshot_bytes:
        return 0
    paths, written = context.data.instance(instance.id), 0
    files = [paths.overlay]
    if kind is SnapshotKind.STANDBY and instance.state is InstanceState.STANDBY:
        found = memory_file(paths.standby)
        files += [found[0]] if found is not None else []
    elif instance.process is not None:
        files += [] if instance.hypervisor.seals_memory else [paths.memory]
        written = _written_bytes(instance, instance.process.pid)
    parent = instance.head_snapshot_id or instance.parent_snapshot_id
    beside = payload_beside(context, nearest_living(context, parent))

    def cloned() -> int:
        total = 0
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                total += allocated_bytes(path)
                if beside is not None:
                    total -= shared_bytes(path, beside.directory / path.name)
        return total

    with storage_errors("look at what is captured"):
        return written + await asyncio.to_thread(cloned)


def _written_bytes(instance: Instance, pid: int) -> int:
    """What a capture writes of a running guest: the pages that its VMM holds privately."""
    if instance.hypervisor.seals_memory:  # all of it is written, and its process has none
        return instance.memory_bytes
    return min(instance.memory_bytes, private_bytes(pid))
