"""The manifest: which files a payload consists of, and what vouches for their bytes.

    {"blake3": HEX,
     "format": 2,
     "files": {"memory":  {"size": N, "extents": {"length": 65536, "table": "memory.blake3",
                                                  "blake3": HEX}},
               "devices": {"size": N, "blake3": HEX}},
     ...facts}

The digest at the top is that of the manifest itself, with the digest's 64 digits written as zeros:
so a single wrong bit is found before anything is believed. Format 1 has neither this nor
``extents``; it is still read. docs/format.md describes both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from blake3 import blake3

from stillframe.host.files import is_host_trouble, open_regular
from stillframe.model.errors import DamagedData
from stillframe.model.units import KIB, MIB

FORMAT_VERSION = 2
EXTENT = 64 * KIB  # bytes that one digest of a table vouches for
MAX_MANIFEST = MIB
MAX_SMALL = 64 * MIB  # largest file that has one digest as a whole
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_SIZE = 2**63 - 1
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest says about one file.

    ``size`` in bytes; ``blake3`` is the digest of the whole file (small files), ``table`` the name
    of its digest table and ``table_blake3`` that table's digest. Format 1 may have neither.
    """

    size: int
    blake3: str | None = None
    table: str | None = None
    table_blake3: str | None = None

    def to_document(self) -> dict[str, Any]:
        """The entry as it stands in the manifest."""
        document: dict[str, Any] = {"size": self.size}
        if self.blake3 is not None:
            document["blake3"] = self.blake3
        if self.table is not None:
            document["extents"] = {
                "length": EXTENT, "table": self.table, "blake3": self.table_blake3,
            }  # fmt: skip
        return document


def table_name(name: str) -> str:
    """The name of the digest table of a payload file."""
    return f"{name}.blake3"


def encode_manifest(entries: Mapping[str, FileEntry], facts: Mapping[str, Any]) -> bytes:
    """The manifest as stored: JSON, keys sorted, so that equal payloads have equal manifests."""
    files = {name: entry.to_document() for name, entry in entries.items()}
    return encode_document({**facts, "format": FORMAT_VERSION, "files": files})


def encode_document(document: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest, with their own digest in them."""
    text = json.dumps({**document, "blake3": _NO_DIGEST}, indent=1, sort_keys=True).encode()
    place = b'\n "blake3": "%s"'  # with one space only at the top
    digest = blake3(text).hexdigest().encode()
    return text.replace(place % _NO_DIGEST.encode(), place % digest, 1)


def _is_intact(text: bytes, document: Mapping[str, Any]) -> bool:
    """Whether the manifest has its own digest, or none as in format 1."""
    if "blake3" not in document:
        return bool(document["format"] == 1)
    digest = document["blake3"]
    if not _is_digest(digest):
        return False
    blank = text.replace(digest.encode(), _NO_DIGEST.encode())
    return text.count(digest.encode()) == 1 and bool(blake3(blank).hexdigest() == digest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest at ``path``, checked for its shape.

    Raises DamagedData naming the file, OSError as ``unreadable``.
    """
    return parse_manifest(read_small(path, MAX_MANIFEST), path.name)


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a small regular file.

    Raises DamagedData naming the file, OSError as ``unreadable``.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise damaged(path.name, "is missing") from error
    except OSError as error:
        raise unreadable(path.name, error) from error
    if len(data) > limit:
        raise damaged(path.name, f"is larger than {limit} bytes")
    return data


def parse_manifest(text: bytes, name: str = "manifest.json") -> dict[str, Any]:
    """A manifest from its bytes; unknown facts are kept. Raises DamagedData naming ``name``."""
    if len(text) > MAX_MANIFEST:
        raise damaged(name, f"is larger than {MAX_MANIFEST} bytes")
    try:
        manifest = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise damaged(name, "cannot be read: it is not JSON") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise damaged(name, "cannot be read: it does not list files")
    version = manifest.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        number = version if type(version) is int and version < 2**32 else "of another kind"
        raise DamagedData(
            f"snapshot format {number} is not known",
            hint="it was made by another version of stillframe",
            file=name,
            known=FORMAT_VERSION,
        )
    if not _is_intact(text, manifest):
        raise damaged(name, "does not match its own digest")
    for file, document in manifest["files"].items():
        if _entry(file, document) is None:
            raise damaged(name, f"cannot be read: its entry {file[:40]!r} is wrong")
    return manifest


def file_entries(manifest: Mapping[str, Any]) -> dict[str, FileEntry]:
    """The files of a manifest that ``parse_manifest`` has accepted."""
    found = {name: _entry(name, document) for name, document in manifest["files"].items()}
    return {name: entry for name, entry in found.items() if entry is not None}


def _entry(name: str, document: object) -> FileEntry | None:
    """The entry, or None when its shape is wrong."""
    if not _FILE_NAME.fullmatch(name) or not isinstance(document, dict):
        return None
    size, whole, extents = document.get("size"), document.get("blake3"), document.get("extents")
    if type(size) is not int or not 0 <= size <= _MAX_SIZE:
        return None
    if whole is not None and not _is_digest(whole):
        return None
    if extents is None:
        return FileEntry(size, whole)
    good = (
        isinstance(extents, dict)
        and extents.get("length") == EXTENT
        and extents.get("table") == table_name(name)
        and _is_digest(extents.get("blake3"))
    )
    return FileEntry(size, whole, table_name(name), extents["blake3"]) if good else None


def _is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _HEX_DIGEST.fullmatch(value) is not None


def unreadable(name: str, error: OSError) -> DamagedData:
    """The error for a payload file that could not be read.

    Raises ``error`` itself when it tells of the host (no descriptors, no permission): the file may
    be whole, and what is called damaged stays marked so.
    """
    if is_host_trouble(error):
        raise error
    return damaged(name, f"cannot be read: {error.strerror}")


def damaged(name: str, what: str, **facts: int) -> DamagedData:
    """The error for a payload file that is not what was written."""
    error = DamagedData(
        f"snapshot file {name} {what}",
        hint="the snapshot is kept, but will not be loaded",
        file=name,
    )
    error.facts.update(facts)
    return error
