"""An archive brings a snapshot over whole or not at all, and lets nothing else happen.

The numbers are those of the fault catalogue: F47, F51 and F55.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.host.files import allocated_bytes, remove_tree
from stillframe.model.errors import DamagedData, InvalidRequest
from stillframe.model.units import KIB, MIB
from stillframe.model.values import CompressionAlgorithm, CompressionConfig
from stillframe.store.archive import (
    HEAD,
    HEADER_LENGTH,
    Part,
    Position,
)
from stillframe.store.archive_export import Companion, export
from stillframe.store.archive_import import Importer
from stillframe.store.compression import compress
from stillframe.store.manifest import read_manifest
from stillframe.store.paths import Payload
from stillframe.store.payloads import check, seal, switch_to_compressed
from stillframe.store.verification import Depth, verify
from support.archives import PLENTY, archive, contents, positions, refused, take
from support.payloads import (
    Pieces,
    flip,
    listing,
    make_payload,
    noise,
    pieces,
    sizes,
    write_pieces,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return make_payload(tmp_path / "payload")


# -- there and back --------------------------------------------------------------------------------
@settings(deadline=None, max_examples=40)
@given(sizes, pieces, sizes, pieces, st.integers(1, 2 * MIB))
def test_a_snapshot_arrives_as_it_was(
    size: int, parts: Pieces, disk_size: int, disk: Pieces, chunk: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        payload, arrived = Payload(Path(directory, "one")), Payload(Path(directory, "two"))
        payload.directory.mkdir()
        write_pieces(payload.memory, size, parts)
        write_pieces(payload.overlay, disk_size, disk)
        write_pieces(payload.devices, 1000, [(0, noise(1000))])
        seal(payload, {"hypervisor": "fake"})
        found = take(archive(payload, about={"name": "ü"}), arrived.directory, chunk=max(chunk, 99))
        assert found.about == {"name": "ü"}
        assert (found.image, found.image_files) == (None, ())
        assert found.manifest == check(payload) == check(arrived)
        assert contents(arrived) == contents(payload)
        for path in arrived.directory.iterdir():
            assert path.stat().st_mode & 0o777 == 0o600
            allowed = allocated_bytes(payload.directory / path.name) + 8 * KIB
            assert allocated_bytes(path) <= allowed


def test_bytes_may_come_one_by_one(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    payload.overlay.write_bytes(b"disk")
    seal(payload, {})
    take(archive(payload), tmp_path / "arrived", chunk=1)
    assert contents(Payload(tmp_path / "arrived")) == contents(payload)


def test_the_stream_is_always_the_same(payload: Payload) -> None:
    one = archive(payload, about={"b": 1, "a": 2}, threads=1)
    assert archive(payload, about={"a": 2, "b": 1}, threads=3) == one
    algorithm = CompressionAlgorithm.LZ4
    config = CompressionConfig(True, algorithm)
    compress(payload.memory, payload.being_built(payload.compressed(algorithm)), config)
    switch_to_compressed(payload, algorithm)
    assert archive(payload, about={"a": 2, "b": 1}) == one


def test_f51_holes_are_not_sent_and_arrive_as_holes(tmp_path: Path) -> None:
    payload, arrived = Payload(tmp_path / "payload"), Payload(tmp_path / "arrived")
    payload.directory.mkdir()
    write_pieces(payload.memory, 512 * MIB, [(300 * MIB, noise(4096))])
    seal(payload, {})
    data = archive(payload)
    assert len(data) < 300 * KIB  # one page, and the table of 256 KiB
    found = take(data, arrived.directory)
    assert found.size == 512 * MIB + 512 * MIB // 2048
    assert allocated_bytes(arrived.memory) <= 64 * KIB
    *_, last = verify(arrived, Depth.FULL)
    assert last.damage == ()


def test_the_image_comes_along_when_wanted(payload: Payload, tmp_path: Path) -> None:
    write_pieces(tmp_path / "root", 3 * MIB, [(MIB, noise(MIB))])
    (tmp_path / "config").write_text("{}")
    files = {"root.squashfs": tmp_path / "root", "config.json": tmp_path / "config"}
    data = archive(payload, image=Companion("sha256:1", files))
    arrived = tmp_path / "arrived"
    found = take(data, arrived)
    assert found.image is not None
    assert found.image["digest"] == "sha256:1"
    assert found.image_files == ("root.squashfs", "root.squashfs.blake3", "config.json")
    for name, path in files.items():
        assert (arrived / name).read_bytes() == path.read_bytes()
    for name in found.image_files:
        (arrived / name).unlink()
    assert contents(Payload(arrived)) == contents(payload)


def test_it_goes_on_when_the_snapshot_is_deleted_meanwhile(
    payload: Payload, tmp_path: Path
) -> None:
    whole = archive(payload)
    stream = export(payload)
    first = next(stream)
    remove_tree(payload.directory)
    assert first + b"".join(stream) == whole


@pytest.mark.parametrize("name", ["memory", "overlay.raw", "devices", "memory.blake3"])
def test_f47_a_damaged_snapshot_is_not_exported(
    payload: Payload, tmp_path: Path, name: str
) -> None:
    flip(payload.directory / name, 8 * 66_000 if "." in name[:-7] or name == "memory" else 9)
    sent: list[bytes] = []
    with pytest.raises(DamagedData, match=name.replace(".", r"\.")):
        sent.extend(export(payload))
    with pytest.raises((DamagedData, InvalidRequest)):
        take(b"".join(sent), tmp_path / "arrived")


def test_f47_lost_data_is_not_exported_as_a_hole(payload: Payload) -> None:
    with payload.memory.open("r+b") as file:
        os.truncate(file.fileno(), MIB)
        os.truncate(file.fileno(), 4 * MIB + 4096)
    with pytest.raises(DamagedData) as caught:
        archive(payload)
    assert caught.value.facts["offset"] == MIB


def test_a_snapshot_without_tables_is_refused(payload: Payload) -> None:
    manifest = {
        "format": 1,
        "files": {"overlay.raw": {"size": payload.overlay.stat().st_size}},
    }
    payload.manifest.write_text(json.dumps(manifest))
    with pytest.raises(InvalidRequest, match=r"overlay\.raw"):
        archive(payload)


def test_a_document_that_is_too_long_is_refused(payload: Payload) -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        archive(payload, about={"x": "y" * MIB})


# -- resuming --------------------------------------------------------------------------------------
def test_a_stream_can_start_at_any_position(payload: Payload) -> None:
    whole = archive(payload, about={"a": 1})
    for position in [Position(), *positions(whole)[:-1]]:
        assert archive(payload, about={"a": 1}, position=position) == whole[position.offset :]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 400_000), max_size=6))
def test_an_import_goes_on_after_dropped_connections(amounts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        payload, arrived = make_payload(Path(directory, "payload")), Path(directory, "arrived")
        whole = archive(payload)
        with Importer(arrived, PLENTY) as importer:
            for amount in amounts:  # each connection brings so much and breaks
                position = importer.rewind()
                rest = archive(payload, position=position) if not importer.complete else b""
                importer.feed(rest[:amount])
                assert importer.position.offset <= position.offset + amount
            position = importer.rewind()
            if not importer.complete:
                importer.feed(archive(payload, position=position))
            assert importer.position.offset == len(whole)
            importer.finish()
        assert contents(Payload(arrived)) == contents(payload)


def test_what_has_come_is_told(payload: Payload, tmp_path: Path) -> None:
    whole = archive(payload)
    *_, before, end = positions(whole)
    with Importer(tmp_path / "arrived", PLENTY) as importer:
        assert (importer.total, importer.position.data) == (0, 0)
        importer.feed(whole[:-1])
        assert importer.position == before
        assert 0 < importer.position.data < importer.total
        assert not importer.complete
        importer.feed(whole[-1:])
        assert importer.position == end
        assert importer.complete


@pytest.mark.parametrize(("part", "offset"), [
    (Part.MEMORY, 5), (Part.MEMORY, 1 << 50), (Part.ROOT, 0), (99, 0), (Part.TRAILER, 0),
])  # fmt: skip
def test_a_position_of_another_archive_is_refused(payload: Payload, part: int, offset: int) -> None:
    with pytest.raises(InvalidRequest, match="no position"):
        archive(payload, position=Position(16, 1, 1, part, offset))


def test_a_position_with_another_link_ends_in_damage(payload: Payload, tmp_path: Path) -> None:
    whole = archive(payload)
    place = positions(whole)[3]
    wrong = Position(
        place.offset, place.records, place.data, place.part, place.part_offset, bytes(32)
    )
    with Importer(tmp_path / "arrived", PLENTY) as importer:
        importer.feed(whole[: place.offset])
        with pytest.raises(DamagedData):
            importer.feed(archive(payload, position=wrong))


# -- damage on the way -----------------------------------------------------------------------------
@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**40))
def test_f47_a_flipped_bit_is_never_published(chosen: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = bytearray(archive(make_payload(directory / "payload")))
        bit = chosen % (len(data) * 8)
        places = positions(bytes(data))
        data[bit // 8] ^= 1 << bit % 8
        error = refused(bytes(data), directory)
        if bit // 8 >= len(HEAD):
            assert isinstance(error, DamagedData)
            record = max(p.offset for p in places if p.offset <= bit // 8)
            assert error.facts["offset"] == record  # found where it is, not only at the end


def test_f55_an_archive_cut_short_is_never_published(payload: Payload, tmp_path: Path) -> None:
    whole = archive(payload)
    borders = [0, 8, *(place.offset for place in positions(whole))]
    lengths = {b + d for b in borders for d in (-1, 0, 1, HEADER_LENGTH)}
    for length in sorted(n for n in lengths if 0 <= n < len(whole)):
        error = refused(whole[:length], tmp_path)
        assert isinstance(error, DamagedData)
        assert "ends before its trailer" in error.message


def test_records_cannot_be_left_out_doubled_or_swapped(payload: Payload, tmp_path: Path) -> None:
    whole = archive(payload)
    starts = [place.offset for place in positions(whole)]
    records = [whole[a:b] for a, b in itertools.pairwise(starts)]
    for n in range(len(records) - 1):
        for other in (
            [*records[:n], *records[n + 1 :]],
            [*records[: n + 1], *records[n:]],
            [*records[:n], records[n + 1], records[n], *records[n + 2 :]],
        ):
            assert isinstance(refused(HEAD + b"".join(other), tmp_path), DamagedData)
    for more in (b"\0", whole):
        assert "after its end" in refused(whole + more, tmp_path).message


def test_two_archives_cannot_be_spliced(tmp_path: Path) -> None:
    payloads = [make_payload(tmp_path / name, seed=n) for n, name in enumerate(("one", "two"))]
    one, two = (archive(payload) for payload in payloads)
    for a, b in zip(positions(one)[1:-1], positions(two)[1:-1], strict=True):
        refused(one[: a.offset] + two[b.offset :], tmp_path)


def test_a_failed_import_takes_nothing_more(payload: Payload, tmp_path: Path) -> None:
    whole = archive(payload)
    importer = Importer(tmp_path / "arrived", PLENTY)
    with pytest.raises(InvalidRequest) as first:
        importer.feed(b"x" * 16)
    for again in (lambda: importer.feed(whole), importer.finish, importer.rewind):
        with pytest.raises(InvalidRequest) as later:
            again()
        assert later.value is first.value
    importer.abort()
    importer.abort()
    assert listing(tmp_path) == ["payload"]


def test_the_manifest_is_written_last_and_whole(payload: Payload, tmp_path: Path) -> None:
    whole, arrived = archive(payload), tmp_path / "arrived"
    with Importer(arrived, PLENTY) as importer:
        importer.feed(whole)
        assert "manifest.json" not in listing(arrived)
        assert importer.complete
        importer.finish()
    assert read_manifest(arrived / "manifest.json") == read_manifest(payload.manifest)


def test_no_descriptor_is_left_open(payload: Payload, tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    whole = archive(payload)
    take(whole, tmp_path / "one")
    refused(whole[:-1], tmp_path)
    stream = export(payload)
    next(stream)
    stream.close()
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# -- the description -------------------------------------------------------------------------------
def dump(data: bytes) -> Iterator[str]:
    """Lines of hexadecimal bytes with their offset and their letters."""
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        letters = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        yield f"{at:08x}  {row.hex(' '):<47}  {letters}"


def test_the_example_in_the_description_is_what_is_written(tmp_path: Path) -> None:
    text = (ROOT / "docs/format.md").read_text()
    example = text[text.index("### Example") :]
    manifest, dumped = re.findall(r"```(?:json)?\n(.*?)\n```", example, re.DOTALL)
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    payload.overlay.write_bytes(b"hello, disk\n")
    seal(payload, {})
    assert payload.manifest.read_text() == manifest
    data = archive(payload)
    assert "\n".join(dump(data)) == dumped
    written = b"".join(bytes.fromhex(line[10:57]) for line in dumped.splitlines())
    take(written, tmp_path / "arrived")
    assert (tmp_path / "arrived" / "overlay.raw").read_bytes() == b"hello, disk\n"
