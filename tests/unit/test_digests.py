"""Digest tables hold what they should, and an update costs what changed.

The numbers are those of the fault catalogue: F52 and F53.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.host.files import allocated_bytes, clone
from stillframe.model.errors import DamagedData, HostFailure
from stillframe.model.units import GIB, KIB, MIB
from stillframe.store.digests import update_table, write_table
from stillframe.store.manifest import (
    EXTENT,
)
from stillframe.store.readers import FileReader
from support.payloads import (
    LIMIT,
    Pieces,
    contents,
    expected_table,
    flip,
    noise,
    pieces,
    sizes,
    write_pieces,
)


def table(source: Path, to: Path, threads: int | None = None) -> str:
    with FileReader(source) as reader:
        return write_table(reader, to, threads=threads)


class Family:
    """An image with its table, and a clone of both that is about to change."""

    def __init__(self, directory: Path, size: int, parts: Pieces) -> None:
        self.parent, self.image = directory / "parent", directory / "image"
        self.known, self.table = directory / "parent.blake3", directory / "image.blake3"
        write_pieces(self.parent, size, parts)
        self.digest = table(self.parent, self.known)
        clone(self.parent, self.image)
        clone(self.known, self.table)
        self.changed: list[tuple[int, int]] = []

    def write(self, offset: int, data: bytes) -> None:
        with self.image.open("r+b") as file:
            file.seek(offset)
            self.changed.append((offset, file.write(data)))

    def update(self, known: str | None = None) -> str:
        with FileReader(self.image) as reader, FileReader(self.parent) as below:
            return update_table(reader, self.table, below, self.changed, known=known)


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
        family = Family(Path(directory), parent_size, parts)
        before = family.known.read_bytes()
        os.truncate(family.image, size)
        for offset, data in changes:
            family.write(min(offset, size), data[: max(0, size - offset)])
        found = family.update(family.digest)
        assert family.table.read_bytes() == expected_table(family.image)
        assert found == blake3(family.table.read_bytes()).hexdigest()
        assert family.known.read_bytes() == before


class CountingReader(FileReader):
    """Remembers how much was read."""

    total = 0

    def read(self, offset: int, length: int) -> bytes:
        self.total += length
        return super().read(offset, length)


def test_an_update_reads_only_what_changed(tmp_path: Path) -> None:
    family = Family(tmp_path, 64 * MIB, [(0, noise(64 * MIB))])
    family.write(10 * MIB + 5, b"changed")
    family.write(30 * MIB - 1, b"over a border")
    family.write(40 * MIB, noise(EXTENT, seed=2))
    with CountingReader(family.image) as reader, CountingReader(family.parent) as below:
        update_table(reader, family.table, below, family.changed)
    assert family.table.read_bytes() == expected_table(family.image)
    assert reader.total == 4 * EXTENT
    assert below.total == 3 * EXTENT  # of the one that was overwritten nothing is kept


@pytest.mark.parametrize("first", [0, 15 * EXTENT], ids=["first extent", "last extent"])
@pytest.mark.parametrize("damage", [0, 300, EXTENT - 1])
def test_damage_below_gets_no_digest_that_vouches_for_it(
    tmp_path: Path, first: int, damage: int
) -> None:
    family = Family(tmp_path, MIB, [(0, noise(MIB))])
    for image in (family.parent, family.image):  # they share their blocks
        flip(image, (first + damage) * 8)
    family.write(first + 4096, b"changed")
    with pytest.raises(DamagedData) as caught:
        family.update()
    assert caught.value.facts["offset"] == first


def test_damage_below_that_was_overwritten_does_no_harm(tmp_path: Path) -> None:
    family = Family(tmp_path, MIB, [(0, noise(MIB))])
    flip(family.parent, (2 * EXTENT + 5) * 8)
    family.write(2 * EXTENT - 10, noise(EXTENT // 2, seed=2))
    family.write(2 * EXTENT - 10 + EXTENT // 2, noise(EXTENT, seed=3))
    family.update()
    assert family.table.read_bytes() == expected_table(family.image)


def test_damage_below_that_nothing_touched_is_still_found(tmp_path: Path) -> None:
    family = Family(tmp_path, MIB, [(0, noise(MIB))])
    for image in (family.parent, family.image):
        flip(image, 5 * EXTENT * 8)
    family.write(0, b"changed")
    family.update()
    assert family.table.read_bytes() != expected_table(family.image)


def test_a_damaged_table_of_the_parent_is_not_taken_over(tmp_path: Path) -> None:
    family = Family(tmp_path, MIB, [(0, noise(MIB))])
    family.write(0, b"changed")
    flip(family.table, 77)
    with pytest.raises(DamagedData, match="does not match its digest") as caught:
        family.update(family.digest)
    assert caught.value.facts["file"] == "image.blake3"
    os.truncate(family.table, 32)
    with pytest.raises(DamagedData, match="does not fit"):
        family.update()


def test_a_range_before_the_file_is_a_mistake(tmp_path: Path) -> None:
    family = Family(tmp_path, MIB, [(0, noise(MIB))])
    family.changed.append((-1, 5))
    with pytest.raises(ValueError, match="before"):
        family.update()


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
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    family = Family(tmp_path, 2 * MIB, [(0, noise(2 * MIB))])
    assert family.update(family.digest) == family.digest


def test_f53_a_table_with_other_names_is_never_written(tmp_path: Path) -> None:
    family = Family(tmp_path, MIB, [(0, noise(MIB))])
    family.write(0, b"another content")
    family.table.unlink()
    os.link(family.known, family.table)
    before = family.known.read_bytes()
    with pytest.raises(HostFailure, match="shared"):
        family.update()
    with FileReader(family.image) as reader, pytest.raises(FileExistsError):
        write_table(reader, family.table)
    assert family.known.read_bytes() == before
