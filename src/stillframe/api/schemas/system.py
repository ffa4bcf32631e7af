"""Health and capabilities on the wire (contract section 3.7)."""

from __future__ import annotations

from typing import Literal

from stillframe.api.schemas.base import Answer


class Health(Answer):
    """The server answers."""

    status: Literal["ok"] = "ok"


class ServerInfo(Answer):
    """Which server this is; ``api_version`` is that of the contract it speaks."""

    version: str
    api_version: str


class HostInfo(Answer):
    """Operating system and processor of the host, in Go's words (linux, amd64)."""

    os: str
    arch: str


class DefaultRuntime(Answer):
    """The hypervisor used when a request names none."""

    name: str
    available: bool


class Runtime(Answer):
    """One hypervisor on this host. Fields after ``features`` are Stillframe's own.

    ``reason`` says why it is unavailable, ``hint`` how to mend it.
    """

    name: str
    available: bool
    features: list[str]
    version: str | None = None
    accelerator: str | None = None
    reason: str | None = None
    hint: str | None = None


class NetworkInfo(Answer):
    """What guests can reach."""

    model: Literal["bridge", "nat"]
    guest_to_guest: bool
    subnet: str | None = None
    gateway: str | None = None


class ImagesInfo(Answer):
    """Platforms whose images can run here."""

    default_platform: str
    platforms: list[str]


class Capabilities(Answer):
    """What this server can do on this host."""

    server: ServerInfo
    host: HostInfo
    default_runtime: DefaultRuntime
    runtimes: list[Runtime]
    network: NetworkInfo
    images: ImagesInfo
    features: list[str]
