"""What the verbs share: records, drivers, locks, live VMs and the news of state changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stillframe.engine.settings import EngineSettings
from stillframe.engine.telemetry import Telemetry
from stillframe.guest.connection import AgentConnection
from stillframe.host.capture import BufferBudget
from stillframe.host.files import remove_tree, supports_reflink
from stillframe.images.boot import BootPair, build_boot_pair, load_boot_pair, remove_boot_pair
from stillframe.images.library import ImageLibrary
from stillframe.model.errors import (
    Conflict,
    InvalidRequest,
    InvalidState,
    NotFound,
    NotSupported,
    StillframeError,
)
from stillframe.model.states import InstanceState
from stillframe.model.units import new_id
from stillframe.model.values import (
    CONTRACT_HYPERVISORS,
    DeviceLimits,
    Hypervisor,
    Instance,
    Snapshot,
)
from stillframe.store.paths import DataDirectory, Payload
from stillframe.store.records import Intent, Records
from stillframe.vmm.driver import (
    Driver,
    DriverProbe,
    Limit,
    Machine,
    unkept,
    without_driver,
)

if TYPE_CHECKING:
    from stillframe.engine.keeping.compression import Compressor
    from stillframe.engine.keeping.expanded import ExpandedImages
    from stillframe.engine.logs import Logs
    from stillframe.engine.verbs.warm import WarmForks

log = logging.getLogger("stillframe.engine")
T = TypeVar("T")
_COPIES_AT_ONCE = 8  # they wait for the disk, hardly for a processor
_PATIENCE = 1.0  # seconds that a loaded guest waits for others to be loaded
_VERBS_END = 60.0  # seconds that a server that ends waits for verbs, once its requests are over


class Phases:
    """Milliseconds by phase, in the order they happened."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to phase ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = (time.perf_counter() - began) * 1000
            self.milliseconds[name] = round(self.milliseconds.get(name, 0.0) + spent, 3)

    def total(self) -> dict[str, float]:
        """The phases with ``total`` since this object was made."""
        total = round((time.perf_counter() - self._began) * 1000, 3)
        return {**self.milliseconds, "total": total}


@dataclass(slots=True, eq=False)
class LiveInstance:
    """A VMM that runs, and our conversation with its guest.

    ``ending`` is set by verbs that end the VMM on purpose, so that its exit is no news.
    ``dialling`` is held while connecting; ``news`` is set when the agent reports a change.
    ``greeting`` makes a loaded guest itself; nobody else talks to its agent before that is done.
    ``sibling``: it is a fork that has not been made itself yet, and must not go on without.
    ``captured`` is where an image lies that, with the pages written since, is the guest's memory.
    """

    machine: Machine
    connection: AgentConnection | None = None
    ending: bool = False
    captured: Payload | None = None
    greeting: asyncio.Task[None] | None = None
    sibling: bool = False
    dialling: asyncio.Lock = field(default_factory=asyncio.Lock)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def hang_up(self, why: str) -> None:
        """Close the connection to the agent: what goes on over it fails, and the next is new."""
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.close(why)


class Context:
    """Shared state of the engine. Every part is used from the event loop's thread only."""

    def __init__(  # the parts are many because the verbs share nothing else
        self,
        settings: EngineSettings,
        data: DataDirectory,
        records: Records,
        drivers: Mapping[Hypervisor, Driver],
        images: ImageLibrary,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        make_id: Callable[[], str] = new_id,
    ) -> None:
        self.settings = settings
        self.data = data
        self.records = records
        self.drivers = drivers
        self.images = images
        self.now = now
        self.new_id = make_id
        self.warm: WarmForks  # these are made by the engine: they know this context
        self.expanded: ExpandedImages
        self.compressor: Compressor
        self.logs: Logs
        self.undo_earlier: Callable[[str], Awaitable[None]]
        self.telemetry = Telemetry(records.instances.values, records.snapshots.values)
        self.live: dict[str, LiveInstance] = {}
        self.starts = asyncio.Semaphore(settings.max_concurrent_starts)
        # Where blocks cannot be shared, disks are copied, slowly: no other work is to wait for it.
        self.copying = ThreadPoolExecutor(_COPIES_AT_ONCE, "copy")
        self.capture_budget = BufferBudget(settings.capture_buffer_bytes)
        self.snapshot_users: Counter[str] = Counter()
        self._snapshot_idle = asyncio.Condition()
        self._locks: dict[str, asyncio.Lock] = {}
        self._making: dict[str, asyncio.Timeout] = {}
        self._listeners: dict[str, set[asyncio.Event]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._boot_pair: BootPair | None = None
        self._building_pairs = 0
        self.closing = False
        self._shares_blocks: bool | None = None  # not known yet
        self._loading = 0
        self._few_loading = asyncio.Event()
        self._few_loading.set()
        self._requests = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._freed = asyncio.Event()
        self._verbs = 0
        self._verbs_ended = asyncio.Event()
        self._verbs_ended.set()

    @property
    def shares_blocks(self) -> bool:
        """Whether cloning a file costs nothing in the data directory.

        While that cannot be found out, as on a full disk, it is taken for copying.
        """
        if self._shares_blocks is None:
            with contextlib.suppress(OSError):
                self._shares_blocks = supports_reflink(self.data.root)
        return bool(self._shares_blocks)

    # -- finding ------------------------------------------------------------------------------
    def instance(self, instance_id: str) -> Instance:
        """The record of that id. Raises NotFound."""
        instance = self.records.instances.get(instance_id)
        if instance is None:
            raise NotFound("resource not found", hint="list instances with `stillframe ps`")
        return instance

    def snapshot(self, snapshot_id: str) -> Snapshot:
        """The snapshot of that id. Raises NotFound."""
        snapshot = self.records.snapshots.get(snapshot_id)
        if snapshot is None:
            raise NotFound(
                "snapshot not found", hint="list snapshots with `stillframe snapshot list`"
            )
        return snapshot

    def live_instance(self, instance: Instance) -> LiveInstance:
        """The running VMM of an instance. Raises InvalidState when there is none."""
        live = self.live.get(instance.id)
        if live is None:
            raise InvalidState(
                f"instance must be running (current state: {instance.state.value})",
                state=instance.state.value,
            )
        return live

    def offered(self, hypervisor: Hypervisor) -> Hypervisor:
        """The hypervisor somebody asks for. Raises InvalidRequest for the fake one, if not here.

        It is none of the contract's: only a server that was started with it knows it.
        """
        if hypervisor is Hypervisor.FAKE and hypervisor not in self.drivers:
            raise InvalidRequest(
                "unknown hypervisor 'fake'",
                hint="use one of " + ", ".join(CONTRACT_HYPERVISORS),
                field="hypervisor",
            )
        return hypervisor

    async def available_driver(
        self, hypervisor: Hypervisor, limits: DeviceLimits | None = None
    ) -> tuple[Driver, DriverProbe]:
        """The driver, which can keep ``limits``, and what it found here.

        Raises NotSupported with the reason if it cannot.
        """
        driver = self.drivers.get(hypervisor)
        if driver is None:
            probe = without_driver(hypervisor)
        else:
            probe = await driver.probe()
        if driver is None or not probe.available:
            raise NotSupported(
                f"hypervisor {hypervisor.value} is not available: {probe.reason}", hint=probe.hint
            )
        if limits is not None and (fields := unkept(limits, driver.limits)):
            raise self._unlimited(driver, limits, fields)
        return driver, probe

    def _unlimited(self, driver: Driver, limits: DeviceLimits, fields: list[str]) -> NotSupported:
        able = [
            one.hypervisor.value for one in self.drivers.values() if not unkept(limits, one.limits)
        ]
        words, alike = " and ".join(fields), Limit.BANDWIDTH_ALIKE in driver.limits
        hints = [f"use {' or '.join(able)}"] if able else []
        hints.append("give both directions the same rate" if alike else f"leave {words} out")
        return NotSupported(
            f"{driver.hypervisor.value} cannot limit {words}"
            + (" by a rate of its own" if alike else ""),
            hint=", or ".join(hints),
            field=fields[0],
        )

    async def boot_pair(self, digest: str = "") -> BootPair:
        """The kernel and initrd of that digest, or the newest for an empty one.

        Raises MissingComponent when there is no kernel or agent to build it from.
        """
        if digest:
            return load_boot_pair(self.data.system, digest)
        if self._boot_pair is None:
            self._building_pairs += 1
            try:
                self._boot_pair = await finish(
                    asyncio.to_thread(
                        build_boot_pair,
                        self.settings.kernel_dir,
                        self.settings.agent_binary,
                        self.data.system,
                    )
                )
            finally:
                self._building_pairs -= 1
        return self._boot_pair

    # -- letting go ---------------------------------------------------------------------------
    def release(self, instance: Instance) -> None:
        """Remove the image and the boot pair of what has gone, unless anything refers to them."""
        self.images.release(instance.image_digest)
        self.release_boot_pair(instance.boot)

    def release_boot_pair(self, digest: str) -> None:
        """Remove a kernel and its initrd unless anything refers to them.

        What cannot be removed goes at the next start, and so does what is let go of while the
        present pair is being built: it may be the same.
        """
        present = self._boot_pair is not None and self._boot_pair.digest == digest
        if present or self._building_pairs or not digest or self.records.need_boot_pair(digest):
            return
        try:
            remove_boot_pair(self.data.system, digest)
        except OSError as error:
            log.warning("the boot pair %s cannot be removed: %s", digest[:12], error)

    # -- locks --------------------------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def exclusive(self, instance_id: str, verb: str) -> AsyncIterator[Instance]:
        """Hold the instance for ``verb``; yields its record as it is then.

        Waits for other verbs, but not for its making. What an earlier one could not undo is undone
        first, for until then the instance's files are not those that its record tells of. Raises
        NotFound, InvalidState; HostFailure when that fails again.
        """
        known = self.records.instances.get(instance_id)
        if instance_id in self._making and known and known.state is InstanceState.CREATED:
            raise InvalidState(
                f"cannot {verb}: the instance is still being made",
                hint="wait until it runs, or delete it",
                state=known.state.value,
            )
        async with self._lock(instance_id):
            self.instance(instance_id)  # maybe it was deleted meanwhile
            await self.undo_earlier(instance_id)
            yield self.instance(instance_id)

    @contextlib.asynccontextmanager
    async def making(self, instance_id: str) -> AsyncIterator[None]:
        """Hold a new instance from before there is a record of it until it is committed.

        When it is deleted meanwhile the block is cancelled, so that it undoes what it did, and
        Conflict is raised.
        """
        async with self._lock(instance_id):
            # A deadline that nobody knows beforehand: whoever deletes the instance sets it.
            limit = asyncio.timeout(None)
            try:
                async with limit:
                    self._making[instance_id] = limit
                    yield
            except TimeoutError as error:
                if not limit.expired():
                    raise
                raise Conflict("the instance was deleted while it was being made") from error
            finally:
                self._making.pop(instance_id, None)

    async def call_off(self, instance_id: str) -> bool:
        """Have the making of an instance undone, and wait for that; False if it is made already."""
        limit = self._making.get(instance_id)
        if limit is None:
            return False
        if not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())
        async with self._lock(instance_id):
            return instance_id not in self.records.instances

    @contextlib.asynccontextmanager
    async def _lock(self, instance_id: str) -> AsyncIterator[None]:
        async with self._locks.setdefault(instance_id, asyncio.Lock()):
            try:
                yield
            finally:
                if instance_id not in self.records.instances:
                    self._locks.pop(instance_id, None)

    async def at_rest(self, instance_id: str) -> None:
        """Return when no verb holds the instance."""
        while self.held(instance_id):
            async with self._locks[instance_id]:
                pass

    def held(self, instance_id: str) -> bool:
        """Whether a verb holds the instance."""
        lock = self._locks.get(instance_id)
        return lock is not None and lock.locked()

    @contextlib.asynccontextmanager
    async def using(self, snapshot_id: str) -> AsyncIterator[Snapshot]:
        """Keep a snapshot's files in place during the block. Raises NotFound."""
        snapshot = self.snapshot(snapshot_id)
        self.snapshot_users[snapshot_id] += 1
        try:
            yield snapshot
        finally:
            self.snapshot_users[snapshot_id] -= 1
            async with self._snapshot_idle:
                self._snapshot_idle.notify_all()

    async def snapshot_unused(self, snapshot_id: str) -> None:
        """Return when nobody is ``using`` the snapshot any more."""
        async with self._snapshot_idle:
            await self._snapshot_idle.wait_for(lambda: not self.snapshot_users[snapshot_id])
        del self.snapshot_users[snapshot_id]

    # -- starts -------------------------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """A place among the VMMs that may be started at once; waits for it."""
        self._count_loading(1)
        try:
            async with self.starts:
                yield
        finally:
            self._count_loading(-1)

    def _count_loading(self, step: int) -> None:
        self._loading += step
        few = self._loading < (os.cpu_count() or 1)
        self._few_loading.set() if few else self._few_loading.clear()

    async def rush_over(self) -> None:
        """Return when the starts under way leave a processor free, or after a second.

        In a burst of forks a guest that runs early takes its siblings' processor time, and all of
        them come later; the last ones much later.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._few_loading.wait()

    # -- space --------------------------------------------------------------------------------
    def space_freed(self) -> None:
        """Something was deleted: what found no space is tried again."""
        self.compressor.space_freed()
        freed, self._freed = self._freed, asyncio.Event()
        freed.set()

    async def space_freed_within(self, seconds: float) -> None:
        """Return when something is deleted, or after that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._freed.wait()

    # -- requests -----------------------------------------------------------------------------
    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Say that a request is at work: what can wait, waits meanwhile."""
        self._requests += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._quiet.set()

    async def quiet(self) -> None:
        """Return when no request is at work."""
        await self._quiet.wait()

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Say that a verb is under way: the engine does not close under it."""
        self._verbs += 1
        self._verbs_ended.clear()
        try:
            yield
        finally:
            self._verbs -= 1
            if not self._verbs:
                self._verbs_ended.set()

    async def verbs_ended(self) -> None:
        """Return when no verb is under way: one that was broken off undoes what it did first.

        It may have a guest stand still, which nobody could help when our connections are gone.
        """
        try:
            async with asyncio.timeout(_VERBS_END):
                await self._verbs_ended.wait()
        except TimeoutError:
            log.error("%d verbs do not end; the server ends without them", self._verbs)

    # -- state --------------------------------------------------------------------------------
    def moved(self, instance: Instance, state: InstanceState, **changes: Any) -> Instance:
        """``instance`` in its next state (not yet written), with its phase accounting."""
        now = self.now()
        durations = dict(instance.phase_durations_ms)
        if instance.phase_since is not None:
            spent = max(timedelta(0), now - instance.phase_since)
            phase = instance.state.phase
            durations[phase] = durations.get(phase, 0) + int(spent / timedelta(milliseconds=1))
        for passing in ("state_error", "standby_compression", "standby_compression_at"):
            changes.setdefault(passing, None)
        return replace(
            instance, state=state, phase_since=now, phase_durations_ms=durations, **changes
        )

    def commit(self, instance: Instance, *, fulfils: str | None = None, note: str = "") -> Instance:
        """Write the record, tell whoever waits, and note it in the operations log."""
        self.records.put_instance(instance, fulfils=fulfils)
        self.note(instance.id, note or f"state is {instance.state.value}")
        self.announce(instance.id)
        return instance

    def witness(self, instance: Instance, *, note: str, intent: Intent | None = None) -> None:
        """``commit`` of what has happened already, which a full disk cannot undo.

        If it cannot be written, it is known to this server, and written with the next commit; the
        next server would find out by itself. ``intent`` is what begins with it.
        """
        self.records.put_instance(instance, intent=intent, can_wait=True)
        self.note(instance.id, note)
        self.announce(instance.id)

    def forget(self, instance_id: str) -> None:
        """Drop the record of an instance and what only it needed, and tell whoever waits."""
        gone = self.records.instances.get(instance_id)
        self.records.drop_instance(instance_id)
        if gone is not None:
            self.release(gone)
        self.announce(instance_id)

    def announce(self, instance_id: str) -> None:
        """Wake everyone who listens for changes of an instance."""
        for event in self._listeners.get(instance_id, ()):
            event.set()
        self.expanded.sweep()  # it may have dropped the last link of an image

    @contextlib.contextmanager
    def listening(self, instance_id: str) -> Iterator[asyncio.Event]:
        """An event set at every change of the instance; clear it before looking."""
        event = asyncio.Event()
        listeners = self._listeners.setdefault(instance_id, set())
        listeners.add(event)
        try:
            yield event
        finally:
            listeners.discard(event)
            if not listeners:
                self._listeners.pop(instance_id, None)

    def note(self, instance_id: str, text: str) -> None:
        """Add a line to the operations log of an instance, if it still has a directory."""
        path = self.data.instance(instance_id).log("hypeman")
        line = f"{self.now().isoformat(timespec='milliseconds')} {text}\n"
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(line)
        log.info("%s: %s", instance_id, text)

    # -- tasks --------------------------------------------------------------------------------
    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run ``work`` in the background, supervised: failures are logged, ``close`` waits."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            expected = isinstance(error, StillframeError)
            log.warning("%s: %s", task.get_name(), error, exc_info=None if expected else error)

    async def cancel_background(self) -> None:
        """Cancel what runs in the background and wait for it."""
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def remove(path: Path) -> None:
    """Remove a tree, whatever its size, beside other work; to the end, also when cancelled.

    Raises OSError.
    """
    await finish(asyncio.to_thread(remove_tree, path))


async def finish(work: Awaitable[T]) -> T:
    """Await ``work`` to its end even when cancelled meanwhile; then pass the cancellation on.

    For steps that must not be left half-done, such as the time a guest stands still.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():  # whoever is impatient may cancel more than once
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise
