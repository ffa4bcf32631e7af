"""Clones keep holes, writes are atomic, errors are translated."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.host import files
from stillframe.host.files import (
    CloneKind,
    allocated_bytes,
    atomic_write,
    clone,
    clone_into,
    create_sparse,
    data_extents,
    keep_descriptors,
    new_file,
    open_regular,
    punch_hole,
    read_exactly,
    remove_tree,
    storage_errors,
    supports_reflink,
    write_sparse,
)
from stillframe.model.errors import HostFailure, StorageFull
from support.descriptors import no_descriptors
from support.engine import make_engine

MIB = 1 << 20


def test_only_a_refused_clone_means_that_blocks_cannot_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(code: int) -> Callable[..., int]:
        def refuse(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        return refuse

    context = make_engine(tmp_path).context
    monkeypatch.setattr("fcntl.ioctl", answer(errno.ENOSPC))
    assert not context.shares_blocks  # for now
    with pytest.raises(OSError, match="No space"):
        supports_reflink(tmp_path)
    monkeypatch.setattr("fcntl.ioctl", lambda *_: 0)
    assert context.shares_blocks
    monkeypatch.setattr("fcntl.ioctl", answer(errno.EOPNOTSUPP))
    assert not supports_reflink(tmp_path)
    assert not list(tmp_path.glob(".reflink*"))
    context.records.close()


def test_a_clone_equals_its_source_and_keeps_its_holes(tmp_path: Path) -> None:
    source, copy = tmp_path / "a", tmp_path / "b"
    create_sparse(source, 64 * MIB)
    with source.open("r+b") as file:
        file.seek(10 * MIB)
        file.write(b"data" * 1000)
    kind = clone(source, copy)
    assert kind in tuple(CloneKind)
    assert copy.read_bytes() == source.read_bytes()
    assert allocated_bytes(copy) <= 2 * MIB
    assert copy.stat().st_mode & 0o777 == 0o600


def holey(path: Path) -> Path:
    """A file of 64 MiB with a little data."""
    create_sparse(path, 64 * MIB)
    with path.open("r+b") as file:
        file.seek(10 * MIB)
        file.write(b"data" * 1000)
    return path


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY])
def test_f52_where_blocks_cannot_be_shared_a_clone_is_a_sparse_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    source, copy = holey(tmp_path / "a"), tmp_path / "b"

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert clone(source, copy) is CloneKind.SPARSE_COPY
    assert copy.read_bytes() == source.read_bytes()
    assert allocated_bytes(copy) <= 2 * MIB
    (tmp_path / "c").touch(mode=0o600)
    with (tmp_path / "c").open("r+b") as file:
        assert clone_into(source, file.fileno()) is CloneKind.SPARSE_COPY
    assert (tmp_path / "c").read_bytes() == source.read_bytes()
    assert allocated_bytes(tmp_path / "c") <= 2 * MIB


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_f52_any_other_failure_of_a_clone_is_one_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    source = holey(tmp_path / "a")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        clone(source, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_f52_a_clone_on_another_file_system_is_a_sparse_copy(
    tmp_path: Path, another_file_system: Path
) -> None:
    for number, (here, there) in enumerate(
        [(tmp_path, another_file_system), (another_file_system, tmp_path)]
    ):
        source, copy = holey(here / f"a{number}"), there / f"b{number}"
        assert clone(source, copy) is CloneKind.SPARSE_COPY
        assert copy.read_bytes() == source.read_bytes()
        assert allocated_bytes(copy) <= 2 * MIB


def test_a_clone_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        clone(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"old"


def test_a_clone_does_not_follow_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic link"):
        clone(tmp_path / "link", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_punched_hole_reads_as_zeros_and_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * MIB)
    with path.open("r+b") as file:
        punch_hole(file.fileno(), 0, MIB - 4096)
    assert path.read_bytes() == bytes(MIB - 4096) + b"x" * 4096
    assert allocated_bytes(path) < MIB // 2


def test_where_there_are_no_holes_all_of_a_range_is_zeroed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    pwrite = os.pwrite
    monkeypatch.setattr(files, "_fallocate", unsupported)
    # A file system may take less than it is given.
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: MIB // 3], at))
    path = tmp_path / "a"
    path.write_bytes(b"x" * 4 * MIB)
    with path.open("r+b") as file:
        punch_hole(file.fileno(), 4096, 3 * MIB)
    left = 4 * MIB - 4096 - 3 * MIB
    assert path.read_bytes() == b"x" * 4096 + bytes(3 * MIB) + b"x" * left


def test_an_atomic_write_leaves_old_or_new_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "record"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["record"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_storage_full(code: int) -> None:
    with pytest.raises(StorageFull, match="could not save"), storage_errors("save"):
        raise OSError(code, "full")


def test_any_other_disk_error_is_a_host_failure() -> None:
    with pytest.raises(HostFailure) as caught, storage_errors("save"):
        raise OSError(errno.EIO, "input/output error")
    assert caught.value.code == "storage_error"


def test_data_is_found_between_two_places_only(tmp_path: Path) -> None:
    create_sparse(tmp_path / "a", 64 * MIB)
    with (tmp_path / "a").open("r+b") as file:
        for place in (MIB, 20 * MIB, 40 * MIB):
            file.seek(place)
            file.write(b"x" * 4096)
        file.flush()
        found = list(data_extents(file.fileno(), 40 * MIB, 2 * MIB))
        assert found == [(20 * MIB, 20 * MIB + 4096)]


def test_zeros_are_not_written_into_a_sparse_file(tmp_path: Path) -> None:
    data = b"x" * 4096 + bytes(MIB) + b"y" * 10 + bytes(8192) + b"z" + bytes(5000)
    with new_file(tmp_path / "a") as fd:
        os.ftruncate(fd, 4096 + len(data))
        write_sparse(fd, data, 4096)
    assert (tmp_path / "a").read_bytes() == bytes(4096) + data
    assert allocated_bytes(tmp_path / "a") <= 16384


def _fail(path: Path) -> None:
    with new_file(path) as fd:
        os.write(fd, b"half")
        raise RuntimeError("in the middle")


def test_a_new_file_is_there_only_when_it_is_finished(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="middle"):
        _fail(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    with new_file(tmp_path / "a") as fd:
        os.write(fd, b"whole")
    with pytest.raises(FileExistsError):
        _fail(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"whole"


@pytest.mark.parametrize("kind", ["link", "directory", "pipe", "missing"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    (tmp_path / "file").write_bytes(b"x")
    if kind == "link":
        path.symlink_to(tmp_path / "file")
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match=r"."):
        open_regular(path)


def test_reading_past_the_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    fd = open_regular(tmp_path / "a")
    assert read_exactly(fd, 3, 2) == b"345"
    with pytest.raises(OSError, match="shorter"):
        read_exactly(fd, 4, 2)
    os.close(fd)


def test_a_tree_goes_even_when_no_descriptor_is_left(tmp_path: Path) -> None:
    (tmp_path / "tree" / "below").mkdir(parents=True)
    (tmp_path / "tree" / "below" / "file").touch()
    keep_descriptors()
    with no_descriptors(but=0):
        remove_tree(tmp_path / "tree")
        with pytest.raises(OSError, match="Too many open files"):
            os.open(os.devnull, os.O_RDONLY)  # they are kept back again
    assert not (tmp_path / "tree").exists()
