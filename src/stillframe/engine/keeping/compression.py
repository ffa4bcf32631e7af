"""Compression in the background: a snapshot's memory, or a standby image, becomes frames.

The record is the journal. A snapshot is ``compressing`` from its very commit, a standby image is to
be compressed while its instance says so; what a server leaves undone the next one goes on with.
Until the switch the raw image is there to be shared, so neither a fork nor a restore in place has
to wait or to call it off. What ends the payload itself does: a deletion, or the instance's restore.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

from stillframe.engine.context import Context, Phases
from stillframe.engine.keeping.expanded import cancellable
from stillframe.engine.keeping.quota import check_free
from stillframe.engine.keeping.stored import measure_anew, measure_heirs
from stillframe.engine.telemetry import Operation
from stillframe.host.files import allocated_bytes, storage_errors
from stillframe.model.errors import HostFailure, InvalidRequest, StillframeError, StorageFull
from stillframe.model.states import InstanceState
from stillframe.model.units import LONGEST_DURATION
from stillframe.model.values import (
    CompressionAlgorithm,
    CompressionConfig,
    CompressionState,
    Instance,
    Snapshot,
    SnapshotPolicy,
)
from stillframe.store.compression import compress, effective
from stillframe.store.manifest import damaged
from stillframe.store.paths import Payload
from stillframe.store.payloads import (
    PayloadSize,
    add_tables,
    image_key,
    measure,
    memory_file,
    open_content,
    settle,
    switch_to_compressed,
)

log = logging.getLogger("stillframe.compression")
T = TypeVar("T")
_NICENESS = 10  # of 19: whoever serves a request goes first


def chosen(
    context: Context, instance: Instance, requested: CompressionConfig | None
) -> CompressionConfig | None:
    """What to compress with: by the request, else the instance, else the server; None for not.

    The first that says anything decides, also when it says no. Algorithm and level are filled in.
    Raises InvalidRequest.
    """
    policy = instance.snapshot_policy or SnapshotPolicy()
    for config in (requested, policy.compression, context.settings.default_compression):
        if config is not None:
            return CompressionConfig(True, *effective(config)) if config.enabled else None
    return None


def delay_of(instance: Instance, requested: timedelta | None) -> timedelta:
    """How long a standby image stays raw: by the request, else the instance, else not at all.

    Raises InvalidRequest (``invalid_compression_delay``).
    """
    policy = instance.snapshot_policy or SnapshotPolicy()
    delay = policy.standby_compression_delay if requested is None else requested
    if delay is not None and delay < timedelta(0):
        raise InvalidRequest("the delay is negative", code="invalid_compression_delay")
    return delay or timedelta(0)


def check_policy(policy: SnapshotPolicy | None) -> None:
    """Raises InvalidRequest for a policy that no instance can be put to sleep by."""
    if policy is None:
        return
    if policy.compression is not None and policy.compression.enabled:
        effective(policy.compression)
    delay = policy.standby_compression_delay
    if delay is not None and not timedelta(0) <= delay <= LONGEST_DURATION:
        raise InvalidRequest(
            "the delay of the compression is negative, or longer than 292 years",
            code="invalid_compression_delay",
        )


def begun(snapshot: Snapshot, payload: Payload, config: CompressionConfig | None) -> Snapshot:
    """A snapshot's record at its commit, with the state of its memory.

    ``config`` is what it is to be compressed with; it may be so already, shared with its source.
    Raises DamagedData, OSError.
    """
    found = memory_file(payload)
    if config is None or found is None:
        return snapshot
    if found[1] is not None:
        return replace(snapshot, **_compressed(payload, config))
    return replace(snapshot, compression=config, compression_state=CompressionState.COMPRESSING)


def _compressed(payload: Payload, config: CompressionConfig) -> dict[str, Any]:
    found = memory_file(payload)
    if found is None:
        raise damaged(payload.memory.name, "is missing")
    with open_content(payload, payload.memory.name) as reader:
        return {
            "compression": config,
            "compression_state": CompressionState.COMPRESSED,
            "compression_error": None,
            "compressed_size_bytes": found[0].stat().st_size,
            "uncompressed_size_bytes": reader.size,
        }


class Compressor:
    """The compressions under way and to come. Used from the event loop's thread only.

    ``sleep`` waits that many seconds until a standby image is due.
    """

    def __init__(
        self, context: Context, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._context = context
        self.sleep = sleep
        self._jobs: dict[str, asyncio.Task[None]] = {}
        # Snapshots and instances to be tried again, each with the bytes that it lacked if known.
        self._lacking_space: dict[str, int] = {}
        count = context.settings.max_concurrent_compressions
        self._places = asyncio.Semaphore(count)
        # Threads of their own: they are nice for good, and so are the threads that they start.
        self._threads = ThreadPoolExecutor(count, "compress", _be_nice)

    def open(self) -> None:
        """Go on with what an earlier server left undone."""
        for snapshot in list(self._context.records.snapshots.values()):
            if snapshot.compression_state is CompressionState.ERROR:
                self._try_again(snapshot.id)  # whatever it was may have been mended meanwhile
            else:
                self.want_snapshot(snapshot)
        for instance in self._context.records.instances.values():
            self.want_standby(instance)

    async def close(self) -> None:
        """Break off all; the next server goes on."""
        for key in list(self._jobs):
            await self.cancel(key)
        self._threads.shutdown()

    def want_snapshot(self, snapshot: Snapshot) -> None:
        """Compress a committed snapshot in the background, if its record says so."""
        if snapshot.compression_state is CompressionState.COMPRESSING:
            self._start(snapshot.id, self._snapshot)

    def want_standby(self, instance: Instance) -> None:
        """Compress a committed standby image when it is due, if the record says so."""
        if instance.state is InstanceState.STANDBY and instance.standby_compression is not None:
            self._start(instance.id, self._standby)

    def space_freed(self) -> None:
        """Try again what found no space and may find it now: something has been deleted.

        What is tried and finds too little is put off again. What certainly would is not tried, for
        each trial is two commits, and many are deleted when space is short.
        """
        for key, expected_bytes in sorted(self._lacking_space.items()):
            try:
                check_free(self._context, expected_bytes)
            except HostFailure:
                continue
            self._try_again(key)

    def _put_off(self, key: str, error: Exception) -> None:
        if isinstance(error, StorageFull):
            expected = error.facts.get("expected_bytes")
            self._lacking_space[key] = expected if isinstance(expected, int) else 0

    def _try_again(self, key: str) -> None:
        snapshot = self._context.records.snapshots.get(key)
        instance = self._context.records.instances.get(key)
        if snapshot is not None:
            with contextlib.suppress(HostFailure):  # it stays as it is known to be
                self._update(
                    key, compression_state=CompressionState.COMPRESSING, compression_error=None
                )
                self.want_snapshot(self._context.snapshot(key))
        elif instance is not None and not self._context.held(key):
            # Whoever holds it may have called this off. Else it is tried at the next deletion.
            self.want_standby(instance)

    async def cancel(self, key: str) -> None:
        """Break off the compression for a snapshot or instance and wait for its end.

        Nothing of it is left: neither a job nor the wish to try again when there is space.
        """
        while (job := self._jobs.get(key)) is not None:
            job.cancel()
            await asyncio.wait([job])
            self._forget(key, job)
        self._lacking_space.pop(key, None)

    async def settled(self, key: str) -> None:
        """Return when nothing is at work, nor to come, for a snapshot or instance."""
        job = self._jobs.get(key)
        if job is not None:
            await asyncio.wait([job])

    def _start(self, key: str, work: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        known = self._jobs.get(key)
        # ``cancel`` must find whoever is at work, so there is never more than one.
        if self._context.closing or (known is not None and not known.done()):
            return
        self._lacking_space.pop(key, None)
        job = self._context.spawn(work(key), name=f"compress {key}")
        self._jobs[key] = job
        job.add_done_callback(lambda _: self._forget(key, job))

    def _forget(self, key: str, job: asyncio.Task[None]) -> None:
        if self._jobs.get(key) is job:  # it may have a successor already
            del self._jobs[key]

    # -- snapshots ----------------------------------------------------------------------------
    async def _snapshot(self, snapshot_id: str) -> None:
        snapshot = self._context.records.snapshots.get(snapshot_id)
        if snapshot is None or snapshot.compression is None:
            return
        payload = self._context.data.snapshot(snapshot_id)
        try:
            size = await self._compress(payload, snapshot.compression)
            with storage_errors("look at the compressed image"):
                facts = await asyncio.to_thread(_compressed, payload, snapshot.compression)
        except Exception as error:
            self._update(
                snapshot_id,
                can_wait=True,
                compression_state=CompressionState.ERROR,
                compression_error=_told(error, f"snapshot {snapshot_id}"),
            )
            self._put_off(snapshot_id, error)
        else:
            self._update(
                snapshot_id, can_wait=True, size_bytes=size.size, stored_bytes=size.stored, **facts
            )
            await measure_anew(self._context, snapshot_id, snapshot.stored_beside)
            await measure_heirs(self._context, snapshot_id, snapshot_id)

    def _update(self, snapshot_id: str, *, can_wait: bool = False, **changes: Any) -> None:
        """Change the record as it is by now; gone stays gone.

        With ``can_wait``, for what has happened already, it is written later if it cannot be now.
        """
        snapshot = self._context.records.snapshots.get(snapshot_id)
        if snapshot is not None:
            self._context.records.update_snapshot(replace(snapshot, **changes), can_wait=can_wait)
            self._context.announce(snapshot_id)

    # -- standby images -----------------------------------------------------------------------
    async def _standby(self, instance_id: str) -> None:
        instance = self._context.records.instances.get(instance_id)
        if instance is None or instance.standby_compression is None:
            return
        config, due = instance.standby_compression, instance.standby_compression_at
        if due is not None and (wait := due - self._context.now()) > timedelta(0):
            await self.sleep(wait.total_seconds())
        try:
            standby = self._context.data.instance(instance_id).standby
            await self._compress(standby, config)
        except Exception as error:
            told = _told(error, f"the standby image of {instance_id}")
            self._context.note(instance_id, f"the standby image stays as it is: {told}")
            self._put_off(instance_id, error)
        else:
            self._context.note(instance_id, "standby image compressed")
            self._context.announce(instance_id)

    # -- both ---------------------------------------------------------------------------------
    async def _compress(self, payload: Payload, config: CompressionConfig) -> PayloadSize:
        """Compress a payload's memory, unless it is so already; its size then.

        Raises StorageFull, HostFailure, DamagedData; the raw image is then kept.
        """
        telemetry = self._context.telemetry
        try:
            async with self._places:
                phases = Phases()
                with storage_errors("compress the memory image"):
                    if await self._in_thread(lambda _: _prepare(payload)) is None:
                        check_free(self._context, allocated_bytes(payload.memory))
                        with phases.measure("compress"):
                            await self._in_thread(lambda stop: _build(payload, config, stop))
                        with phases.measure("switch"):
                            await self._switch(payload, config)
                        telemetry.observe(Operation.COMPRESS, phases.total())
                    return await self._in_thread(lambda _: measure(payload))
        except Exception as error:
            telemetry.count_failure(Operation.COMPRESS, error)
            with contextlib.suppress(OSError):
                await self._in_thread(lambda _: settle(payload))
            raise

    async def _switch(self, payload: Payload, config: CompressionConfig) -> None:
        """Make the built image the valid one.

        While others map the raw image it is kept as the expanded one, so that forks to come share
        it with them.
        """
        expanded, key = self._context.expanded, await asyncio.to_thread(image_key, payload)
        algorithm, _ = effective(config)

        def switch(_: Callable[[], bool]) -> None:
            if payload.memory.stat().st_nlink > 1:
                with contextlib.suppress(FileExistsError):
                    expanded.path(key).hardlink_to(payload.memory)
            try:
                switch_to_compressed(payload, algorithm)
            except OSError as error:
                found = memory_file(payload)
                if found is None or found[1] is None:
                    raise
                # The raw image is gone already, so the compressed one was durable before that.
                log.warning("the removal of %s may not be durable: %s", payload.memory, error)

        try:
            await self._in_thread(switch)
        finally:
            expanded.keep(key)

    async def _in_thread(self, work: Callable[[Callable[[], bool]], T]) -> T:
        return await cancellable(work, self._threads)


def _told(error: Exception, what: str) -> str:
    """What to say of a failure; one of ours goes into the log whole."""
    if isinstance(error, StillframeError):
        log.warning("%s was not compressed: %s", what, error)
        return error.message
    log.error("%s was not compressed", what, exc_info=error)
    return "internal error, see the server's log"


def _be_nice() -> None:
    """Have this thread, and those it starts, give way to others (setpriority(2), on Linux)."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)


def _prepare(payload: Payload) -> CompressionAlgorithm | None:
    """Remove what an interrupted attempt left; how the memory is compressed already, if it is."""
    settle(payload)
    found = memory_file(payload)
    if found is None:
        raise damaged(payload.memory.name, "is missing")
    if found[1] is None:
        add_tables(payload)  # an expanded image is named by the digest of its table
    return found[1]


def _build(payload: Payload, config: CompressionConfig, cancelled: Callable[[], bool]) -> None:
    """Write the compressed image beside."""
    algorithm, _ = effective(config)
    building = payload.being_built(payload.compressed(algorithm))
    compress(payload.memory, building, config, cancelled=cancelled)
