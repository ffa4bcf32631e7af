"""What deleting a file would give back, told from what it shares with others."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from stillframe.host import extents
from stillframe.host.extents import (
    FIEMAP_EXTENT_LAST,
    FIEMAP_EXTENT_SHARED,
    exclusive_bytes,
    files_in,
    freed_by_deleting,
    parse_extents,
    shared_bytes,
)
from stillframe.host.files import CloneKind, allocated_bytes, clone, fsync_file

MIB = 1024 * 1024


def written(path: Path, size: int = MIB) -> Path:
    path.write_bytes(os.urandom(size))
    fsync_file(path)
    return path


def test_a_file_of_its_own_is_all_exclusive(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    assert exclusive_bytes(path) == allocated_bytes(path) >= MIB


def test_holes_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(os.urandom(MIB))
    fsync_file(path)
    assert MIB <= exclusive_bytes(path) < 2 * MIB


def test_a_hard_link_makes_everything_shared_and_the_last_one_frees_it(tmp_path: Path) -> None:
    one = written(tmp_path / "one")
    two = tmp_path / "two"
    two.hardlink_to(one)
    assert exclusive_bytes(one) == exclusive_bytes(two) == 0
    assert freed_by_deleting([one]) == 0
    assert freed_by_deleting([one, two]) == allocated_bytes(one)
    one.unlink()
    assert exclusive_bytes(two) == allocated_bytes(two)


def test_directories_links_and_what_is_gone_free_nothing(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(written(tmp_path / "target"))
    assert exclusive_bytes(tmp_path) == 0
    assert exclusive_bytes(link) == 0
    assert freed_by_deleting([tmp_path / "gone"]) == 0
    with pytest.raises(FileNotFoundError):
        exclusive_bytes(tmp_path / "gone")


def test_a_tree_is_listed_with_what_lies_deep_in_it(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    deep, flat = written(tmp_path / "a/b/deep", 4096), written(tmp_path / "flat", 4096)
    assert set(files_in(tmp_path)) == {deep, flat}
    assert files_in(tmp_path / "nothing") == []


def test_many_extents_are_read_page_by_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fragments"
    with path.open("wb") as file:
        for number in range(20):
            file.seek(number * MIB)
            file.write(os.urandom(4096))
    fsync_file(path)
    with path.open("rb") as file:
        try:
            at_once = list(extents.extents(file.fileno()))
        except OSError:
            pytest.skip("this file system has no FIEMAP")
        monkeypatch.setattr(extents, "_EXTENTS_AT_ONCE", 3)
        assert list(extents.extents(file.fileno())) == at_once
    assert {number * MIB for number in range(20)} <= {offset for offset, _, _, _ in at_once}
    assert exclusive_bytes(path) == allocated_bytes(path)


def test_the_kernel_s_answer_is_read_field_by_field() -> None:
    def extent(offset: int, length: int, flags: int) -> bytes:
        return struct.pack("=QQQQQLLLL", offset, 7 << 12, length, 0, 0, flags, 0, 0, 0)

    answer = struct.pack("=QQLLLL", 0, 2**64 - 1, 0, 2, 512, 0)
    answer += extent(0, 4096, FIEMAP_EXTENT_SHARED) + extent(8192, 512, FIEMAP_EXTENT_LAST)
    assert list(parse_extents(answer)) == [
        (0, 4096, FIEMAP_EXTENT_SHARED, 7 << 12),
        (8192, 512, FIEMAP_EXTENT_LAST, 7 << 12),
    ]


def test_two_files_have_in_common_what_one_got_from_the_other(reflink_dir: Path) -> None:
    one, two, three = (reflink_dir / name for name in ("one", "two", "three"))
    one.write_bytes(os.urandom(MIB))
    fsync_file(one)
    assert shared_bytes(one, reflink_dir / "nothing") == 0
    clone(one, two)
    assert shared_bytes(two, one) == MIB
    with two.open("r+b") as file:
        file.write(os.urandom(MIB // 4))
    fsync_file(two)
    assert shared_bytes(two, one) == shared_bytes(one, two) == MIB - MIB // 4
    three.write_bytes(os.urandom(MIB))
    fsync_file(three)
    assert shared_bytes(three, one) == 0
    (reflink_dir / "link").hardlink_to(three)
    assert shared_bytes(three, reflink_dir / "link") == MIB


def test_without_fiemap_the_allocated_blocks_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "file")
    monkeypatch.setattr(extents, "FS_IOC_FIEMAP", 0x6600)  # no such ioctl: ENOTTY
    assert exclusive_bytes(path) == allocated_bytes(path)


def test_a_clone_takes_only_what_it_does_not_share(tmp_path: Path) -> None:
    source = written(tmp_path / "source")
    kind = clone(source, tmp_path / "clone")
    with (tmp_path / "clone").open("r+b") as file:
        file.write(os.urandom(MIB // 2))
    fsync_file(tmp_path / "clone")
    own = exclusive_bytes(tmp_path / "clone")
    if kind is CloneKind.REFLINK:
        assert exclusive_bytes(source) < MIB
        assert MIB // 2 <= own < MIB
    else:
        assert exclusive_bytes(source) == allocated_bytes(source)
        assert own == allocated_bytes(tmp_path / "clone")
