"""Pulling from OCI registries: our own small client (OCI distribution-spec, docker token auth).

Credentials live in memory only, go to the registry's own host (and the token server it names), and
are never sent where a redirect leads. Plain http is for registries on the loopback only.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

import httpx2

from stillframe.host.files import storage_errors
from stillframe.images.layout import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT,
    Descriptor,
    LayeredImage,
    choose_manifest,
    malformed,
    parse_config,
    parse_document,
    parse_manifest,
)
from stillframe.images.reference import DEFAULT_REGISTRY, Reference
from stillframe.images.tarread import Blob, refused
from stillframe.model.errors import (
    HostFailure,
    InvalidRequest,
    NotFound,
    RateLimited,
    Timeout,
)

MAX_BLOB = 32 * 1024**3  # bytes
_TRIES, _MAX_REDIRECTS, _AT_ONCE, _CHUNK = 4, 5, 3, 1 << 20
_TIMEOUT = httpx2.Timeout(30, connect=15)
_PARAMETER = re.compile(r'([a-zA-Z_]+)="([^"]*)"')
_METADATA_HOSTS = frozenset({"metadata.google.internal", "metadata", "instance-data"})
_METADATA = tuple(
    ipaddress.ip_address(a) for a in ("169.254.169.254", "fd00:ec2::254", "100.100.100.200")
)
_ACCEPT = ", ".join(sorted(INDEX_TYPES | MANIFEST_TYPES))


class RegistryClient:
    """A connection to the registry of one image; use as ``async with``."""

    def __init__(self, reference: Reference, credentials: Mapping[str, str] | None = None) -> None:
        """``credentials`` may hold ``username`` and ``password``, or ``registry_token``."""
        self._reference, self._credentials = reference, dict(credentials or {})
        host = reference.registry
        self._host = "registry-1.docker.io" if host == DEFAULT_REGISTRY else host
        self._local = _is_loopback_name(urlsplit(f"//{self._host}").hostname or "")
        self._base = f"{'http' if self._local else 'https'}://{self._host}"
        self._authorization: str | None = None
        if token := self._credentials.get("registry_token"):
            self._authorization = f"Bearer {token}"
        self._client = httpx2.AsyncClient(
            timeout=_TIMEOUT,
            follow_redirects=False,
            trust_env=not self._local,
            verify=not self._local,
            headers={"User-Agent": "stillframe", "Accept-Encoding": "identity"},
        )

    async def __aenter__(self) -> RegistryClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def pull(self, platform: str, directory: Path) -> LayeredImage:
        """Download manifest, config and layers; layers land in ``directory`` by their hex digest.

        Raises NotFound, RateLimited, InvalidRequest (``registry_unauthorized``,
        ``invalid_image``, ``invalid_layer``, ``forbidden_address``), Timeout, HostFailure,
        StorageFull.
        """
        document, digest = await self._manifest(self._reference.target)
        if "manifests" in document:
            chosen = choose_manifest(document, platform)
            document, digest = await self._manifest(chosen.digest)
        manifest = parse_manifest(document)
        config_path = await self._blob(manifest.config, directory)
        raw = await asyncio.to_thread(config_path.read_bytes)
        config, diff_ids = parse_config(raw, len(manifest.layers), platform)
        limit = asyncio.Semaphore(_AT_ONCE)

        async def fetch(layer: Descriptor) -> None:
            async with limit:
                await self._blob(layer, directory)

        try:
            async with asyncio.TaskGroup() as group:
                for layer in dict.fromkeys(manifest.layers):  # one may occur twice
                    group.create_task(fetch(layer))
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        blobs = tuple(
            Blob(directory / layer.hex, diff_id=diff_id)
            for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
        )
        return LayeredImage(blobs, config, digest)

    async def _manifest(self, target: str) -> tuple[dict[str, Any], str]:
        path = f"/v2/{self._reference.repository}/manifests/{target}"
        async with self._get(path, {"Accept": _ACCEPT}) as response:
            data = await _document(response, "image manifest")
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if target.startswith("sha256:") and digest != target:
            raise refused("the registry sent another manifest than was asked for", found=digest)
        document = parse_document(data, "image manifest")
        kind = document.get("mediaType") or response.headers.get("content-type", "").split(";")[0]
        if kind not in INDEX_TYPES | MANIFEST_TYPES:
            raise malformed(f"manifests of type {str(kind)[:120]!r} are not supported")
        return document, digest

    async def _blob(self, wanted: Descriptor, directory: Path) -> Path:
        """Download one blob, resuming after a broken connection; size and digest are checked."""
        if wanted.size > MAX_BLOB:
            raise refused(f"blob {wanted.digest} is too large", size_bytes=wanted.size)
        path, hasher, done = directory / wanted.hex, hashlib.sha256(), 0
        with storage_errors("store a layer"), path.open("wb") as file:
            for attempt in range(_TRIES):
                try:
                    done = await self._download(wanted, file, hasher, done)
                    break
                except httpx2.TransportError as error:
                    done = file.tell()
                    if attempt == _TRIES - 1:
                        raise _unreachable(self._host, error) from error
        if done != wanted.size:
            raise refused(f"blob {wanted.digest} is not {wanted.size} bytes long", received=done)
        if hasher.hexdigest() != wanted.hex:
            raise refused(f"blob {wanted.digest} does not have that digest")
        return path

    async def _download(
        self, wanted: Descriptor, file: IO[bytes], hasher: hashlib._Hash, done: int
    ) -> int:
        path = f"/v2/{self._reference.repository}/blobs/{wanted.digest}"
        headers = {"Range": f"bytes={done}-"} if done else {}
        async with self._get(path, headers, retried=True) as response:
            skip = done if response.status_code == 200 else 0  # the server ignores ranges
            async for chunk in response.aiter_raw(_CHUNK):
                data = chunk[skip:]
                skip = max(0, skip - len(chunk))
                if done + len(data) > wanted.size:
                    raise refused(f"blob {wanted.digest} is longer than {wanted.size} bytes")
                await asyncio.to_thread(_store, file, hasher, data)
                done += len(data)
        return done

    # -- requests ---------------------------------------------------------------------------------
    @asynccontextmanager
    async def _get(
        self, path: str, headers: Mapping[str, str], *, retried: bool = False
    ) -> AsyncIterator[httpx2.Response]:
        """A GET on the registry, authenticated on demand, redirects followed with care."""
        try:
            response = await self._send(self._base + path, headers)
            if response.status_code == 401:
                challenge = response.headers.get("www-authenticate", "")
                await response.aclose()
                await self._authenticate(challenge)
                response = await self._send(self._base + path, headers)
            try:
                self._check(response)
                yield response
            finally:
                await response.aclose()
        except httpx2.TransportError as error:
            if retried:
                raise
            raise _unreachable(self._host, error) from error
        except (httpx2.InvalidURL, httpx2.DecodingError) as error:
            raise HostFailure(f"registry {self._host} answered nonsense: {error}") from error

    async def _send(self, url: str, headers: Mapping[str, str]) -> httpx2.Response:
        for _ in range(_MAX_REDIRECTS + 1):
            await check_address(url, allow_loopback=self._local)
            sent = dict(headers)
            if self._authorization and urlsplit(url).netloc == self._host:
                sent["Authorization"] = self._authorization
            request = self._client.build_request("GET", url, headers=sent)
            response = await self._client.send(request, stream=True)
            if not response.has_redirect_location:
                return response
            await response.aclose()
            url = str(response.url.join(response.headers["location"]))
        raise HostFailure(f"registry {self._host} redirects without end")

    def _check(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        if status == 404:
            raise NotFound(f"the registry has no image {self._reference}", code="not_found")
        if status in (401, 403):
            raise InvalidRequest(  # not 401: the caller's token for this server is fine
                f"registry {self._host} refuses access to {self._reference.repository}",
                code="registry_unauthorized",
                hint="check the image name and the credentials",
            )
        if status == 429:
            raise RateLimited(f"registry {self._host} limits pulls", hint="wait, or log in")
        raise HostFailure(f"registry {self._host} answered {status}", http_status=status)

    async def _authenticate(self, challenge: str) -> None:
        """Answer a challenge (docker token authentication; RFC 7617 for Basic)."""
        scheme, _, rest = challenge.partition(" ")
        user, password = self._credentials.get("username"), self._credentials.get("password")
        basic = None
        if user is not None:
            pair = f"{user}:{password or ''}".encode()
            basic = f"Basic {base64.b64encode(pair).decode()}"
        if scheme.lower() == "basic" and basic:
            self._authorization = basic
            return
        parameters = dict(_PARAMETER.findall(rest))
        if scheme.lower() != "bearer" or "realm" not in parameters:
            return  # the second 401 is the answer
        realm = parameters["realm"]
        await check_address(realm, allow_loopback=self._local)
        query = {"scope": f"repository:{self._reference.repository}:pull"}
        if "service" in parameters:
            query["service"] = parameters["service"]
        headers = {"Authorization": basic} if basic else {}
        async with self._client.stream("GET", realm, params=query, headers=headers) as response:
            self._check(response)
            answer = parse_document(await _document(response, "token"), "token")
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not token.isprintable():
            raise HostFailure("the token server gave no token")
        self._authorization = f"Bearer {token}"


async def _document(response: httpx2.Response, what: str) -> bytes:
    """The body as it was sent (no compression was asked for), within bounds."""
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > MAX_DOCUMENT:
            raise malformed(f"the {what} is too large")
    return bytes(data)


async def check_address(url: str, *, allow_loopback: bool) -> None:
    """Refuse a URL that leads to link-local, metadata or (unless allowed) loopback addresses (S30).

    Names are looked up; one that has no address is left to fail by itself. Plain http is for the
    loopback only. Raises InvalidRequest (``forbidden_address``).
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".").lower()
    if parts.scheme not in ("http", "https") or not host or host in _METADATA_HOSTS:
        raise _forbidden(host or url[:80])
    if parts.scheme == "http" and not (allow_loopback and _is_loopback_name(host)):
        raise _forbidden(host, "without TLS")
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, parts.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    for entry in found:
        address = ipaddress.ip_address(str(entry[4][0]).partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        bad = address.is_link_local or address.is_multicast or address.is_unspecified
        if bad or address in _METADATA or (address.is_loopback and not allow_loopback):
            raise _forbidden(host)


def _is_loopback_name(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _store(file: IO[bytes], hasher: hashlib._Hash, data: bytes) -> None:
    file.write(data)
    hasher.update(data)


def _forbidden(host: str, how: str = "") -> InvalidRequest:
    return InvalidRequest(
        f"the registry leads to {host[:80]!r} {how}".rstrip() + ", which is not allowed",
        code="forbidden_address",
        hint="use a registry with a public or private address and TLS",
    )


def _unreachable(host: str, error: Exception) -> Timeout | HostFailure:
    if isinstance(error, httpx2.TimeoutException):
        return Timeout(f"registry {host} did not answer in time")
    return HostFailure(
        f"registry {host} cannot be reached: {type(error).__name__}", hint="check name and network"
    )
