"""Image references as people write them, and their normal form.

The grammar is that of the distribution project (``reference`` package): ``[host[:port]/]path
[:tag][@digest]``; a first component is a host when it has a dot or a colon, or is ``localhost``.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from stillframe.model.errors import InvalidRequest, NotFound

DEFAULT_PLATFORM = "linux/amd64"
BUILTIN_REPOSITORY = "stillframe/base"
DEFAULT_REGISTRY = "docker.io"

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9]+(?:/[a-z0-9.]+)?")
_MAX_NAME = 255
_MAX_REFERENCE = 512


@dataclass(frozen=True, slots=True)
class Reference:
    """An image reference in normal form. ``registry`` is empty for the built-in image."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}" if self.registry else self.repository

    @property
    def is_builtin(self) -> bool:
        """Whether Stillframe makes this image itself."""
        return not self.registry

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest if there is one, else the tag."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        text = self.name
        if self.tag:
            text += f":{self.tag}"
        if self.digest:
            text += f"@{self.digest}"
        return text


def parse_reference(text: str) -> Reference:
    """The normal form of ``text``; tag ``latest`` when neither tag nor digest is given.

    Raises InvalidRequest (code ``invalid_name``).
    """
    if not text or len(text) > _MAX_REFERENCE:
        raise _invalid(text, "is empty" if not text else "is too long")
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _invalid(text, "has a bad digest (sha256 and 64 hex digits expected)")
    head, slash, last = rest.rpartition("/")
    last, colon, tag = last.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise _invalid(text, "has a bad tag")
    registry, repository = _split_host(head + slash + last, text)
    if len(registry) + len(repository) + 1 > _MAX_NAME:
        raise _invalid(text, "is too long")
    if not all(_COMPONENT.fullmatch(part) for part in repository.split("/")):
        raise _invalid(text, "has a bad name")
    return Reference(registry, repository, tag or (None if at else "latest"), digest or None)


def _split_host(path: str, text: str) -> tuple[str, str]:
    first, slash, rest = path.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first):
        if not _HOST.fullmatch(first) or not _port_is_good(first):
            raise _invalid(text, "has a bad host")
        first = first.lower()
        if first in ("docker.io", "index.docker.io", "registry-1.docker.io"):
            return DEFAULT_REGISTRY, rest if "/" in rest else f"library/{rest}"
        return first, rest
    if path == BUILTIN_REPOSITORY:
        return "", path
    return DEFAULT_REGISTRY, path if slash else f"library/{path}"


def _port_is_good(host: str) -> bool:
    name, colon, port = host.rpartition(":")
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1 : host.index("]")])
        except ValueError:
            return False
        return host.endswith("]") or 0 < int(port) < 65536
    return not colon or (bool(name) and 0 < int(port) < 65536)


def _invalid(text: str, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"image name {text[:80]!r} {reason}",
        code="invalid_name",
        hint="write for example alpine, alpine:3 or registry.example.com/team/app:1.0",
    )


def check_platform(platform: str | None) -> str:
    """The platform to use (``linux/amd64`` for None).

    Raises InvalidRequest (``invalid_platform``) for what is no linux platform, and NotFound
    (``platform_not_available``) for one that this host cannot run.
    """
    if platform is None or platform == DEFAULT_PLATFORM:
        return DEFAULT_PLATFORM
    if len(platform) > 64 or not _PLATFORM.fullmatch(platform):
        raise InvalidRequest(
            f"invalid platform {platform[:64]!r}",
            code="invalid_platform",
            hint="write os/architecture, for example linux/amd64",
        )
    if platform.startswith("linux/arm64"):
        raise NotFound(
            f"platform {platform} is not available on this host",
            code="platform_not_available",
            hint=f"use {DEFAULT_PLATFORM}",
            platform=platform,
        )
    raise InvalidRequest(
        f"unsupported platform {platform}",
        code="invalid_platform",
        hint=f"this server runs {DEFAULT_PLATFORM}",
    )
