"""The engine: every verb under one roof. The work is in the verbs' own files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from stillframe.engine import guest, wait
from stillframe.engine.context import Context
from stillframe.engine.interface import (
    CreateRequest,
    ExecRequest,
    ExecSession,
    ForkOutcome,
    ForkRequest,
    ReadEntry,
    WaitResult,
    WarmStatus,
)
from stillframe.engine.keeping import stored
from stillframe.engine.keeping.compression import Compressor
from stillframe.engine.keeping.expanded import ExpandedImages
from stillframe.engine.keeping.schedule import Scheduler
from stillframe.engine.keeping.verbs import KeepingVerbs
from stillframe.engine.logs import Logs
from stillframe.engine.moving.export import Places
from stillframe.engine.moving.uploads import Uploads
from stillframe.engine.settings import EngineSettings
from stillframe.engine.telemetry import count_failures
from stillframe.engine.verbs import (
    create,
    fork,
    recover,
    restore_snapshot,
    snapshot,
    standby,
    stop,
)
from stillframe.engine.verbs.warm import WarmForks
from stillframe.host.files import keep_descriptors
from stillframe.images.library import ImageLibrary
from stillframe.model.errors import Ambiguous, Conflict, NotFound
from stillframe.model.states import InstanceState
from stillframe.model.values import (
    CONTRACT_HYPERVISORS,
    CompressionConfig,
    Hypervisor,
    Image,
    Instance,
    PathInfo,
    Snapshot,
    SnapshotKind,
)
from stillframe.store.paths import DataDirectory
from stillframe.store.records import Records
from stillframe.vmm.driver import Driver, DriverProbe, without_driver

Kept = TypeVar("Kept", Instance, Snapshot, Image)


@count_failures
class Engine(KeepingVerbs):
    """Implements ``EngineInterface``; see there for what each verb does and raises."""

    def __init__(self, settings: EngineSettings, drivers: Sequence[Driver]) -> None:
        """An engine on ``settings.data_dir``; nothing happens before ``open``."""
        data = DataDirectory(settings.data_dir)
        data.create()
        self._records = Records(data.database)
        images = ImageLibrary(data.images, self._records)
        self.context = Context(
            settings, data, self._records, {d.hypervisor: d for d in drivers}, images
        )
        self.context.warm = WarmForks(self.context)
        self.context.expanded = ExpandedImages(self.context)
        self.context.compressor = Compressor(self.context)
        self.context.logs = Logs(self.context)
        self.scheduler = Scheduler(self.context)
        self.uploads = Uploads(self.context)
        self.places = Places()

    async def open(self) -> None:
        """Recover what an earlier server left, adopt its VMs, and be ready."""
        keep_descriptors()
        await recover.recover(self.context)
        await stored.settle(self.context)
        self.context.expanded.open()
        self.context.warm.open()
        self.context.compressor.open()
        self.scheduler.start()
        self.context.logs.start()

    async def close(self) -> None:
        """Stop watching; VMs run on."""
        self.context.closing = True
        await self.context.images.close()  # whoever waits for one need not be waited for
        await self.context.verbs_ended()
        await self.context.warm.close()
        await self.context.compressor.close()
        await self.context.expanded.close()
        await self.context.cancel_background()
        await self.uploads.close()
        await self.context.images.close()
        for live in self.context.live.values():
            if live.connection is not None:
                await live.connection.close()
            await live.machine.close()
        self.context.live.clear()
        self.context.copying.shutdown()
        self.scheduler.close()
        self._records.close()

    # -- instances ----------------------------------------------------------------------------
    def find_instance(self, reference: str) -> Instance:
        """By id, name or unique id prefix. Raises NotFound, Ambiguous."""
        records = self.context.records
        exact = records.instances.get(reference) or records.instance_by_name(reference)
        if exact is not None:
            return exact
        matches = [
            i for i in records.instances.values() if reference and i.id.startswith(reference)
        ]
        if len(matches) > 1:
            candidates = ", ".join(f"{i.id} ({i.name})" for i in matches[:5])
            raise Ambiguous(
                "multiple resources match, use full ID",
                hint=f"say which: {candidates}",
                matches=len(matches),
            )
        if not matches:
            raise NotFound("resource not found")
        return matches[0]

    def list_instances(
        self, *, state: InstanceState | None = None, tags: Mapping[str, str] | None = None
    ) -> list[Instance]:
        """All instances that match every given filter, oldest first."""
        return _by_age(
            i
            for i in self.context.records.instances.values()
            if state in (None, i.state) and _bears(i, tags)
        )

    async def create(self, request: CreateRequest) -> Instance:
        """Boot a new instance; returns while it is still Initializing."""
        with self.context.busy():
            made = await create.create(self.context, request)
        if made.expires_at is not None:
            self.scheduler.wake()
        return made

    async def start(
        self,
        instance_id: str,
        *,
        entrypoint: Sequence[str] | None = None,
        cmd: Sequence[str] | None = None,
    ) -> Instance:
        """Boot a Stopped instance again on its disks; overrides persist."""
        with self.context.busy():
            return await create.start(self.context, instance_id, entrypoint=entrypoint, cmd=cmd)

    async def stop(self, instance_id: str) -> Instance:
        """Shut the guest down (agent, then SIGKILL)."""
        return await stop.stop(self.context, instance_id)

    async def delete(self, instance_id: str, *, graceful: bool = True) -> None:
        """End the instance and remove all of it; its snapshots stay."""
        await stop.delete(self.context, instance_id, graceful=graceful)

    async def standby(
        self,
        instance_id: str,
        *,
        compression: CompressionConfig | None = None,
        compression_delay: timedelta | None = None,
    ) -> Instance:
        """Capture memory and devices durably, then end the VMM."""
        with self.context.busy():
            return await standby.standby(
                self.context,
                instance_id,
                compression=compression,
                compression_delay=compression_delay,
            )

    async def restore(self, instance_id: str) -> Instance:
        """Bring an instance in Standby back to Running."""
        with self.context.busy():
            return await standby.restore(self.context, instance_id)

    async def fork(
        self,
        instance_id: str,
        *,
        name: str,
        from_running: bool = False,
        target_state: InstanceState | None = None,
    ) -> Instance:
        """Fork an instance (Stopped, Standby, or Running with ``from_running``)."""
        with self.context.busy():
            return await fork.fork_instance(
                self.context,
                instance_id,
                name=name,
                from_running=from_running,
                target_state=target_state,
            )

    async def wait(
        self, instance_id: str, *, state: InstanceState, timeout: timedelta
    ) -> WaitResult:
        """Wait for a state as the contract says."""
        return await wait.wait(self.context, instance_id, state=state, timeout=timeout)

    def logs(self, instance_id: str, *, source: str, tail: int, follow: bool) -> AsyncIterator[str]:
        """Lines of the app, vmm or hypeman log."""
        return self.context.logs.lines(instance_id, source=source, tail=tail, follow=follow)

    async def exec(self, instance_id: str, request: ExecRequest) -> ExecSession:
        """Start a command in a Running guest."""
        return await guest.execute(self.context, instance_id, request)

    async def stat(self, instance_id: str, path: str, *, follow: bool) -> PathInfo:
        """What is at ``path`` in the guest."""
        return await guest.stat(self.context, instance_id, path, follow=follow)

    async def write_path(
        self,
        instance_id: str,
        path: str,
        data: AsyncIterator[bytes] | None,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
    ) -> int:
        """Write a file (``data`` its bytes) or make a directory (``data`` None); bytes written."""
        return await guest.write_path(
            self.context, instance_id, path, data, mode=mode, uid=uid, gid=gid
        )

    def read_path(self, instance_id: str, path: str, *, follow: bool) -> AsyncIterator[ReadEntry]:
        """A file or tree out of the guest, depth first."""
        return guest.read_path(self.context, instance_id, path, follow=follow)

    # -- snapshots ----------------------------------------------------------------------------
    def find_snapshot(self, reference: str) -> Snapshot:
        """By exact id (the contract's rule). Raises NotFound."""
        return self.context.snapshot(reference)

    def list_snapshots(
        self,
        *,
        source_instance_id: str | None = None,
        kind: SnapshotKind | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[Snapshot]:
        """All snapshots that match every given filter, oldest first."""
        return _by_age(
            s
            for s in self.context.records.snapshots.values()
            if source_instance_id in (None, s.source_instance_id)
            and kind in (None, s.kind)
            and name in (None, s.name)
            and _bears(s, tags)
        )

    async def snapshot(
        self,
        instance_id: str,
        *,
        kind: SnapshotKind,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        compression: CompressionConfig | None = None,
    ) -> Snapshot:
        """Capture; a Running source stays Running. Durable on return."""
        with self.context.busy():
            return await snapshot.snapshot(
                self.context, instance_id, kind=kind, name=name, tags=tags, compression=compression
            )

    async def restore_snapshot(
        self,
        instance_id: str,
        snapshot_id: str,
        *,
        target_state: InstanceState | None = None,
        target_hypervisor: Hypervisor | None = None,
    ) -> Instance:
        """Put an instance back to one of its snapshots; the old state is kept until it worked."""
        with self.context.busy():
            return await restore_snapshot.restore_snapshot(
                self.context,
                instance_id,
                snapshot_id,
                target_state=target_state,
                target_hypervisor=target_hypervisor,
            )

    async def fork_snapshot(self, snapshot_id: str, request: ForkRequest) -> Instance:
        """A new instance from a snapshot."""
        with self.context.busy():
            return await fork.fork_snapshot(self.context, snapshot_id, request)

    async def fork_many(
        self, snapshot_id: str, requests: Sequence[ForkRequest]
    ) -> list[ForkOutcome]:
        """Many forks at once, one outcome each."""
        with self.context.busy():
            return await fork.fork_many(self.context, snapshot_id, requests)

    def warm_status(self, snapshot_id: str) -> WarmStatus:
        """How many forks of a snapshot stand ready."""
        return self.context.warm.status(self.context.snapshot(snapshot_id))

    async def set_warm(self, snapshot_id: str, count: int) -> WarmStatus:
        """Keep ``count`` forks of a snapshot loaded and waiting."""
        return await self.context.warm.set_count(snapshot_id, count)

    # -- images -------------------------------------------------------------------------------
    def find_image(self, reference: str) -> Image:
        """By name or digest. Raises NotFound, InvalidRequest."""
        return self.context.images.find(reference)

    def list_images(self, *, tags: Mapping[str, str] | None = None) -> list[Image]:
        """All images, oldest first."""
        return list(self.context.images.list(tags))

    async def pull_image(
        self,
        name: str,
        *,
        platform: str | None = None,
        tags: Mapping[str, str] | None = None,
        credentials: Mapping[str, str] | None = None,
    ) -> Image:
        """Begin pulling (or making, if built in); returns at once, the status tells progress."""
        return self.context.images.begin_pull(
            name, platform=platform, tags=tags, credentials=credentials
        )

    async def import_image(
        self, name: str, source: Path, *, tags: Mapping[str, str] | None = None
    ) -> Image:
        """Make an image from a root file system tar, an OCI layout directory or its tar."""
        return await self.context.images.import_image(name, source, tags)

    def tag_image(self, reference: str, target: str) -> Image:
        """Give a ready image another name as well."""
        return self.context.images.tag(reference, target)

    async def delete_image(self, reference: str) -> None:
        """Forget an image name; Conflict while an instance or snapshot needs it."""
        image = self.context.images.find(reference)
        records = self.context.records
        users = [
            i.name
            for i in records.instances.values()
            if i.image_digest and i.image_digest == image.digest
        ]
        users += [
            s.name or s.id
            for s in records.snapshots.values()
            if s.template.image_digest == image.digest
        ]
        others = [i for i in records.list() if i.digest == image.digest and i.name != image.name]
        if users and not others:
            raise Conflict(
                f"image {image.name} is in use by {len(users)} instances or snapshots",
                hint=f"delete them first, for example {users[0]}",
                users=len(users),
            )
        self.context.images.delete(reference)

    # -- host ---------------------------------------------------------------------------------
    def metrics(self) -> bytes:
        """All measurements in Prometheus' text format (version 0.0.4)."""
        return self.context.telemetry.render()

    async def probe_drivers(self) -> list[DriverProbe]:
        """What each hypervisor of the contract offers here, or why it does not, by name."""
        drivers = self.context.drivers
        probes = await asyncio.gather(*(driver.probe() for driver in drivers.values()))
        probes += [without_driver(name) for name in CONTRACT_HYPERVISORS if name not in drivers]
        return sorted(probes, key=lambda probe: probe.hypervisor.value)


def _bears(value: Instance | Snapshot, tags: Mapping[str, str] | None) -> bool:
    return not tags or tags.items() <= value.tags.items()


def _by_age(values: Iterable[Kept]) -> list[Kept]:
    return sorted(values, key=_created_at)


def _created_at(value: Instance | Snapshot | Image) -> datetime:
    return value.created_at
