"""Digest tables vouch for every byte of a payload, and damage is found and located.

The numbers are those of the fault catalogue: F45-F49, F52, F53 and F60.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.host.files import allocated_bytes, create_sparse, remove_tree
from stillframe.model.errors import DamagedData, NotFound
from stillframe.model.units import GIB, KIB, MIB
from stillframe.model.values import CompressionAlgorithm, CompressionConfig
from stillframe.store.compression import compress
from stillframe.store.digests import NO_DATA, update_table, write_table
from stillframe.store.manifest import (
    EXTENT,
    FileEntry,
    encode_document,
    encode_manifest,
    file_entries,
    parse_manifest,
    read_manifest,
)
from stillframe.store.paths import Payload
from stillframe.store.payloads import (
    add_tables,
    check,
    measure,
    seal,
    switch_to_compressed,
    without_file,
)
from stillframe.store.readers import FileReader
from stillframe.store.verification import Depth, Verification, verify
from support.payloads import (
    LIMIT,
    Pieces,
    contents,
    flip,
    make_payload,
    noise,
    pieces,
    sizes,
    write_pieces,
)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return make_payload(tmp_path / "payload")


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def expected_table(path: Path) -> bytes:
    """The table by its definition, extent by extent."""
    data = path.read_bytes()
    extents = [data[at : at + EXTENT] for at in range(0, len(data), EXTENT)]
    return b"".join(blake3(e).digest() if any(e) else NO_DATA for e in extents)


def table(source: Path, to: Path, threads: int | None = None) -> str:
    with FileReader(source) as reader:
        return write_table(reader, to, threads=threads)


def result(payload: Payload, depth: Depth = Depth.FULL, **options: object) -> Verification:
    *_, last = verify(payload, depth, **options)  # type: ignore[arg-type]
    return last


# -- tables ----------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(sizes, pieces, st.sampled_from([1, 2, 5]))
def test_a_table_holds_the_digest_of_each_extent(size: int, parts: Pieces, threads: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, to = Path(directory, "image"), Path(directory, "table")
        write_pieces(source, size, parts)
        digest = table(source, to, threads)
        assert to.read_bytes() == expected_table(source)
        assert digest == blake3(to.read_bytes()).hexdigest()


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, pieces, st.lists(st.tuples(st.integers(0, LIMIT), contents), max_size=5))
def test_an_updated_table_equals_a_new_one(
    parent_size: int, size: int, parts: Pieces, changes: Pieces
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        image, parent, child = (Path(directory, n) for n in ("image", "parent", "child"))
        write_pieces(image, parent_size, parts)
        digest = table(image, parent)
        before = parent.read_bytes()
        os.truncate(image, size)
        changed = []
        with image.open("r+b") as file:
            for offset, data in changes:
                file.seek(min(offset, size))
                written = file.write(data[: max(0, size - offset)])
                changed.append((min(offset, size), written))
        with FileReader(image) as reader:
            found = update_table(reader, child, parent, digest, changed)
        assert child.read_bytes() == expected_table(image)
        assert found == blake3(child.read_bytes()).hexdigest()
        assert parent.read_bytes() == before


class CountingReader(FileReader):
    """Remembers how much was read."""

    total = 0

    def read(self, offset: int, length: int) -> bytes:
        self.total += length
        return super().read(offset, length)


def test_an_update_reads_only_what_changed(tmp_path: Path) -> None:
    image, parent = tmp_path / "image", tmp_path / "parent"
    write_pieces(image, 64 * MIB, [(0, noise(64 * MIB))])
    digest = table(image, parent)
    with image.open("r+b") as file:
        file.seek(10 * MIB + 5)
        file.write(b"changed")
        file.seek(30 * MIB - 1)
        file.write(b"over a border")
    with CountingReader(image) as reader:
        changed = [(10 * MIB + 5, 7), (30 * MIB - 1, 13)]
        update_table(reader, tmp_path / "child", parent, digest, changed)
    assert (tmp_path / "child").read_bytes() == expected_table(image)
    assert reader.total <= 4 * EXTENT  # three touched, and the last one of the file


def test_a_damaged_table_of_the_parent_is_not_taken_over(tmp_path: Path) -> None:
    image, parent, child = tmp_path / "image", tmp_path / "parent", tmp_path / "child"
    write_pieces(image, MIB, [(0, noise(MIB))])
    digest = table(image, parent)
    flip(parent, 77)
    with FileReader(image) as reader, pytest.raises(DamagedData) as caught:
        update_table(reader, child, parent, digest, [(0, 1)])
    assert caught.value.facts["file"] == "parent"
    assert not child.exists()


def test_a_range_before_the_file_is_a_mistake(tmp_path: Path) -> None:
    write_pieces(tmp_path / "image", MIB, [(0, noise(MIB))])
    digest = table(tmp_path / "image", tmp_path / "parent")
    with FileReader(tmp_path / "image") as reader, pytest.raises(ValueError, match="before"):
        update_table(reader, tmp_path / "child", tmp_path / "parent", digest, [(-1, 5)])
    assert not (tmp_path / "child").exists()


def test_a_huge_sparse_file_costs_what_it_holds(tmp_path: Path) -> None:
    image, to = tmp_path / "image", tmp_path / "table"
    write_pieces(image, 16 * GIB, [(9 * GIB, b"one page")])
    with CountingReader(image) as reader:
        write_table(reader, to)
        assert reader.total <= MIB
    assert to.stat().st_size == 16 * GIB // EXTENT * 32
    assert allocated_bytes(to) <= 64 * KIB


def test_zeros_and_holes_have_the_same_table(tmp_path: Path) -> None:
    write_pieces(tmp_path / "hole", 3 * MIB + 1, [])
    (tmp_path / "zeros").write_bytes(bytes(3 * MIB + 1))
    digests = {table(tmp_path / n, tmp_path / f"{n}.table") for n in ("hole", "zeros")}
    assert len(digests) == 1
    assert not any((tmp_path / "zeros.table").read_bytes())


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV])
def test_f52_without_reflinks_the_parents_table_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    image, parent = tmp_path / "image", tmp_path / "parent"
    write_pieces(image, 2 * MIB, [(0, noise(MIB))])
    digest = table(image, parent)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with FileReader(image) as reader:
        assert update_table(reader, tmp_path / "child", parent, digest, []) == digest


def test_f53_a_table_with_other_names_is_never_written(tmp_path: Path) -> None:
    image, parent, shared = tmp_path / "image", tmp_path / "parent", tmp_path / "shared"
    write_pieces(image, MIB, [(0, noise(MIB))])
    digest = table(image, parent)
    os.link(parent, shared)
    before = parent.read_bytes()
    with image.open("r+b") as file:
        file.write(b"another content")
    with FileReader(image) as reader:
        with pytest.raises(FileExistsError):
            update_table(reader, shared, parent, digest, [(0, 20)])
        with pytest.raises(FileExistsError):
            write_table(reader, shared)
        update_table(reader, tmp_path / "child", parent, digest, [(0, 20)])
    assert shared.read_bytes() == parent.read_bytes() == before


# -- sealing and checking --------------------------------------------------------------------------
def test_the_manifest_vouches_for_every_file(payload: Payload) -> None:
    entries = file_entries(check(payload))
    assert set(entries) == {"memory", "devices", "overlay.raw"}
    assert entries["devices"].blake3 == blake3(payload.devices.read_bytes()).hexdigest()
    for name in ("memory", "overlay.raw"):
        assert entries[name].table_blake3 == blake3(payload.table(name).read_bytes()).hexdigest()
        assert payload.table(name).read_bytes() == expected_table(payload.directory / name)
    found = result(payload)
    assert found.damage == ()
    assert found.unchecked == ()
    assert found.checked_bytes == found.total_bytes


def test_equal_payloads_have_equal_manifests(tmp_path: Path) -> None:
    one, two = make_payload(tmp_path / "one"), make_payload(tmp_path / "two")
    assert one.manifest.read_bytes() == two.manifest.read_bytes()


def test_sealing_takes_the_tables_that_are_known(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    write_pieces(payload.memory, MIB, [(0, noise(MIB))])
    write_pieces(payload.devices, 100, [(0, noise(100))])
    digest = table(payload.memory, payload.table("memory"))
    made = payload.table("memory").stat().st_ino
    seal(payload, {}, {"memory": digest})
    assert payload.table("memory").stat().st_ino == made
    assert result(payload).damage == ()
    payload.manifest.unlink()
    os.truncate(payload.table("memory"), 32)
    with pytest.raises(ValueError, match="memory"):
        seal(payload, {}, {"memory": digest})
    assert not payload.manifest.exists()


def test_a_manifest_less_one_file_is_intact(payload: Payload) -> None:
    less = parse_manifest(without_file(payload.manifest.read_bytes(), "overlay.raw"))
    assert set(file_entries(less)) == {"memory", "devices"}
    assert less["hypervisor"] == "fake"


def format_1(payload: Payload) -> None:
    """Make a payload as it was before there were tables."""
    files = {n: {"size": e.size} for n, e in file_entries(check(payload)).items()}
    digest = blake3(payload.devices.read_bytes()).hexdigest()
    old = {"format": 1, "hypervisor": "fake", "files": files}
    old["files"]["devices"]["blake3"] = digest  # type: ignore[index]
    payload.manifest.write_text(json.dumps(old))
    for name in ("memory", "overlay.raw"):
        payload.table(name).unlink()


def test_a_payload_of_format_1_loads_and_can_be_given_tables(payload: Payload) -> None:
    format_1(payload)
    assert check(payload)["format"] == 1
    assert set(result(payload).unchecked) == {"memory", "overlay.raw"}
    manifest = add_tables(payload)
    assert (manifest["format"], manifest["hypervisor"]) == (2, "fake")
    assert add_tables(payload) == manifest
    found = result(payload)
    assert (found.damage, found.unchecked) == ((), ())


@pytest.mark.parametrize("name", ["memory", "devices", "overlay.raw"])
@pytest.mark.parametrize("cut", [1, 4096, None])
def test_f46_a_truncated_file_is_found_before_any_load(
    payload: Payload, name: str, cut: int | None
) -> None:
    path = payload.directory / name
    size = path.stat().st_size
    left = 0 if cut is None else size - cut
    os.truncate(path, left)
    with pytest.raises(DamagedData) as caught:
        check(payload)
    assert caught.value.facts["file"] == name
    for depth in Depth:
        (damage,) = result(payload, depth).damage
        assert (damage.file, damage.offset, damage.length) == (name, left, size - left)


FILES = ["memory", "devices", "overlay.raw", "memory.blake3", "overlay.raw.blake3", "manifest.json"]


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(FILES), st.integers(0, 2**40))
def test_f47_a_flipped_bit_is_located(name: str, chosen: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        payload = make_payload(Path(directory, "payload"))
        path = payload.directory / name
        bit = chosen % (path.stat().st_size * 8)
        flip(path, bit)
        (damage,) = result(payload).damage
        assert damage.file == name
        if name in ("memory", "overlay.raw"):
            assert damage.offset <= bit // 8 < damage.offset + damage.length
            assert damage.length <= EXTENT
        if name in ("devices", "manifest.json"):
            with pytest.raises(DamagedData) as caught:
                check(payload)
            assert caught.value.facts["file"] == name


def test_f47_neighbouring_damage_is_one_place(payload: Payload) -> None:
    with payload.memory.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(3 * EXTENT))  # lost, as by a hole
        file.seek(2 * MIB + EXTENT)
        file.write(b"where nothing was")
    found = result(payload)
    places = [(d.file, d.offset, d.length) for d in found.damage]
    assert places == [("memory", MIB, 3 * EXTENT), ("memory", 2 * MIB + EXTENT, EXTENT)]
    assert found.damaged_bytes == 4 * EXTENT


def intact(payload: Payload) -> bytes:
    return payload.manifest.read_bytes()


def torn(payload: Payload) -> bytes:
    new = encode_document({**read_manifest(payload.manifest), "accelerator": "another"})
    return new[:512] + intact(payload)[512:]


UNREADABLE = {
    "empty": b"", "a brace": b"{", "a list": b"[]", "null": b"null", "NULs": b"\0" * 512,
    "no files": b'{"format": 2}', "files is a number": b'{"format": 2, "files": 3}',
    "a path": b'{"format": 1, "files": {"../x": {"size": 1}}}',
    "an absolute path": b'{"format": 1, "files": {"/etc/passwd": {"size": 1}}}',
    "a surrogate": b'{"format": 1, "files": {"\\ud800": {"size": 1}}}',
    "negative": b'{"format": 1, "files": {"memory": {"size": -1}}}',
    "true": b'{"format": 1, "files": {"memory": {"size": true}}}',
    "beyond": b'{"format": 1, "files": {"memory": {"size": 1e999}}}',
    "huge": b'{"format": 1, "files": {"memory": {"size": ' + b"9" * 100 + b"}}}",
    "endless digits": b'{"format": 1, "files": {"memory": {"size": ' + b"9" * 9999 + b"}}}",
    "no digest of its own": b'{"format": 2, "files": {}}',
    "not UTF-8": b'{"format": 1, "files": {}, "x": "\xff"}', "UTF-16": "{}".encode("utf-16"),
    "deep": b"[" * 100_000, "deep within": b'{"files": {}, "format": ' + b"[" * 900 + b"]" * 900
    + b"}", "oversized": b'{"format": 1, "files": {}, "x": "' + b"x" * (1 << 20) + b'"}',
}  # fmt: skip


@pytest.mark.parametrize("what", [*UNREADABLE, "torn", "cut in half"])
def test_f48_a_torn_manifest_is_damage(payload: Payload, what: str) -> None:
    text = UNREADABLE.get(what, b"")
    text = torn(payload) if what == "torn" else text
    text = intact(payload)[: len(intact(payload)) // 2] if what == "cut in half" else text
    payload.manifest.write_bytes(text)
    with pytest.raises(DamagedData) as caught:
        check(payload)
    assert caught.value.facts["file"] == "manifest.json"
    (damage,) = result(payload).damage
    assert damage.file == "manifest.json"


@pytest.mark.parametrize("what", ["missing", "a directory", "a link", "a pipe"])
def test_f48_a_manifest_that_is_no_file_is_damage(payload: Payload, what: str) -> None:
    text = payload.manifest.rename(payload.directory / "elsewhere")
    if what == "a directory":
        payload.manifest.mkdir()
    elif what == "a link":
        payload.manifest.symlink_to(text)
    elif what == "a pipe":
        os.mkfifo(payload.manifest)
    with pytest.raises(DamagedData) as caught:
        check(payload)
    assert caught.value.facts["file"] == "manifest.json"


def test_f49_unknown_facts_are_kept_and_newer_formats_refused(payload: Payload) -> None:
    manifest = {**read_manifest(payload.manifest), "future": [1, "ü"]}
    payload.manifest.write_bytes(encode_document(manifest))
    assert check(payload)["future"] == [1, "ü"]
    for version in (3, 0, -1, "2", None, True, 2.0, 10**30):
        payload.manifest.write_bytes(encode_document({**manifest, "format": version}))
        with pytest.raises(DamagedData, match="is not known") as caught:
            check(payload)
        assert caught.value.facts["file"] == "manifest.json"


@pytest.mark.parametrize("change", [
    {"length": 4096}, {"table": "../memory.blake3"}, {"table": "devices"}, {"blake3": "A" * 64},
    {"blake3": None},
])  # fmt: skip
def test_f49_a_table_of_another_kind_is_refused(
    payload: Payload, change: dict[str, object]
) -> None:
    manifest = read_manifest(payload.manifest)
    manifest["files"]["memory"]["extents"] |= change
    payload.manifest.write_bytes(encode_document(manifest))
    with pytest.raises(DamagedData, match="memory"):
        check(payload)


def test_a_fact_cannot_pose_as_the_manifests_digest(payload: Payload) -> None:
    facts = {"a": {"blake3": "0" * 64}, "aa": '\n "blake3": "' + "0" * 64 + '"', "b": "0" * 64}
    entries = {"memory": FileEntry(1)}
    assert parse_manifest(encode_manifest(entries, facts))["a"] == facts["a"]


# -- verifying -------------------------------------------------------------------------------------
def broken_reads(monkeypatch: pytest.MonkeyPatch, path: Path, bad: int) -> None:
    """Make reading the byte ``bad`` of a file fail, as a bad sector does."""
    inode, pread = path.stat().st_ino, os.pread

    def read(fd: int, length: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == inode and offset <= bad < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", read)


@pytest.mark.parametrize(
    ("name", "bad"), [("memory", MIB + 3 * EXTENT + 9), ("overlay.raw", 70_000)]
)
def test_f45_a_bad_sector_is_located(
    payload: Payload, monkeypatch: pytest.MonkeyPatch, name: str, bad: int
) -> None:
    broken_reads(monkeypatch, payload.directory / name, bad)
    (damage,) = result(payload).damage
    assert (damage.file, damage.offset, damage.length) == (name, bad // EXTENT * EXTENT, EXTENT)
    assert "cannot be read" in damage.reason


def test_f45_device_state_that_cannot_be_read_is_damage(
    payload: Payload, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_reads(monkeypatch, payload.devices, 100)
    with pytest.raises(DamagedData, match="devices cannot be read"):
        check(payload)
    (damage,) = result(payload, Depth.MANIFEST).damage
    assert damage.file == "devices"


def test_f45_a_table_that_cannot_be_read_is_damage(
    payload: Payload, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_reads(monkeypatch, payload.table("memory"), 100)
    (damage,) = result(payload).damage
    assert damage.file == "memory.blake3"


def test_a_file_that_shrinks_while_it_is_verified_is_damage(payload: Payload) -> None:
    steps = verify(payload, Depth.FULL)
    next(steps)
    os.truncate(payload.memory, MIB + 5000)
    *_, last = steps
    assert {damage.file for damage in last.damage} == {"memory"}
    assert last.damage[0].offset == MIB


@pytest.mark.parametrize("name", ["memory", "devices", "overlay.raw", "memory.blake3"])
def test_a_missing_file_hides_no_other_damage(payload: Payload, name: str) -> None:
    (payload.directory / name).unlink()
    flip(payload.overlay if name != "overlay.raw" else payload.memory, 8 * 66_000)
    assert len(result(payload).damage) == 2


def test_the_depth_decides_what_is_read(payload: Payload) -> None:
    flip(payload.memory, 8 * (MIB + 5))
    assert result(payload, Depth.MANIFEST).damage == ()
    assert result(payload, Depth.SAMPLE, share=1.0).damage == result(payload).damage != ()


def test_a_sample_reads_its_share_of_the_data_and_the_seed_chooses(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    write_pieces(payload.memory, 200 * MIB, [(20 * MIB, noise(40 * MIB))])
    seal(payload, {})
    for start in range(20 * MIB, 60 * MIB, MIB):
        flip(payload.memory, 8 * start)
    samples = [result(payload, Depth.SAMPLE, share=0.1, seed=seed) for seed in (1, 1, 2)]
    assert [s.total_bytes for s in samples] == [4 * MIB] * 3
    places = [[d.offset for d in s.damage] for s in samples]
    assert places[0] == places[1] != places[2]
    assert len(places[0]) == 4


def test_a_sample_looks_where_data_should_be(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    write_pieces(payload.memory, 16 * MIB, [(8 * MIB, noise(MIB))])
    seal(payload, {})
    payload.memory.unlink()
    create_sparse(payload.memory, 16 * MIB)
    (damage,) = result(payload, Depth.SAMPLE, share=0.01).damage
    assert (damage.offset, damage.length) == (8 * MIB, MIB)


def test_progress_is_told_with_its_speed(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    write_pieces(payload.memory, 40 * MIB, [(0, noise(30 * MIB))])
    seal(payload, {})
    seconds = iter(range(1000))
    steps = list(verify(payload, Depth.FULL, clock=lambda: float(next(seconds))))
    assert len(steps) > 4
    checked = [step.checked_bytes for step in steps]
    assert checked == sorted(checked)
    assert steps[0].checked_bytes == 0
    assert steps[-1].checked_bytes == steps[-1].total_bytes == 30 * MIB
    assert steps[-1].bytes_per_second == 30 * MIB / steps[-1].seconds


def test_verifying_can_be_broken_off(payload: Payload) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    steps = verify(payload, Depth.FULL)
    next(steps)
    steps.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_so_much_damage_is_counted_and_the_first_places_named(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    create_sparse(payload.memory, 3000 * EXTENT)
    seal(payload, {})
    with payload.memory.open("r+b") as file:
        for number in range(0, 3000, 2):
            file.seek(number * EXTENT)
            file.write(b"x")
    found = result(payload)
    assert found.damaged_bytes == 1500 * EXTENT
    assert len(found.damage) == 1000


def test_verifying_changes_nothing(payload: Payload) -> None:
    flip(payload.memory, 4000)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in payload.directory.iterdir()}
    result(payload)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in payload.directory.iterdir()}
    assert before == after


def test_f60_compressing_or_deleting_meanwhile_is_no_damage(
    payload: Payload, scratch: Path
) -> None:
    algorithm = CompressionAlgorithm.ZSTD
    final = payload.compressed(algorithm)
    steps = verify(payload, Depth.FULL)
    next(steps)
    compress(payload.memory, payload.being_built(final), CompressionConfig(True, algorithm))
    next(steps)
    switch_to_compressed(payload, algorithm)
    *_, last = steps
    assert (last.damage, last.checked_bytes) == ((), last.total_bytes)

    shutil.copytree(payload.directory, scratch / "copy")
    copy = Payload(scratch / "copy")
    steps = verify(copy, Depth.FULL)
    next(steps)
    remove_tree(copy.directory)
    *_, last = steps
    assert (last.damage, last.checked_bytes) == ((), last.total_bytes)
    with pytest.raises(NotFound):
        result(copy)


def test_what_is_being_built_belongs_to_no_payload(payload: Payload) -> None:
    before, manifest = measure(payload), payload.manifest.read_bytes()
    payload.being_built(payload.memory).write_bytes(noise(MIB))
    assert measure(payload) == before
    for name in ("memory", "overlay.raw"):
        payload.table(name).unlink()
    assert seal(payload, {"hypervisor": "fake"}) == before
    assert payload.manifest.read_bytes() == manifest
