"""Warm forks: VMMs started and loaded ahead of a request, standing still until a fork takes one.

One task fills the pools, one VMM at a time and only while no request is at work. A warm fork has
an id, a directory and an intent, but no record: after a crash, recovery ends it like any half-made
fork. How many a snapshot is to have is kept in its record, and filled again by the next server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from stillframe.engine.context import Context, Phases
from stillframe.engine.interface import ForkRequest, WarmStatus
from stillframe.engine.keeping.verify import refuse_damaged
from stillframe.engine.loaded import check_stored, let_run, load_paused
from stillframe.engine.machines import end
from stillframe.engine.telemetry import Operation
from stillframe.engine.verbs.fork import Source, child_of, make_disks
from stillframe.host.files import remove_tree
from stillframe.host.process import private_memory
from stillframe.model.errors import InvalidRequest, StillframeError
from stillframe.model.units import format_size
from stillframe.model.values import Instance, Snapshot, SnapshotKind
from stillframe.store.records import Intent
from stillframe.vmm.driver import Machine

log = logging.getLogger("stillframe.warm")
MAX_WARM = 1000
_AFTER_FAILURE = 60.0  # seconds until what failed is tried again


@dataclass(slots=True, eq=False)
class WarmFork:
    """A loaded VMM that stands still. ``undo`` ends it and removes its files and intent."""

    snapshot_id: str
    child: Instance
    machine: Machine
    undo: contextlib.AsyncExitStack
    memory_bytes: int
    watch: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Pool:
    """The warm forks of one snapshot.

    ``limited_by`` is why no more are made. It goes when something else does, or, when it was a
    failure, at ``again_at`` (seconds of the event loop's clock).
    """

    ready: deque[WarmFork] = field(default_factory=deque)
    filling: int = 0
    limited_by: str | None = None
    again_at: float = math.inf

    def failed(self, reason: str) -> None:
        """Make no more for a while."""
        self.limited_by = reason
        self.again_at = asyncio.get_running_loop().time() + _AFTER_FAILURE

    def free(self) -> None:
        """Make more, if more are wanted."""
        self.limited_by, self.again_at = None, math.inf


class WarmForks:
    """All pools. Used from the event loop's thread only."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pools: dict[str, _Pool] = {}
        self._changed = asyncio.Event()
        self._filler: asyncio.Task[None] | None = None
        self._endings: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Begin to fill what the records ask for."""
        self._context.telemetry.watch_warm(self.statuses)
        self._filler = asyncio.create_task(self._fill_for_ever(), name="fill warm forks")

    async def close(self) -> None:
        """End every warm VMM."""
        if self._filler is not None:
            self._filler.cancel()
            await asyncio.wait([self._filler])
        for snapshot_id in list(self._pools):
            self._drop(snapshot_id, keep=0)
        await self._ended()

    def statuses(self) -> list[WarmStatus]:
        """The status of every snapshot that has or is to have warm forks."""
        snapshots = self._context.records.snapshots
        return [
            self.status(snapshot)
            for snapshot in snapshots.values()
            if snapshot.warm_count or snapshot.id in self._pools
        ]

    def status(self, snapshot: Snapshot) -> WarmStatus:
        """What a snapshot has and is to have."""
        pool = self._pools.get(snapshot.id, _Pool())
        return WarmStatus(
            target=snapshot.warm_count,
            ready=len(pool.ready),
            filling=pool.filling,
            memory_bytes=sum(warm.memory_bytes for warm in pool.ready),
            limited_by=pool.limited_by if len(pool.ready) < snapshot.warm_count else None,
        )

    async def set_count(self, snapshot_id: str, count: int) -> WarmStatus:
        """Keep ``count`` forks warm from now on. Raises NotFound, InvalidRequest."""
        snapshot = self._context.snapshot(snapshot_id)
        if not 0 <= count <= MAX_WARM:
            raise InvalidRequest(f"count must be 0 to {MAX_WARM}, not {count}")
        if count and snapshot.kind is not SnapshotKind.STANDBY:
            raise InvalidRequest(
                "a Stopped snapshot holds no memory to keep warm",
                hint="take a snapshot of the running instance",
            )
        snapshot = replace(snapshot, warm_count=count)
        self._context.records.update_snapshot(snapshot)
        self._pools.setdefault(snapshot_id, _Pool()).free()
        self._drop(snapshot_id, keep=count)
        await self._ended()
        self._changed.set()
        return self.status(snapshot)

    async def forget(self, snapshot_id: str) -> None:
        """End the warm forks of a snapshot that is being deleted."""
        self._drop(snapshot_id, keep=0)
        self._pools.pop(snapshot_id, None)
        await self._ended()

    async def settled(self, snapshot_id: str) -> WarmStatus:
        """The status once all that are wanted are ready, or no more will come."""
        with self._context.listening(snapshot_id) as changed:
            while True:
                status = self.status(self._context.snapshot(snapshot_id))
                if status.ready >= status.target or status.limited_by is not None:
                    return status
                await changed.wait()
                changed.clear()

    def waiting(self) -> list[WarmFork]:
        """All that stand ready."""
        return [warm for pool in self._pools.values() for warm in pool.ready]

    def take(self, snapshot_id: str) -> WarmFork | None:
        """A warm fork, now the caller's to ``claim``; None when there is none."""
        pool = self._pools.get(snapshot_id)
        if pool is None:
            return None
        self._room_again()
        if not pool.ready:
            return None
        warm = pool.ready.popleft()
        self._unwatch(warm)
        return warm

    def _room_again(self) -> None:
        for pool in self._pools.values():
            pool.free()
        self._changed.set()

    async def claim(
        self,
        warm: WarmFork,
        request: ForkRequest,
        tags: Mapping[str, str] | None,
        phases: Phases,
    ) -> Instance:
        """Give a taken fork its name and let it run. On failure it is ended, nothing is left.

        Raises NameConflict, VmmFailure, Conflict (deleted meanwhile).
        """
        child, now = warm.child, self._context.now()
        child = replace(
            child,
            name=request.name,
            tags=child.tags if tags is None else tags,
            env={**child.env, **(request.env or {})},
            created_at=now,
            phase_since=now,
        )
        making = self._context.making(child.id)
        async with making, contextlib.AsyncExitStack() as undo:
            undo.callback(self._context.forget, child.id)
            undo.callback(remove_tree, self._context.data.instance(child.id).directory)
            undo.push_async_callback(end, self._context, child.id)
            await undo.enter_async_context(warm.undo)
            child = await let_run(
                self._context, child, warm.machine, phases,
                operation=Operation.WARM_FORK, fulfils=child.id, note="forked (warm)",
                undo=warm.undo,
            )  # fmt: skip
            undo.pop_all()
        return child

    # -- filling ------------------------------------------------------------------------------
    async def _fill_for_ever(self) -> None:
        while True:
            self._changed.clear()
            snapshot = self._next()
            if snapshot is None:
                await self._news()
                continue
            await self._context.quiet()
            pool = self._pools.setdefault(snapshot.id, _Pool())
            pool.filling = 1
            try:
                await self._fill_one(snapshot.id, pool)
            except StillframeError as error:
                log.warning("a fork of %s could not be kept warm: %s", snapshot.id, error)
                pool.failed(f"it failed: {error.message}")
            except Exception:  # a fault of ours: the other pools go on
                log.exception("a fork of %s could not be kept warm", snapshot.id)
                pool.failed("it failed for an internal error, see the server's log")
            finally:
                pool.filling = 0
                self._context.announce(snapshot.id)

    async def _news(self) -> None:
        """Return when something has changed, or a failed pool is to be tried again."""
        again = min((pool.again_at for pool in self._pools.values()), default=math.inf)
        now = asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if math.isinf(again) else max(0.0, again - now)):
                await self._changed.wait()

    def _next(self) -> Snapshot | None:
        """The snapshot that lacks the most and is not limited."""
        now = asyncio.get_running_loop().time()
        for pool in self._pools.values():
            if pool.again_at <= now:
                pool.free()
        lacking = [
            (snapshot.warm_count - len(pool.ready), snapshot)
            for snapshot in self._context.records.snapshots.values()
            if snapshot.warm_count
            and (pool := self._pools.setdefault(snapshot.id, _Pool())).limited_by is None
            and len(pool.ready) < snapshot.warm_count
        ]
        return max(lacking, key=lambda pair: pair[0])[1] if lacking else None

    async def _fill_one(self, snapshot_id: str, pool: _Pool) -> None:
        held = self.waiting()
        used = sum(warm.memory_bytes for warm in held)
        # The next one will need about as much as the others did.
        needed = max((warm.memory_bytes for warm in held), default=0)
        budget = self._context.settings.warm_memory_bytes
        if used + needed > budget:
            pool.limited_by = (
                f"the memory budget for warm forks: {format_size(used)} of "
                f"{format_size(budget)} are used"
            )
            return
        async with self._context.using(snapshot_id) as snapshot:
            warm = await self._make(snapshot)
        current = self._context.records.snapshots.get(snapshot_id)
        if current is None or len(pool.ready) >= current.warm_count:
            await warm.undo.aclose()  # no longer wanted
            return
        pool.ready.append(warm)
        warm.watch = asyncio.create_task(self._watch(warm, pool), name="watch warm fork")

    async def _make(self, snapshot: Snapshot) -> WarmFork:
        context, phases = self._context, Phases()
        refuse_damaged(snapshot)
        payload = context.data.snapshot(snapshot.id)
        source = Source(snapshot.template, payload.overlay, payload, snapshot.id)
        child = child_of(context, source, ForkRequest(""))
        async with contextlib.AsyncExitStack() as undo:
            await check_stored(payload)
            context.records.intend(Intent(child.id, "fork", {"warm": snapshot.id}))
            undo.callback(context.records.fulfil, child.id)
            disk = await make_disks(context, child, source, undo)
            machine = await load_paused(context, child, payload, phases, undo)
            await asyncio.shield(disk)
            held = await asyncio.to_thread(private_memory, machine.process.pid)
            return WarmFork(snapshot.id, child, machine, undo.pop_all(), held)

    async def _watch(self, warm: WarmFork, pool: _Pool) -> None:
        """Replace a warm VMM that ended by itself."""
        await warm.machine.wait_exit()
        if warm in pool.ready:
            log.warning("warm fork %s ended by itself", warm.child.id)
            pool.ready.remove(warm)
            self._end(warm)
            self._changed.set()

    def _unwatch(self, warm: WarmFork) -> None:
        if warm.watch is not None:
            warm.watch.cancel()

    # -- ending -------------------------------------------------------------------------------
    def _drop(self, snapshot_id: str, *, keep: int) -> None:
        pool = self._pools.get(snapshot_id, _Pool())
        while len(pool.ready) > keep:
            warm = pool.ready.pop()
            self._unwatch(warm)
            self._end(warm)
        self._changed.set()

    def _end(self, warm: WarmFork) -> None:
        task = asyncio.create_task(warm.undo.aclose(), name=f"end warm fork {warm.child.id}")
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        task.add_done_callback(lambda _: self._context.expanded.sweep())
        task.add_done_callback(lambda _: self._room_again())

    async def _ended(self) -> None:
        if self._endings:
            await asyncio.wait(list(self._endings))
