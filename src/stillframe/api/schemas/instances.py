"""Instances on the wire."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AwareDatetime, Field

from stillframe.api.schemas import options
from stillframe.api.schemas.base import Answer, Body, Env, Flag, Int, Name, Tags, Text, utc
from stillframe.api.schemas.snapshots import (
    CompressionAnswer,
    CompressionBody,
    TargetState,
    parse_delay,
)
from stillframe.engine.interface import CreateRequest, WaitResult
from stillframe.engine.keeping.interface import InstanceUse
from stillframe.model.errors import InvalidRequest
from stillframe.model.states import InstanceState
from stillframe.model.units import (
    check_name,
    check_tags,
    format_duration,
    format_rate,
    format_size,
    parse_disk_rate,
    parse_size,
)
from stillframe.model.values import DeviceLimits, Hypervisor, Instance, PathInfo, SnapshotPolicy

_PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?")
PLATFORMS = ("linux/amd64", "linux/arm64")


class SnapshotPolicyBody(Body):
    """Defaults for the snapshots and standbys of an instance."""

    compression: CompressionBody | None = None
    standby_compression_delay: Text | None = None

    def parse(self) -> SnapshotPolicy:
        """The policy. Raises InvalidRequest (``invalid_snapshot_policy``)."""
        code = "invalid_snapshot_policy"
        return SnapshotPolicy(
            compression=self.compression.parse(code) if self.compression else None,
            standby_compression_delay=parse_delay(self.standby_compression_delay, code=code),
        )


class InstanceCreateBody(Body):
    """A wish for a new instance: every option of the contract."""

    name: Name
    image: Annotated[Text, Field(min_length=1)]
    size: Text | None = None
    hotplug_size: Text | None = None
    overlay_size: Text | None = None
    vcpus: Int | None = None
    hypervisor: Hypervisor | None = None
    platform: Text | None = None
    env: Env | None = None
    tags: Tags | None = None
    entrypoint: list[Text] | None = None
    cmd: list[Text] | None = None
    network: options.NetworkBody | None = None
    credentials: dict[Text, options.Credential] | None = None
    disk_io_bps: Text | None = None
    devices: list[Text] | None = None
    gpu: options.Gpu | None = None
    volumes: list[options.VolumeMount] | None = None
    snapshot_policy: SnapshotPolicyBody | None = None
    auto_standby: options.AutoStandbyPolicy | None = None
    health_check: options.HealthCheck | None = None
    restart_policy: options.RestartPolicy | None = None
    expires_at: AwareDatetime | None = None
    ttl: Text | None = None
    # Our guests have no kernel headers to install: both values mean the same.
    skip_kernel_headers: Flag | None = None
    skip_guest_agent: Flag | None = None

    def parse(self) -> CreateRequest:
        """The engine's request. Raises InvalidRequest with the contract's codes, NotSupported."""
        check_name(self.name)
        check_platform(self.platform)
        request = CreateRequest(
            name=self.name,
            image=self.image,
            memory_bytes=parse_size(self.size) if self.size else None,
            overlay_bytes=(
                parse_size(self.overlay_size, code="invalid_overlay_size")
                if self.overlay_size
                else None
            ),
            vcpus=self.vcpus,
            hypervisor=self.hypervisor,
            platform=self.platform or None,
            env=self.env,
            tags=check_tags(self.tags),
            entrypoint=self.entrypoint,
            cmd=self.cmd,
            network_enabled=self.network is None or self.network.enabled is not False,
            snapshot_policy=self.snapshot_policy.parse() if self.snapshot_policy else None,
            expires_at=self.expires_at,
            lifetime=options.parse_ttl(self.ttl),
            limits=self._limits(),
        )
        self._refuse_unsupported()
        return request

    def _limits(self) -> DeviceLimits:
        network = self.network or options.NetworkBody()
        return DeviceLimits(
            disk=parse_disk_rate(self.disk_io_bps) if self.disk_io_bps else 0,
            download=network.rate("bandwidth_download"),
            upload=network.rate("bandwidth_upload"),
        )

    def _refuse_unsupported(self) -> None:
        options.check_hotplug(self.hotplug_size)
        options.check_auto_standby(self.auto_standby)
        options.check_health(self.health_check)
        options.check_restart(self.restart_policy)
        if self.network is not None:
            self.network.check()
        for field in ("credentials", "devices", "volumes", "skip_guest_agent"):
            if getattr(self, field):
                raise options.unsupported(field)
        if self.gpu is not None and self.gpu.profile:
            raise options.unsupported("gpu")


def check_platform(platform: str | None) -> None:
    """Raises InvalidRequest (``invalid_platform``) unless absent or one of ``PLATFORMS``."""
    if not platform:
        return
    if not _PLATFORM.fullmatch(platform) or platform not in PLATFORMS:
        raise InvalidRequest(
            f"invalid platform {platform[:64]!r}",
            code="invalid_platform",
            hint=f"use {' or '.join(PLATFORMS)}",
        )


class InstanceUpdateBody(Body):
    """What to change of an instance; an absent field stays. ``ttl`` of zero: it never expires."""

    env: Env | None = None
    auto_standby: options.AutoStandbyPolicy | None = None
    health_check: options.HealthCheck | None = None
    restart_policy: options.RestartPolicy | None = None
    expires_at: AwareDatetime | None = None
    ttl: Text | None = None

    def check(self) -> None:
        """Raises InvalidRequest with the contract's codes, NotSupported."""
        options.check_auto_standby(self.auto_standby)
        options.check_health(self.health_check)
        options.check_restart(self.restart_policy)
        if self.env is not None:
            # The contract changes only what credentials name, of which there are none here.
            raise InvalidRequest(
                "env can only be changed where a credential names it",
                hint="leave env out; a fork of a snapshot takes env",
                field="env",
            )


class InstanceForkBody(Body):
    """A wish for a fork of an instance."""

    name: Name
    from_running: Flag | None = None
    target_state: TargetState | None = None


class StartBody(Body):
    """Overrides of the command that persist."""

    entrypoint: list[Text] | None = None
    cmd: list[Text] | None = None


class NetworkAnswer(Answer):
    """The network of an instance."""

    enabled: bool | None = None
    name: str | None = None
    ip: str | None = None
    mac: str | None = None
    bandwidth_download: str | None = None
    bandwidth_upload: str | None = None


class SnapshotPolicyAnswer(Answer):
    """Defaults for the snapshots and standbys of an instance."""

    compression: CompressionAnswer | None = None
    standby_compression_delay: str | None = None

    @classmethod
    def of(cls, policy: SnapshotPolicy | None) -> SnapshotPolicyAnswer | None:
        """The wire form; None stays None."""
        if policy is None:
            return None
        delay = policy.standby_compression_delay
        return cls(
            compression=CompressionAnswer.of(policy.compression),
            standby_compression_delay=None if delay is None else format_duration(delay),
        )


class InstanceAnswer(Answer):
    """An instance. Fields after ``phase_durations_ms`` are Stillframe's own.

    ``expires_at`` is always present. Options this server does not carry out are always absent.
    """

    always: ClassVar[tuple[str, ...]] = ("expires_at",)

    id: str
    name: str
    image: str
    state: InstanceState
    created_at: datetime
    expires_at: datetime | None
    state_error: str | None = None
    hypervisor: Hypervisor | None = None
    platform: str | None = None
    size: str | None = None
    hotplug_size: str | None = None
    overlay_size: str | None = None
    vcpus: int | None = None
    disk_io_bps: str | None = None
    env: dict[str, str] | None = None
    tags: dict[str, str] | None = None
    network: NetworkAnswer | None = None
    volumes: list[options.VolumeMount] | None = None
    gpu: options.Gpu | None = None
    has_snapshot: bool | None = None
    snapshot_policy: SnapshotPolicyAnswer | None = None
    auto_standby: options.AutoStandbyPolicy | None = None
    health_check: options.HealthCheck | None = None
    restart_policy: options.RestartPolicy | None = None
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    exit_code: int | None = None
    exit_message: str | None = None
    current_phase: str | None = None
    current_phase_since: datetime | None = None
    phase_durations_ms: dict[str, int] | None = None
    image_digest: str | None = None
    hypervisor_version: str | None = None
    accelerator: str | None = None
    parent_snapshot_id: str | None = None
    parent_instance_id: str | None = None
    timings_ms: dict[str, float] | None = None
    resumed_at: datetime | None = None

    @classmethod
    def of(cls, instance: Instance, *, now: datetime | None = None) -> InstanceAnswer:
        """The wire form; the running phase is counted up to ``now`` (default: this moment)."""
        return cls(
            id=instance.id,
            name=instance.name,
            image=instance.image,
            state=instance.state,
            created_at=utc(instance.created_at) or instance.created_at,
            expires_at=utc(instance.expires_at),
            state_error=instance.state_error,
            hypervisor=instance.hypervisor,
            platform=instance.platform,
            size=format_size(instance.memory_bytes),
            overlay_size=format_size(instance.overlay_bytes),
            vcpus=instance.vcpus,
            disk_io_bps=format_rate(instance.limits.disk),
            env=dict(instance.env),
            tags=dict(instance.tags),
            network=NetworkAnswer(
                enabled=instance.network_enabled,
                name="default" if instance.network_enabled else None,
                bandwidth_download=format_rate(instance.limits.download),
                bandwidth_upload=format_rate(instance.limits.upload),
            ),
            has_snapshot=instance.has_snapshot,
            snapshot_policy=SnapshotPolicyAnswer.of(instance.snapshot_policy),
            started_at=utc(instance.started_at),
            stopped_at=utc(instance.stopped_at),
            exit_code=instance.exit_code,
            exit_message=instance.exit_message,
            current_phase=instance.state.phase,
            current_phase_since=utc(instance.phase_since),
            phase_durations_ms=_phases(instance, now or datetime.now(UTC)),
            **_own_fields(instance),
        )


def _own_fields(instance: Instance) -> dict[str, Any]:
    return {
        "image_digest": instance.image_digest or None,
        "hypervisor_version": instance.hypervisor_version or None,
        "accelerator": instance.accelerator or None,
        "parent_snapshot_id": instance.parent_snapshot_id,
        "parent_instance_id": instance.parent_instance_id,
        "timings_ms": dict(instance.timings_ms),
        "resumed_at": utc(instance.resumed_at),
    }


def _phases(instance: Instance, now: datetime) -> dict[str, int]:
    phases: Mapping[str, int] = instance.phase_durations_ms
    if instance.phase_since is None:
        return dict(phases)
    current = max(0, int((now - instance.phase_since) / timedelta(milliseconds=1)))
    phase = instance.state.phase
    return {**phases, phase: phases.get(phase, 0) + current}


class InstanceStats(Answer):
    """What the hypervisor of an instance takes; zeros while it has none.

    What the guest got and sent by its network is left out where nothing counts it (QEMU).
    """

    instance_id: str
    instance_name: str
    cpu_seconds: float
    memory_rss_bytes: int
    memory_vms_bytes: int
    network_rx_bytes: int | None = None
    network_tx_bytes: int | None = None
    allocated_vcpus: int
    allocated_memory_bytes: int
    memory_utilization_ratio: float | None = None

    @classmethod
    def of(cls, use: InstanceUse) -> InstanceStats:
        """The wire form of what was measured."""
        instance = use.instance
        return cls(
            instance_id=instance.id,
            instance_name=instance.name,
            cpu_seconds=use.cpu_seconds,
            memory_rss_bytes=use.memory_resident_bytes,
            memory_vms_bytes=use.memory_virtual_bytes,
            network_rx_bytes=use.network_received_bytes,
            network_tx_bytes=use.network_sent_bytes,
            allocated_vcpus=instance.vcpus,
            allocated_memory_bytes=instance.memory_bytes,
            memory_utilization_ratio=round(use.memory_resident_bytes / instance.memory_bytes, 4),
        )


class AutoStandbyStatus(Answer):
    """The contract's answer where instances do not go to standby by themselves."""

    supported: bool = False
    configured: bool = False
    enabled: bool = False
    eligible: bool = False
    status: Literal["unsupported"] = "unsupported"
    reason: Literal["unsupported_platform"] = "unsupported_platform"
    active_inbound_connections: int = 0
    tracking_mode: Literal["conntrack_events_v4_tcp"] = "conntrack_events_v4_tcp"


class WaitAnswer(Answer):
    """Where a wait ended."""

    state: InstanceState
    timed_out: bool
    state_error: str | None = None

    @classmethod
    def of(cls, result: WaitResult) -> WaitAnswer:
        """The wire form of a wait's result."""
        return cls(state=result.state, timed_out=result.timed_out, state_error=result.state_error)


class PathInfoAnswer(Answer):
    """What is at a path in the guest; of an absent path only ``exists`` (and ``error``) is told."""

    exists: bool
    is_dir: bool | None = None
    is_file: bool | None = None
    is_symlink: bool | None = None
    link_target: str | None = None
    mode: int | None = None
    size: int | None = None
    error: str | None = None

    @classmethod
    def of(cls, info: PathInfo) -> PathInfoAnswer:
        """The wire form of a path's facts."""
        if not info.exists:
            return cls(exists=False, error=info.error)
        return cls(
            exists=True,
            is_dir=info.is_dir,
            is_file=info.is_file,
            is_symlink=info.is_symlink,
            link_target=info.link_target,
            mode=info.mode,
            size=info.size,
        )
