"""Snapshot payloads: built beside, made durable, never changed afterwards.

Order of durability: data, fsync; manifest, fsync; directory; then (by the caller) one commit.

The memory image has one of several representations: ``memory``, ``memory.zst``, ``memory.lz4``. The
rule that makes a switch atomic: the first of these that is there, in this order, is the one; the
others are leftovers. A file gets such a name only when it is complete and durable.

* Compress: write ``.memory.zst.new``, fsync; rename to ``memory.zst``, fsync of the directory;
  then remove ``memory`` - that is the switch.
* Expand again: write ``.memory.new``, fsync; rename to ``memory`` - that is the switch; fsync of
  the directory; then remove ``memory.zst``.

So after a crash at any point one complete representation is the valid one, and ``settle`` removes
the rest. Manifest and digest tables speak of the image, whatever represents it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from stillframe.host.extents import shared_bytes
from stillframe.host.files import allocated_bytes, atomic_write, fsync_directory, fsync_file
from stillframe.model.values import CompressionAlgorithm
from stillframe.store.compression import CompressedReader
from stillframe.store.digests import table_size, write_table
from stillframe.store.manifest import (
    MAX_SMALL,
    FileEntry,
    damaged,
    encode_document,
    encode_manifest,
    file_entries,
    read_manifest,
    read_small,
    unreadable,
)
from stillframe.store.paths import Payload
from stillframe.store.readers import FileReader, Reader

_ADDING_TABLES = threading.Lock()


@dataclass(frozen=True, slots=True)
class PayloadSize:
    """Bytes of a payload: apparent (``size``), and on disk (``stored``); see ``measure``."""

    size: int
    stored: int


def seal(
    payload: Payload, facts: Mapping[str, Any], tables: Mapping[str, str] | None = None
) -> PayloadSize:
    """Make everything in ``payload`` durable and write its manifest. Raises OSError.

    ``facts`` (hypervisor, versions, accelerator, parent) go into the manifest as they are.
    ``tables`` names the files whose digest table is already there, each with the BLAKE3 of its
    table; the other tables are made here, which reads their files. That is nothing for a pause.
    """
    entries: dict[str, FileEntry] = {}
    for name in _content(payload):
        known = None if tables is None else tables.get(name)
        entries[name] = _entry(payload, name, known)
    for path in _files(payload):
        fsync_file(path)
    atomic_write(payload.manifest, encode_manifest(entries, facts))
    fsync_directory(payload.directory)
    return measure(payload)


def add_tables(payload: Payload) -> dict[str, Any]:
    """Bring the manifest of a payload without digest tables (format 1) up to date; the manifest.

    What lies there now is taken as right; its device state gets a digest as a whole. One at a time.
    Raises DamagedData, OSError.
    """
    with _ADDING_TABLES:
        manifest = check(payload)
        entries = file_entries(manifest)
        missing = [name for name, entry in entries.items() if lacks_digests(name, entry)]
        if missing:
            for name in missing:
                payload.table(name).unlink(missing_ok=True)
                entries[name] = _entry(payload, name, None)
                if entries[name].table is not None:
                    fsync_file(payload.table(name))
            facts = {k: v for k, v in manifest.items() if k not in {"format", "files", "blake3"}}
            atomic_write(payload.manifest, encode_manifest(entries, facts))
            fsync_directory(payload.directory)
        return read_manifest(payload.manifest)


def lacks_digests(name: str, entry: FileEntry) -> bool:
    """Whether a file has not the digests it has in format 2: a table, or one for device state."""
    return entry.blake3 is None if name == "devices" else entry.table is None


def _entry(payload: Payload, name: str, known_table: str | None) -> FileEntry:
    # State that holds the guest's memory too (vz) is digested in parts, as memory is.
    if name == payload.devices.name and payload.devices.stat().st_size <= MAX_SMALL:
        content = read_small(payload.devices, MAX_SMALL)
        return FileEntry(len(content), blake3=blake3(content).hexdigest())
    table = payload.table(name)
    with open_content(payload, name) as reader:
        size = reader.size
        if known_table is None:
            known_table = write_table(reader, table)
        elif table.stat().st_size != table_size(size):
            raise ValueError(f"the digest table of {name} is not for {size} bytes")
    return FileEntry(size, table=table.name, table_blake3=known_table)


def _files(payload: Payload) -> list[Path]:
    """Its regular files by name, without what is being built."""
    paths = sorted(payload.directory.iterdir())
    return [p for p in paths if p.is_file() and not p.is_symlink() and not p.name.startswith(".")]


def _content(payload: Payload) -> list[str]:
    """The names that the manifest lists; a compressed memory image goes by that of the image."""
    compressed = {payload.compressed(algorithm) for algorithm in CompressionAlgorithm}
    files = [payload.memory if path in compressed else path for path in _files(payload)]
    others = {payload.table(path.name) for path in files} | {payload.manifest}
    return sorted({path.name for path in files if path not in others})


def without_file(manifest: bytes, name: str) -> bytes:
    """A sealed manifest less one of its files: for a payload that shares only the others."""
    document = json.loads(manifest)
    document["files"].pop(name, None)
    return encode_document(document)


def share_memory(source: Payload, destination: Payload) -> dict[str, str]:
    """Give ``destination`` the memory, devices and table of ``source``, by hard links.

    A memory that is there already (the same in another representation) stays. Returns what
    ``seal`` wants to know as ``tables``. Raises DamagedData, OSError.
    """
    entries = file_entries(read_manifest(source.manifest))
    if source.memory.name not in entries:
        raise damaged(source.memory.name, "is missing")
    if memory_file(destination) is None:
        _share_image(source, destination)
    os.link(source.devices, destination.devices)
    tables = {}
    for name in (source.memory.name, source.devices.name):
        entry = entries.get(name)
        if entry is not None and entry.table is not None and entry.table_blake3 is not None:
            os.link(source.directory / entry.table, destination.directory / entry.table)
            tables[name] = entry.table_blake3
    return tables


def _share_image(source: Payload, destination: Payload) -> None:
    for path, _ in 2 * _representations(source):  # a switch may happen between two looks
        with contextlib.suppress(FileNotFoundError):
            os.link(path, destination.directory / path.name)
            return
    raise damaged(source.memory.name, "is missing")


def image_key(payload: Payload) -> str:
    """What names the content of a payload's memory image: the digest of its table.

    Raises DamagedData, OSError; format 1 has no tables, see ``add_tables``.
    """
    entry = file_entries(read_manifest(payload.manifest)).get(payload.memory.name)
    if entry is None or entry.table_blake3 is None:
        raise damaged(payload.memory.name, "has no digest table")
    return entry.table_blake3


def measure(payload: Payload, beside: Payload | None = None) -> PayloadSize:
    """Sizes of the payload's regular files as they are now.

    What they share with the files of the same names ``beside``, by hard link or by reflink, is not
    counted as stored. Raises OSError.
    """
    paths, stored = _files(payload), 0
    for path in paths:
        stored += allocated_bytes(path)
        if beside is not None:
            stored -= shared_bytes(path, beside.directory / path.name)
    return PayloadSize(size=sum(p.stat().st_size for p in paths), stored=stored)


def publish(built: Payload, final: Payload) -> None:
    """Give a sealed payload its final name, durably. Raises OSError."""
    built.directory.rename(final.directory)
    fsync_directory(final.directory.parent)


def check(payload: Payload) -> dict[str, Any]:
    """Read the manifest and check what must be right before any load: sizes and device state.

    A compressed memory image counts as the image it represents. Returns the manifest. Raises
    DamagedData naming the file, OSError as ``unreadable``.
    """
    manifest = read_manifest(payload.manifest)
    for name, entry in file_entries(manifest).items():
        with open_content(payload, name) as reader:
            check_content(reader, entry)
    return manifest


def check_content(reader: Reader, entry: FileEntry) -> None:
    """Check the size of an open file, and a small file's digest.

    Raises DamagedData naming the file; for a wrong size with ``offset`` and ``length`` of what is
    missing or too much. OSError as ``unreadable``.
    """
    if reader.size != entry.size:
        raise damaged(
            reader.name, f"has {reader.size} bytes, {entry.size} expected",
            offset=min(reader.size, entry.size), length=abs(reader.size - entry.size),
        )  # fmt: skip
    if entry.blake3 is None:
        return
    if entry.size > MAX_SMALL:
        raise damaged(reader.name, "is too large")
    try:
        content = reader.read(0, entry.size)
    except OSError as error:
        raise unreadable(reader.name, error) from error
    if blake3(content).hexdigest() != entry.blake3:
        raise damaged(reader.name, "does not match its digest")


# -- representations of the memory image -----------------------------------------------------------
def memory_file(payload: Payload) -> tuple[Path, CompressionAlgorithm | None] | None:
    """The file that represents the memory, and how it is compressed; None without memory."""
    for path, algorithm in _representations(payload):
        if path.is_file():
            return path, algorithm
    return None


def _representations(payload: Payload) -> list[tuple[Path, CompressionAlgorithm | None]]:
    """All there could be; the first that is there is the valid one."""
    compressed = [(payload.compressed(algorithm), algorithm) for algorithm in CompressionAlgorithm]
    return [(payload.memory, None), *compressed]


def switch_to_compressed(payload: Payload, algorithm: CompressionAlgorithm) -> None:
    """Make the finished ``being_built(compressed(algorithm))`` the memory. Raises OSError."""
    final = payload.compressed(algorithm)
    payload.being_built(final).rename(final)
    fsync_directory(payload.directory)
    for path, _ in _representations(payload):
        if path != final:
            path.unlink(missing_ok=True)
    fsync_directory(payload.directory)


def settle(payload: Payload) -> list[str]:
    """Remove what an interrupted switch left; the names removed. Raises OSError."""
    valid, removed = memory_file(payload), []
    for path, _ in _representations(payload):
        leftovers = [payload.being_built(path)]
        if valid is not None and path != valid[0]:
            leftovers.append(path)
        for leftover in leftovers:
            if leftover.exists():
                leftover.unlink()
                removed.append(leftover.name)
    if removed:
        fsync_directory(payload.directory)
    return removed


def open_content(payload: Payload, name: str) -> Reader:
    """Open one of the payload's files, the memory image by what represents it.

    Holds what it opened, also when the payload is compressed or deleted meanwhile. Raises
    DamagedData naming the file, OSError as ``unreadable``.
    """
    candidates: list[tuple[Path, CompressionAlgorithm | None]] = [(payload.directory / name, None)]
    if name == payload.memory.name:
        candidates = 2 * _representations(payload)  # a switch may happen between two looks
    for path, algorithm in candidates:
        try:
            return FileReader(path) if algorithm is None else CompressedReader(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise unreadable(path.name, error) from error
    raise damaged(name, "is missing")
