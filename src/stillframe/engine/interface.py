"""What the engine offers to the API: every verb, its arguments, results and errors.

``api`` talks to this protocol only. Names are resolved by ``find_*`` (exact id, then exact name,
then unique id prefix; NotFound or Ambiguous otherwise), the verbs take the resolved id.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from stillframe.engine.keeping.interface import KeepingInterface
from stillframe.model.errors import StillframeError
from stillframe.model.states import InstanceState
from stillframe.model.values import (
    CompressionConfig,
    DeviceLimits,
    Hypervisor,
    Image,
    Instance,
    PathInfo,
    Snapshot,
    SnapshotKind,
    SnapshotPolicy,
)
from stillframe.vmm.driver import DriverProbe


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """A wish for a new instance. None means the server's default; sizes are bytes.

    It is deleted by itself at ``expires_at``, or ``lifetime`` after it was made (zero: never).
    """

    name: str
    image: str
    memory_bytes: int | None = None
    overlay_bytes: int | None = None
    vcpus: int | None = None
    hypervisor: Hypervisor | None = None
    platform: str | None = None
    env: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None
    entrypoint: Sequence[str] | None = None
    cmd: Sequence[str] | None = None
    network_enabled: bool = True
    snapshot_policy: SnapshotPolicy | None = None
    expires_at: datetime | None = None
    lifetime: timedelta | None = None
    limits: DeviceLimits = field(default_factory=DeviceLimits)


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """A wish for one fork of a snapshot. None means: as in the snapshot.

    ``env`` is laid over the inherited environment: commands run in the fork see it at once, its
    workload from its next boot on. ``target_hypervisor`` is for Stopped snapshots only.
    """

    name: str
    target_state: InstanceState | None = None
    target_hypervisor: Hypervisor | None = None
    tags: Mapping[str, str] | None = None
    env: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ForkOutcome:
    """What became of one of many forks: the instance, or the error that kept it from being."""

    name: str
    instance: Instance | None = None
    error: StillframeError | None = None


@dataclass(frozen=True, slots=True)
class WarmStatus:
    """The warm forks of a snapshot: how many are wanted, ready, and being prepared.

    ``memory_bytes`` is the host memory that the ready ones hold; ``limited_by`` says in a sentence
    why there are fewer than wanted, when that will not change by itself.
    """

    target: int
    ready: int
    filling: int = 0
    memory_bytes: int = 0
    limited_by: str | None = None


@dataclass(frozen=True, slots=True)
class WaitResult:
    """Answer of ``wait``: the state seen last, and whether the deadline passed first."""

    state: InstanceState
    timed_out: bool
    state_error: str | None = None


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """A command to run in the guest. ``timeout`` seconds (None: no limit), rows/cols with tty."""

    command: tuple[str, ...]
    tty: bool = False
    env: Mapping[str, str] | None = None
    cwd: str | None = None
    timeout: float | None = None
    rows: int | None = None
    cols: int | None = None
    wait_for_agent: float = 0


class ExecSession(Protocol):
    """A command running in the guest. Raises GuestFailure when the agent is lost."""

    def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield ``(1, stdout bytes)`` and ``(2, stderr bytes)`` until the command has ended."""

    async def write_stdin(self, data: bytes) -> None:
        """Send bytes to stdin; empty bytes are end of file. Waits for the guest's credit."""

    async def resize(self, rows: int, cols: int) -> None:
        """Set the terminal size (tty only)."""

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""

    async def wait(self) -> int:
        """Exit code, after all output was consumed (124 on timeout, 128+N on signal N)."""

    async def close(self) -> None:
        """Hang up: the command gets SIGHUP if it still runs. Idempotent."""


@dataclass(frozen=True, slots=True)
class ReadEntry:
    """One entry of a copy out of the guest; ``data`` yields its bytes (empty unless a file)."""

    path: str
    mode: int
    kind: str  # "file", "dir" or "link"
    link_target: str | None
    size: int
    mtime: int
    uid: int
    gid: int
    data: AsyncIterator[bytes]


class EngineInterface(KeepingInterface, Protocol):
    """All verbs. Each raises only StillframeError (or CancelledError, after undoing its work)."""

    # -- life ---------------------------------------------------------------------------------
    async def open(self) -> None:
        """Recover what an earlier server left, adopt its VMs, and be ready."""

    async def close(self) -> None:
        """Finish or undo what is under way; VMs run on."""

    # -- instances ----------------------------------------------------------------------------
    def find_instance(self, reference: str) -> Instance:
        """By id, name or unique id prefix. Raises NotFound, Ambiguous."""

    def list_instances(
        self, *, state: InstanceState | None = None, tags: Mapping[str, str] | None = None
    ) -> list[Instance]:
        """All instances that match every given filter, oldest first."""

    async def create(self, request: CreateRequest) -> Instance:
        """Boot a new instance; returns while it is still Initializing."""

    async def start(
        self,
        instance_id: str,
        *,
        entrypoint: Sequence[str] | None = None,
        cmd: Sequence[str] | None = None,
    ) -> Instance:
        """Boot a Stopped instance again on its disks; overrides persist."""

    async def stop(self, instance_id: str) -> Instance:
        """Shut the guest down (agent, then power button, then SIGKILL)."""

    async def delete(self, instance_id: str, *, graceful: bool = True) -> None:
        """End the instance and remove all of it; its snapshots stay."""

    async def standby(
        self,
        instance_id: str,
        *,
        compression: CompressionConfig | None = None,
        compression_delay: timedelta | None = None,
    ) -> Instance:
        """Capture memory and devices durably, then end the VMM."""

    async def restore(self, instance_id: str) -> Instance:
        """Bring an instance in Standby back to Running."""

    async def fork(
        self,
        instance_id: str,
        *,
        name: str,
        from_running: bool = False,
        target_state: InstanceState | None = None,
    ) -> Instance:
        """Fork an instance (Stopped, Standby, or Running with ``from_running``)."""

    async def wait(
        self, instance_id: str, *, state: InstanceState, timeout: timedelta
    ) -> WaitResult:
        """Wait for a state as the contract says. NotFound if deleted meanwhile."""

    def logs(self, instance_id: str, *, source: str, tail: int, follow: bool) -> AsyncIterator[str]:
        """Lines of the app, vmm or hypeman log. Raises NotFound (``log_not_found``)."""

    async def exec(self, instance_id: str, request: ExecRequest) -> ExecSession:
        """Start a command in a Running guest. Raises InvalidState, GuestFailure."""

    async def stat(self, instance_id: str, path: str, *, follow: bool) -> PathInfo:
        """What is at ``path`` in the guest."""

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

    def read_path(self, instance_id: str, path: str, *, follow: bool) -> AsyncIterator[ReadEntry]:
        """A file or tree out of the guest, depth first."""

    # -- snapshots ----------------------------------------------------------------------------
    def find_snapshot(self, reference: str) -> Snapshot:
        """By exact id (the contract's rule). Raises NotFound."""

    def list_snapshots(
        self,
        *,
        source_instance_id: str | None = None,
        kind: SnapshotKind | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[Snapshot]:
        """All snapshots that match every given filter, oldest first."""

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

    async def restore_snapshot(
        self,
        instance_id: str,
        snapshot_id: str,
        *,
        target_state: InstanceState | None = None,
        target_hypervisor: Hypervisor | None = None,
    ) -> Instance:
        """Put an instance back to one of its snapshots; the old state is kept until it worked."""

    async def fork_snapshot(self, snapshot_id: str, request: ForkRequest) -> Instance:
        """A new instance from a snapshot, whose source may be gone.

        Raises InvalidRequest, NotFound, Conflict, DamagedData, NotSupported, StorageFull,
        VmmFailure; then nothing of the fork is left.
        """

    async def fork_many(
        self, snapshot_id: str, requests: Sequence[ForkRequest]
    ) -> list[ForkOutcome]:
        """Many forks at once, one outcome for each request in its order; the good ones stay.

        Raises NotFound, InvalidRequest for what concerns all of them.
        """

    def warm_status(self, snapshot_id: str) -> WarmStatus:
        """How many forks of a snapshot stand ready. Raises NotFound."""

    async def set_warm(self, snapshot_id: str, count: int) -> WarmStatus:
        """Keep ``count`` forks loaded and waiting (0: none); they are made in the background.

        Survives a restart of the server. Raises NotFound, InvalidRequest (a Stopped snapshot, or
        a count out of range).
        """

    # -- images -------------------------------------------------------------------------------
    def find_image(self, reference: str) -> Image:
        """By name or digest. Raises NotFound, InvalidRequest (``invalid_name``)."""

    def list_images(self, *, tags: Mapping[str, str] | None = None) -> list[Image]:
        """All images, oldest first."""

    async def pull_image(
        self,
        name: str,
        *,
        platform: str | None = None,
        tags: Mapping[str, str] | None = None,
        credentials: Mapping[str, str] | None = None,
    ) -> Image:
        """Begin pulling (or making, if built in); returns at once, the status tells progress."""

    async def import_image(
        self, name: str, source: Path, *, tags: Mapping[str, str] | None = None
    ) -> Image:
        """Make an image from a root file system tar, an OCI layout directory or its tar."""

    def tag_image(self, reference: str, target: str) -> Image:
        """Give a ready image another name as well; it moves over if another image has it.

        Raises InvalidRequest (``invalid_name``), NotFound, Conflict (not ready).
        """

    async def delete_image(self, reference: str) -> None:
        """Forget an image name; Conflict while an instance or snapshot needs it."""

    # -- host ---------------------------------------------------------------------------------
    def metrics(self) -> bytes:
        """All measurements in Prometheus' text format (version 0.0.4)."""

    async def probe_drivers(self) -> list[DriverProbe]:
        """What each hypervisor of the contract offers here, or why it does not, by name."""
