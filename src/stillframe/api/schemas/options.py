"""Options of the contract that this server does not carry out yet, and all of the network.

Their shape is checked all the same, so that a wrong value is told apart from an unsupported one;
then anything but the default is refused with 501 ``not_supported`` naming the field. Nothing that
changes what the caller gets is ever ignored in silence.
"""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from stillframe.api.schemas.base import Body, Flag, Int, Text
from stillframe.model.errors import InvalidRequest, NotSupported
from stillframe.model.units import parse_bandwidth, parse_duration, parse_size

Port = Annotated[Int, Field(ge=1, le=65535)]
AtLeastOne = Annotated[Int, Field(ge=1)]


class AutoStandbyPolicy(Body):
    """Standby after a time without inbound connections."""

    enabled: Flag | None = None
    idle_timeout: Text | None = None
    ignore_source_cidrs: list[Text] | None = None
    ignore_destination_ports: list[Port] | None = None


class HttpCheck(Body):
    """A health check by HTTP request."""

    port: Port
    path: Text | None = None
    scheme: Literal["http", "https"] | None = None
    expected_status: Annotated[Int, Field(ge=100, le=599)] | None = None


class TcpCheck(Body):
    """A health check by TCP connection."""

    port: Port


class ExecCheck(Body):
    """A health check by a command in the guest."""

    command: list[Text]
    working_dir: Text | None = None


class HealthCheck(Body):
    """When an instance counts as healthy."""

    type: Literal["none", "http", "tcp", "exec"] | None = None
    interval: Text | None = None
    timeout: Text | None = None
    start_period: Text | None = None
    failure_threshold: AtLeastOne | None = None
    success_threshold: AtLeastOne | None = None
    http: HttpCheck | None = None
    tcp: TcpCheck | None = None
    exec: ExecCheck | None = None


class RestartPolicy(Body):
    """Whether an instance that ended is started again."""

    policy: Literal["never", "always", "on_failure"] | None = None
    backoff: Text | None = None
    max_attempts: Annotated[Int, Field(ge=0)] | None = None
    stable_after: Text | None = None


class VolumeMount(Body):
    """A volume in an instance."""

    volume_id: Text
    mount_path: Text
    readonly: Flag | None = None
    overlay: Flag | None = None
    overlay_size: Text | None = None


class Gpu(Body):
    """A virtual GPU."""

    profile: Text | None = None


class CredentialSource(Body):
    """Where a credential's real value stands."""

    env: Text


class InjectAs(Body):
    """The header a credential is put into."""

    header: Text
    format: Text


class CredentialInject(Body):
    """Where a credential is put into a request."""

    hosts: list[Text] | None = None
    as_: InjectAs = Field(alias="as")


class Credential(Body):
    """A secret the guest only sees as a placeholder."""

    source: CredentialSource
    inject: Annotated[list[CredentialInject], Field(min_length=1)]


class Enforcement(Body):
    """How strictly egress is mediated."""

    mode: Literal["all", "http_https_only"] | None = None


class Egress(Body):
    """Outbound traffic through the host's proxy."""

    enabled: Flag | None = None
    enforcement: Enforcement | None = None


class NetworkBody(Body):
    """The network of a new instance."""

    enabled: Flag | None = None
    bandwidth_download: Text | None = None
    bandwidth_upload: Text | None = None
    egress: Egress | None = None

    def rate(self, field: Literal["bandwidth_download", "bandwidth_upload"]) -> int:
        """Bytes a second in the field, 0 for none. Raises InvalidRequest (``invalid_`` FIELD)."""
        text: str | None = getattr(self, field)
        return parse_bandwidth(text, code=f"invalid_{field}") if text else 0

    def check(self) -> None:
        """Raises NotSupported for egress."""
        if self.egress is not None and self.egress.enabled:
            raise unsupported("network.egress")


def unsupported(field: str) -> NotSupported:
    """The refusal of a field this server does not carry out."""
    return NotSupported(
        f"{field} is not supported by this server", hint=f"leave {field} out", field=field
    )


def check_auto_standby(policy: AutoStandbyPolicy | None) -> None:
    """Raises InvalidRequest (``invalid_auto_standby``) for a bad policy, NotSupported if on."""
    code = "invalid_auto_standby"
    if policy is None:
        return
    for cidr in policy.ignore_source_cidrs or []:
        try:
            ipaddress.ip_network(cidr, strict=False)
        except ValueError as error:
            raise InvalidRequest(f"invalid CIDR {cidr[:64]!r}", code=code) from error
    if policy.idle_timeout is not None:
        _positive(policy.idle_timeout, code=code)
    elif policy.enabled:
        raise InvalidRequest("auto_standby needs idle_timeout", code=code)
    if policy.enabled:
        raise unsupported("auto_standby")


def check_health(check: HealthCheck | None) -> None:
    """Raises InvalidRequest (``invalid_health_check``) for a bad check, NotSupported if any."""
    code = "invalid_health_check"
    if check is None:
        return
    for text in (check.interval, check.timeout):
        if text is not None:
            _positive(text, code=code)
    if check.start_period is not None:
        parse_duration(check.start_period, code=code)
    if check.type in (None, "none"):
        return
    if getattr(check, str(check.type)) is None:
        raise InvalidRequest(f"a check of type {check.type} needs {check.type!r}", code=code)
    raise unsupported("health_check")


def check_restart(policy: RestartPolicy | None) -> None:
    """Raises InvalidRequest (``invalid_restart_policy``) or NotSupported unless never."""
    if policy is None:
        return
    for text in (policy.backoff, policy.stable_after):
        if text is not None:
            _positive(text, code="invalid_restart_policy")
    if policy.policy not in (None, "never"):
        raise unsupported("restart_policy")


def parse_ttl(text: str | None) -> timedelta | None:
    """A lifetime, zero for none. Raises InvalidRequest (``invalid_ttl``)."""
    return None if text is None else parse_duration(text, code="invalid_ttl")


def check_hotplug(text: str | None) -> None:
    """Raises InvalidRequest (``invalid_hotplug_size``), or NotSupported unless zero or absent."""
    if text is None or text.strip() in ("", "0", "0B"):
        return
    parse_size(text, code="invalid_hotplug_size")
    raise unsupported("hotplug_size")


def _positive(text: str, *, code: str) -> timedelta:
    duration = parse_duration(text, code=code)
    if duration <= timedelta(0):
        raise InvalidRequest(f"{text[:64]!r} must be more than zero", code=code)
    return duration
