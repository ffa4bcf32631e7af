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

from stillframe.host.files import allocated_bytes
from stillframe.model.errors import DamagedData
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
