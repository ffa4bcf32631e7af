"""Snapshot payloads: built beside, made durable, never changed afterwards.

Order of durability: data, fsync; manifest, fsync; directory; then (by the caller) one commit.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from stillframe.host.extents import exclusive_bytes
from stillframe.host.files import atomic_write, fsync_directory, fsync_file
from stillframe.model.errors import DamagedData
from stillframe.store.paths import Payload

FORMAT_VERSION = 1
_MAX_MANIFEST = 1 << 20
_MAX_DEVICES = 64 << 20


@dataclass(frozen=True, slots=True)
class PayloadSize:
    """Bytes of a payload: apparent (``size``), and on disk for it alone (``stored``)."""

    size: int
    stored: int


def seal(payload: Payload, facts: dict[str, Any]) -> PayloadSize:
    """Make everything in ``payload`` durable and write its manifest. Raises OSError.

    ``facts`` (hypervisor, versions, accelerator, parent) go into the manifest as they are.
    """
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(payload.directory.iterdir()):
        if path == payload.manifest:
            continue
        fsync_file(path)
        files[path.name] = {"size": path.stat().st_size}
    if payload.devices.exists():
        files["devices"]["blake3"] = blake3(payload.devices.read_bytes()).hexdigest()
    manifest = {"format": FORMAT_VERSION, "files": files, **facts}
    atomic_write(payload.manifest, json.dumps(manifest, indent=1, sort_keys=True).encode())
    fsync_directory(payload.directory)
    return measure(payload)


def without_file(manifest: bytes, name: str) -> bytes:
    """A sealed manifest less one of its files: for a payload that shares only the others."""
    document = json.loads(manifest)
    document["files"].pop(name, None)
    return json.dumps(document, indent=1, sort_keys=True).encode()


def measure(payload: Payload) -> PayloadSize:
    """Sizes of the payload's regular files as they are now.

    What the payload shares with others, by hard link or by reflink, is not counted as stored.
    """
    paths = [p for p in payload.directory.iterdir() if p.is_file() and not p.is_symlink()]
    return PayloadSize(
        size=sum(p.stat().st_size for p in paths), stored=sum(exclusive_bytes(p) for p in paths)
    )


def publish(built: Payload, final: Payload) -> None:
    """Give a sealed payload its final name, durably. Raises OSError."""
    built.directory.rename(final.directory)
    fsync_directory(final.directory.parent)


def check(payload: Payload) -> dict[str, Any]:
    """Read the manifest and check what must be right before any load: sizes and device state.

    Returns the manifest. Raises DamagedData naming the file.
    """
    manifest = _read_manifest(payload.manifest)
    for name, wanted in manifest["files"].items():
        path = payload.directory / name
        try:
            size = path.stat(follow_symlinks=False).st_size
        except OSError as error:
            raise _damaged(path, "is missing") from error
        if size != wanted.get("size"):
            raise _damaged(path, f"has {size} bytes, {wanted.get('size')} expected")
    digest = manifest["files"].get("devices", {}).get("blake3")
    if digest is not None:
        if payload.devices.stat().st_size > _MAX_DEVICES:
            raise _damaged(payload.devices, "is too large")
        if blake3(payload.devices.read_bytes()).hexdigest() != digest:
            raise _damaged(payload.devices, "does not match its digest")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise _damaged(path, "is missing") from error
    with os.fdopen(fd, "rb") as file:
        text = file.read(_MAX_MANIFEST + 1)
    try:
        manifest = json.loads(text)
        files = manifest["files"]
        good = all(
            isinstance(facts, dict) and "/" not in name and name not in {"", ".", ".."}
            for name, facts in files.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, "cannot be read") from error
    if len(text) > _MAX_MANIFEST or not good:
        raise _damaged(path, "cannot be read")
    if manifest.get("format") != FORMAT_VERSION:
        raise DamagedData(
            f"snapshot format {manifest.get('format')!r} is not known",
            hint="it was made by another version of stillframe",
        )
    return dict(manifest)


def _damaged(path: Path, what: str) -> DamagedData:
    return DamagedData(
        f"snapshot file {path.name} {what}",
        hint="the snapshot is kept, but will not be loaded",
        file=path.name,
    )
