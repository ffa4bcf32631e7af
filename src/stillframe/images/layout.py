"""Images on disk: OCI layouts (a directory or its tar), docker archives, plain root file trees.

Sources: OCI image-spec (image-layout.md, manifest.md, config.md) and what ``docker save`` writes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillframe.host.files import storage_errors
from stillframe.images.tarread import MAX_ENTRIES, Blob, check_expansion, entries, reading, refused
from stillframe.model.errors import InvalidRequest, NotFound
from stillframe.model.values import ImageConfig

INDEX_TYPES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
MANIFEST_TYPES = frozenset(
    {
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)
LAYER_TYPES = frozenset(
    {
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
    }
)
MAX_DOCUMENT = 4 * 1024 * 1024  # manifests and configs, bytes
MAX_LAYERS = 512
_HASH_CHUNK = 1 << 20
# Docker's own archives start with layers and configs named by digests, manifest.json comes last.
_ARCHIVE_NAME = re.compile(
    r"(oci-layout|index\.json|manifest\.json|blobs|[0-9a-f]{64}(\.tar|\.json)?)(/|$)"
)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says of a blob (descriptor.md). ``size`` is bytes."""

    media_type: str
    digest: str
    size: int

    @property
    def hex(self) -> str:
        """The digest's hex digits: a safe file name."""
        return self.digest.removeprefix("sha256:")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parts of an image manifest that matter."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class LayeredImage:
    """Layers from the lowest up, and how to run them. ``digest`` is the manifest's, if any."""

    blobs: tuple[Blob, ...]
    config: ImageConfig
    digest: str | None = None


def parse_document(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest (``invalid_image``)."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise malformed(f"the {what} is not JSON") from error
    if not isinstance(document, dict):
        raise malformed(f"the {what} is not a JSON object")
    return document


def malformed(message: str, *, size_bytes: int | None = None) -> InvalidRequest:
    """The error for an image that does not follow its specification."""
    return InvalidRequest(message, code="invalid_image", size_bytes=size_bytes)


def descriptor(raw: object) -> Descriptor:
    """A descriptor from JSON. Raises InvalidRequest for anything but sha256 and a sane size."""
    if isinstance(raw, dict):
        kind, digest, size = raw.get("mediaType", ""), raw.get("digest"), raw.get("size")
        if isinstance(digest, str) and type(size) is int and isinstance(kind, str):
            digits = digest.removeprefix("sha256:")
            hexadecimal = set(digits) <= set("0123456789abcdef")
            if digest.startswith("sha256:") and len(digits) == 64 and hexadecimal and size >= 0:
                return Descriptor(kind, digest, size)
    raise malformed("the image has a malformed descriptor")


def parse_manifest(document: Mapping[str, Any]) -> Manifest:
    """A manifest from JSON. Foreign and unknown layer types are refused."""
    layers = document.get("layers")
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise malformed("the image manifest has no layers or too many")
    parsed = tuple(descriptor(layer) for layer in layers)
    for layer in parsed:
        if layer.media_type not in LAYER_TYPES:
            raise refused(f"layers of type {layer.media_type[:120]!r} are not supported")
    config = descriptor(document.get("config"))
    if config.size > MAX_DOCUMENT:
        raise malformed("the image config is too large", size_bytes=config.size)
    return Manifest(config, parsed)


def choose_manifest(document: Mapping[str, Any], platform: str) -> Descriptor:
    """The manifest for ``platform`` in an index. Raises NotFound (``platform_not_available``)."""
    manifests = document.get("manifests")
    if not isinstance(manifests, list):
        raise malformed("the image index has no manifests")
    wanted_os, wanted_arch = platform.split("/")[:2]
    for raw in manifests:
        found = raw.get("platform") if isinstance(raw, dict) else None
        if isinstance(found, dict) and (found.get("os"), found.get("architecture")) == (
            wanted_os,
            wanted_arch,
        ):
            return descriptor(raw)
    if len(manifests) == 1 and isinstance(manifests[0], dict) and not manifests[0].get("platform"):
        return descriptor(manifests[0])
    raise NotFound(f"the image is not made for {platform}", code="platform_not_available")


def parse_config(data: bytes, layers: int, platform: str) -> tuple[ImageConfig, tuple[str, ...]]:
    """How to run the image, and the digests of its unpacked layers (config.md)."""
    document = parse_document(data, "image config")
    found = f"{document.get('os', 'linux')}/{document.get('architecture', 'amd64')}"
    if found != "/".join(platform.split("/")[:2]):
        raise NotFound(f"the image is made for {found[:40]}", code="platform_not_available")
    rootfs = document.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != layers:
        raise malformed("the image config and manifest name different numbers of layers")
    raw = document.get("config") or {}
    if not isinstance(raw, dict):
        raise malformed("the image config is malformed")
    environment = dict(item.partition("=")[::2] for item in _words(raw, "Env"))
    config = ImageConfig(
        entrypoint=_words(raw, "Entrypoint"),
        cmd=_words(raw, "Cmd"),
        env=environment,
        working_dir=str(raw.get("WorkingDir") or "/"),
        user=str(raw.get("User") or ""),
    )
    return config, tuple(str(item) for item in diff_ids)


def _words(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(i, str) and "\0" not in i for i in value):
        raise malformed(f"the image config has a malformed {key}")
    return tuple(value)


def open_source(source: Path, scratch: Path, platform: str = "linux/amd64") -> LayeredImage:
    """The image at ``source``: an OCI layout directory or tar, docker archive, or root tar.

    A tar of a layout is copied out blob by blob into ``scratch`` (flat, checked names). Blocking.
    Raises NotFound, InvalidRequest (``invalid_image``, ``invalid_layer``), StorageFull.
    """
    if source.is_dir():
        return _open_layout(source, platform)
    if not source.is_file():
        raise NotFound(f"there is no file {source.name!r} to import")
    blob = Blob(source)
    if not any(_ARCHIVE_NAME.match(name) for name in _first_names(blob)):
        return LayeredImage((blob,), ImageConfig())
    with storage_errors("unpack an image archive"):
        _unpack_layout(blob, scratch)
    if (scratch / "index.json").is_file():
        return _open_layout(scratch, platform)
    if (scratch / "manifest.json").is_file():
        return _open_docker(scratch, platform)
    return LayeredImage((blob,), ImageConfig())


def _first_names(blob: Blob) -> list[str]:
    names: list[str] = []
    with reading(blob) as archive:
        for index, info in entries(archive):
            names.append(info.name.removeprefix("./"))
            if index >= 8:
                break
    return names


def _unpack_layout(blob: Blob, scratch: Path) -> None:
    """Write the regular files of an archive below ``scratch``, only to names we make ourselves."""
    expanded = 0
    with reading(blob) as archive:
        for index, info in entries(archive):
            if index >= MAX_ENTRIES:
                raise refused(f"the archive has more than {MAX_ENTRIES} entries")
            parts = [p for p in info.name.split("/") if p not in ("", ".")]
            if not info.isreg() or not parts or len(parts) > 3:
                continue
            expanded += info.size  # sparse files expand too
            check_expansion(expanded, blob.length)
            if any(part.startswith(".") or "\0" in part or len(part) > 128 for part in parts):
                raise refused(f"entry {info.name[:80]!r} has a bad name", entry=info.name[:256])
            target = scratch.joinpath(*parts)
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            content = archive.extractfile(info)
            if content is not None:
                with target.open("wb") as file:
                    shutil.copyfileobj(content, file, _HASH_CHUNK)


def _open_layout(root: Path, platform: str) -> LayeredImage:
    index = parse_document(_document(root / "index.json"), "image index")
    found = choose_manifest(index, platform) if len(index.get("manifests") or []) != 1 else None
    found = found or descriptor(index["manifests"][0])
    document = parse_document(_blob_bytes(root, found), "image manifest")
    if document.get("mediaType", found.media_type) in INDEX_TYPES or "manifests" in document:
        found = choose_manifest(document, platform)
        document = parse_document(_blob_bytes(root, found), "image manifest")
    manifest = parse_manifest(document)
    raw = _blob_bytes(root, manifest.config)
    config, diff_ids = parse_config(raw, len(manifest.layers), platform)
    blobs = tuple(
        Blob(_checked_blob(root, layer), diff_id=diff_id)
        for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
    )
    return LayeredImage(blobs, config, found.digest)


def _open_docker(root: Path, platform: str) -> LayeredImage:
    try:
        (first, *_) = json.loads(_document(root / "manifest.json"))
        config_name, layer_names = str(first["Config"]), [str(n) for n in first["Layers"]]
    except (ValueError, KeyError, TypeError) as error:
        raise malformed("the docker archive has a malformed manifest.json") from error
    raw = _document(_inside(root, config_name))
    config, diff_ids = parse_config(raw, len(layer_names), platform)
    blobs = tuple(
        Blob(_inside(root, name), diff_id=diff_id)
        for name, diff_id in zip(layer_names, diff_ids, strict=True)
    )
    return LayeredImage(blobs, config, f"sha256:{hashlib.sha256(raw).hexdigest()}")


def _inside(root: Path, name: str) -> Path:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise refused(f"the archive names {name[:80]!r}, outside of itself")
    path = root / name
    if not path.is_file() or not path.resolve().is_relative_to(root.resolve()):
        raise malformed(f"the archive lacks {name[:80]!r}")
    return path


def _document(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_DOCUMENT:
            raise malformed(f"{path.name} is too large")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise malformed(f"the image lacks {path.name}") from error


def _blob_bytes(root: Path, wanted: Descriptor) -> bytes:
    if wanted.size > MAX_DOCUMENT:
        raise malformed("a document of the image is too large", size_bytes=wanted.size)
    return _checked_blob(root, wanted).read_bytes()


def _checked_blob(root: Path, wanted: Descriptor) -> Path:
    path = root / "blobs" / "sha256" / wanted.hex
    if not path.is_file() or not path.resolve().is_relative_to(root.resolve()):
        raise malformed(f"the image lacks blob {wanted.digest}")
    if path.stat().st_size != wanted.size:
        raise refused(f"blob {wanted.digest} is not {wanted.size} bytes long")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted.hex:
            raise refused(f"blob {wanted.digest} does not have that digest")
    return path
