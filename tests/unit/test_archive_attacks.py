"""Archives made to do harm are refused, and leave nothing.

The numbers are those of the fault catalogue: F49, S22, S24, S25 and S27.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3

from stillframe.model.errors import InvalidRequest
from stillframe.model.units import MIB
from stillframe.store.archive import FRAME, MAX_STORED, TRAILER, ZSTD, Part
from stillframe.store.archive_import import Importer, Limits
from stillframe.store.digests import extent_digests
from stillframe.store.manifest import FileEntry, encode_document, encode_manifest
from stillframe.store.paths import Payload
from support.archives import PLENTY, Forge, archive, contents, refused, take
from support.payloads import listing, make_payload, noise


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return make_payload(tmp_path / "payload")


def a_disk(data: bytes, name: str = "overlay.raw") -> tuple[dict[str, FileEntry], bytes]:
    """An entry that is right for ``data``, and the table."""
    table = extent_digests(data)
    entry = FileEntry(len(data), None, f"{name}.blake3", blake3(table).hexdigest())
    return {name: entry}, table


DISK = b"disk" * 1000
ENTRIES, TABLE = a_disk(DISK)


def good() -> Forge:
    return Forge().manifest(ENTRIES).add(Part.OVERLAY_TABLE, TABLE)


def test_the_forge_makes_what_is_taken(tmp_path: Path) -> None:
    take(good().add(Part.OVERLAY, DISK).end(), tmp_path / "arrived")
    assert (tmp_path / "arrived" / "overlay.raw").read_bytes() == DISK


FORGED: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: Forge().end(),
    "content first": lambda: Forge().add(Part.OVERLAY, DISK).end(),
    "about first": lambda: Forge().add(Part.ABOUT, b"{}").end(),
    "manifest twice": lambda: Forge().manifest(ENTRIES).manifest(ENTRIES).end(),
    "about twice": lambda: (
        Forge().manifest(ENTRIES).add(Part.ABOUT, b"{}").add(Part.ABOUT, b"{}").end()
    ),
    "about is a list": lambda: Forge().manifest(ENTRIES).add(Part.ABOUT, b"[]").end(),
    "about is deep": lambda: Forge().manifest(ENTRIES).add(Part.ABOUT, b"[" * 100_000).end(),
    "about is not UTF-8": lambda: Forge().manifest(ENTRIES).add(Part.ABOUT, b'{"a":"\xff"}').end(),
    "a document beside its place": lambda: (
        Forge().add(Part.MANIFEST, encode_manifest(ENTRIES, {}), offset=1).end()
    ),
    "a part that is none": lambda: good().add(Part.OVERLAY, DISK).add(99, b"x").end(),
    "an encoding that is none": lambda: good().add(Part.OVERLAY, DISK, encoding=2).end(),
    "a file that is not listed": lambda: good().add(Part.MEMORY, b"x").end(),
    "an image that is not listed": lambda: (
        good().add(Part.OVERLAY, DISK).add(Part.ROOT, b"x").end()
    ),
    "content before its table": lambda: Forge().manifest(ENTRIES).add(Part.OVERLAY, DISK).end(),
    "table after its content": lambda: (
        Forge().manifest(ENTRIES).add(Part.OVERLAY, DISK).add(Part.OVERLAY_TABLE, TABLE).end()
    ),
    "no table": lambda: Forge().manifest(ENTRIES).end(),
    "no content": lambda: good().end(),
    "another table": lambda: Forge().manifest(ENTRIES).add(Part.OVERLAY_TABLE, bytes(32)).end(),
    "another content": lambda: good().add(Part.OVERLAY, DISK[::-1]).end(),
    "content twice": lambda: good().add(Part.OVERLAY, DISK).add(Part.OVERLAY, DISK).end(),
    "too short": lambda: good().add(Part.OVERLAY, DISK[:-1]).end(),
    "too long": lambda: good().add(Part.OVERLAY, DISK + b"x").end(),
    "empty": lambda: good().add(Part.OVERLAY, b"").end(),
    "beside a frame": lambda: good().add(Part.OVERLAY, DISK[1:], offset=1).end(),
    "beyond the file": lambda: good().add(Part.OVERLAY, DISK, offset=FRAME).end(),
    "far beyond": lambda: good().add(Part.OVERLAY, DISK, offset=2**64 - FRAME).end(),
    "a wrong count": lambda: (
        good().add(Part.OVERLAY, DISK).add(Part.TRAILER, TRAILER.pack(1, 2, bytes(32))).data
    ),
    "half a trailer": lambda: good().add(Part.OVERLAY, DISK).add(Part.TRAILER, b"x").data,
    "more after the trailer": lambda: good().add(Part.OVERLAY, DISK).end() + b"x",
    "a manifest of format 1": lambda: (
        Forge().add(Part.MANIFEST, b'{"format": 1, "files": {"overlay.raw": {"size": 9}}}').end()
    ),
    "a newer manifest": lambda: (
        Forge().add(Part.MANIFEST, encode_document({"format": 3, "files": {}})).end()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_s22_a_forged_archive_is_refused(tmp_path: Path, name: str) -> None:
    error = refused(FORGED[name](), tmp_path)
    assert error.facts


HOSTILE_NAMES = [
    "../overlay.raw", "/etc/passwd", "a/b", "..", ".", "", "a\0b", ".hidden", "config.raw",
    "manifest.json", "memory.blake3", "memory.zst", "OVERLAY.RAW", "overlay.raw ", "overlay.raw\n",
    "\u202eoverlay", "ö", "x" * 10_000, "-rf",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_s22_names_come_from_our_table_only(tmp_path: Path, name: str) -> None:
    entries, table = a_disk(DISK, name)
    error = refused(
        Forge().manifest(entries).add(Part.OVERLAY_TABLE, table).add(Part.OVERLAY, DISK).end(),
        tmp_path,
    )
    assert error.facts


def test_s22_s27_a_link_put_in_the_way_is_not_followed(payload: Payload, tmp_path: Path) -> None:
    whole, victim = archive(payload), tmp_path / "victim"
    victim.mkdir()
    (victim / "memory").write_bytes(b"precious")
    arrived = tmp_path / "arrived"
    arrived.symlink_to(victim)
    with pytest.raises(FileExistsError):
        Importer(arrived, PLENTY)
    arrived.unlink()
    with Importer(arrived, PLENTY) as importer:  # the directory is swapped under its hands
        arrived.rename(tmp_path / "moved")
        arrived.symlink_to(victim)
        importer.feed(whole[:-5])
    assert listing(victim) == ["memory"]
    assert (victim / "memory").read_bytes() == b"precious"
    assert listing(tmp_path / "moved") == []
    (tmp_path / "moved").rmdir()
    arrived.unlink()
    with Importer(arrived, PLENTY) as importer:  # a file is planted before it is made
        (arrived / "memory").symlink_to(victim / "memory")
        with pytest.raises(FileExistsError):
            importer.feed(whole)
    assert (victim / "memory").read_bytes() == b"precious"


def test_an_import_never_takes_a_directory_that_is_there(payload: Payload) -> None:
    before = contents(payload)
    with pytest.raises(FileExistsError):
        take(archive(payload), payload.directory)
    assert contents(payload) == before


BOMBS: dict[str, Callable[[], Forge]] = {
    "256 MiB of zeros": lambda: good().add(
        Part.OVERLAY, zstandard.compress(bytes(256 * MIB)), length=len(DISK), encoding=ZSTD
    ),
    "a claim of an EiB": lambda: good().add(
        Part.OVERLAY, struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 88, 1 << 60) + b"\x09\0\0x",
        length=len(DISK), encoding=ZSTD,
    ),
    "two frames": lambda: good().add(
        Part.OVERLAY, zstandard.compress(DISK) * 2, length=len(DISK), encoding=ZSTD
    ),
    "less than it says": lambda: good().add(
        Part.OVERLAY, zstandard.compress(DISK[1:]), length=len(DISK), encoding=ZSTD
    ),
    "no zstd at all": lambda: good().add(Part.OVERLAY, DISK, length=len(DISK), encoding=ZSTD),
    "a content of 4 GiB": lambda: good().add(
        Part.OVERLAY, zstandard.compress(DISK), length=2**32 - 1, encoding=ZSTD
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_s24_a_bomb_does_not_expand(tmp_path: Path, name: str) -> None:
    refused(BOMBS[name]().end(), tmp_path)


@pytest.mark.parametrize("claim", [MAX_STORED + 1, 2**32 - 1])
def test_s24_a_record_that_is_too_long_is_refused_at_its_header(tmp_path: Path, claim: int) -> None:
    forge = good().add(Part.OVERLAY, b"", length=FRAME, encoding=ZSTD, claim=claim)
    with Importer(tmp_path / "arrived", PLENTY) as importer, pytest.raises(InvalidRequest):
        importer.feed(forge.data)


def test_s24_what_is_too_large_is_refused_before_it_takes_room(tmp_path: Path) -> None:
    entry = FileEntry(1 << 62, None, "memory.blake3", "0" * 64)
    error = refused(Forge().manifest({"memory": entry}).end(), tmp_path)
    assert error.code == "archive_too_large"
    assert error.facts["limit"] == PLENTY.size
    whole = good().add(Part.OVERLAY, DISK).end()
    size = len(DISK) + len(TABLE)
    assert refused(whole, tmp_path, Limits(size - 1, 1 << 40)).code == "archive_too_large"
    assert refused(whole, tmp_path, Limits(size, len(DISK))).code == "archive_too_large"
    take(whole, tmp_path / "arrived", Limits(size, 10_000))


def test_s24_a_small_file_may_not_be_large(tmp_path: Path) -> None:
    entries = {"devices": FileEntry(65 * MIB, "0" * 64)}
    assert "devices" in refused(Forge().manifest(entries).end(), tmp_path).message


def test_s25_a_disk_that_looks_like_another_format_is_bytes(tmp_path: Path) -> None:
    header = struct.pack(">4sIQIIQ", b"QFI\xfb", 3, 104, 11, 16, 1 << 40) + b"/etc/shadow"
    disk = header + bytes(70_000 - len(header))
    entries, table = a_disk(disk)
    forge = Forge().manifest(entries).add(Part.OVERLAY_TABLE, table).add(Part.OVERLAY, disk)
    take(forge.end(), tmp_path / "arrived")
    assert (tmp_path / "arrived" / "overlay.raw").read_bytes() == disk


def test_f49_foreign_and_newer_archives_are_refused_by_name(tmp_path: Path) -> None:
    for data in (b"PK\x03\x04" + bytes(100), b"\x1f\x8b" + bytes(100), noise(100), b"ustar" * 9):
        assert "not a snapshot archive" in refused(data, tmp_path).message
    error = refused(struct.pack("<8sII", b"SFARCHIV", 2, 0), tmp_path)
    assert error.facts["version"] == 2
    newer = Forge().add(Part.MANIFEST, encode_document({"format": 3, "files": {}}))
    assert "format 3" in refused(newer.end(), tmp_path).message
