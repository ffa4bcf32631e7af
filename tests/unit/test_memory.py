"""Capturing guest memory from a real process that maps an image privately.

Everything is tried with and without tracking of writes: the first needs Linux 6.7.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.host import memory
from stillframe.host.capture import BufferBudget, MemoryCapture
from stillframe.host.extents import exclusive_bytes
from stillframe.host.files import clone, create_sparse, fsync_file
from stillframe.host.image import WriteReport, open_private
from stillframe.host.memory import PAGE, GuestMemory
from stillframe.host.runs import Runs
from stillframe.model.errors import HostFailure
from stillframe.vmm.tracking import tracking_environment
from support.engine import TRACKER

MIB = 1 << 20
WRITER = """
import mmap, sys
size = int(sys.argv[2])
with open(sys.argv[1], "r+b") as file:
    image = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE)
print("mapped", flush=True)
for line in sys.stdin:
    for pair in line.split():
        offset, value = map(int, pair.split(":"))
        image[offset] = value
    print("written", flush=True)
"""


class Writer:
    """A stand-in for a VMM: maps the image privately and writes single bytes when told."""

    def __init__(self, image: Path, *, tracked: bool) -> None:
        library = TRACKER if tracked else None
        self.image = image
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", WRITER, str(image), str(image.stat().st_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **tracking_environment(library, image)},
        )
        self._expect("mapped")
        self.pid = self.process.pid

    def write(self, *pairs: tuple[int, int]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(f"{o}:{v}" for o, v in pairs) + "\n")
        self.process.stdin.flush()
        self._expect("written")

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == word

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """16 MiB whose first two pages hold data."""
    path = tmp_path / "image"
    create_sparse(path, 16 * MIB)
    with path.open("r+b") as file:
        file.write(b"A" * PAGE + b"B" * PAGE)
    return path


@pytest.fixture(params=["tracked", "plain"])
def writer(request: pytest.FixtureRequest, image: Path) -> Iterator[Writer]:
    process = Writer(image, tracked=request.param == "tracked")
    try:
        with GuestMemory(process.pid, image) as seen:
            if request.param == "tracked" and not seen.tracked:
                pytest.skip("this kernel cannot track writes (Linux 6.7)")
            assert seen.tracked == (request.param == "tracked")
        yield process
    finally:
        process.close()


def capture(
    writer: Writer,
    destination: Path,
    *,
    below: Path | None = None,
    budget: BufferBudget | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> WriteReport:
    """A whole capture; ``meanwhile`` happens after what was copied ahead."""
    clone(below or writer.image, destination)
    with GuestMemory(writer.pid, writer.image) as seen, open_private(destination) as fd:
        budget = budget or BufferBudget(64 * MIB)
        one = MemoryCapture(seen, fd, incremental=below is not None, budget=budget)
        try:
            one.ahead()
            meanwhile()
            one.still()
            return one.after()
        finally:
            one.close()


def expected(image: Path, *pairs: tuple[int, int]) -> bytes:
    content = bytearray(image.read_bytes())
    for offset, value in pairs:
        content[offset] = value
    return bytes(content)


def test_an_untouched_mapping_has_no_private_pages(writer: Writer, image: Path) -> None:
    with GuestMemory(writer.pid, image) as seen:
        assert len(seen.private_pages()) == 0


def test_private_pages_are_the_written_ones_merged(writer: Writer, image: Path) -> None:
    writer.write((5 * PAGE, 1), (6 * PAGE + 17, 1), (9 * MIB, 1))
    with GuestMemory(writer.pid, image) as seen:
        runs = seen.private_pages()
    assert runs == Runs.of([(5 * PAGE, 7 * PAGE), (9 * MIB, 9 * MIB + PAGE)])
    assert runs.total == 3 * PAGE


def test_an_image_mapped_in_two_parts_is_read_as_one(image: Path) -> None:
    """As Firecracker maps memory beyond 3 GiB; the parts lie anywhere, here within ourselves."""
    half = image.stat().st_size // 2
    with image.open("rb") as file:
        parts = [
            mmap.mmap(file.fileno(), half, access=mmap.ACCESS_COPY, offset=at) for at in (half, 0)
        ]
    upper, lower = parts
    lower[half - PAGE] = upper[0] = upper[5 * PAGE] = 77
    with GuestMemory(os.getpid(), image) as seen:
        found = seen.private_pages()
        assert found.total == 3 * PAGE
        joined = Runs.of([(half - PAGE, half + PAGE), (half + 5 * PAGE, half + 6 * PAGE)])
        assert Runs.of(found) == joined
        buffer = memory.make_buffer(joined.total)
        seen.read(joined, buffer)
        assert [buffer[page * PAGE] for page in range(3)] == [77] * 3
        buffer.close()
    with (
        image.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY),
        pytest.raises(HostFailure, match="twice"),
    ):
        GuestMemory(os.getpid(), image)
    for part in parts:
        part.close()


def test_both_ways_of_scanning_agree(writer: Writer, image: Path) -> None:
    writer.write(*((page * PAGE, 9) for page in (0, 1, 3, 700, 4095)))
    (mapping,) = memory.find_mappings(writer.pid, image)
    fd = os.open(f"/proc/{writer.pid}/pagemap", os.O_RDONLY)
    try:
        plain = Runs.of(memory.scan_pagemap(fd, mapping.start, mapping.end))
        try:
            fast = Runs(*memory.scan_ioctl(fd, mapping.start, mapping.end, memory.PRIVATE))
        except OSError:
            pytest.skip("this kernel has no PAGEMAP_SCAN")
    finally:
        os.close(fd)
    assert [((a - mapping.start) // PAGE, (b - mapping.start) // PAGE) for a, b in plain] == [
        (0, 2), (3, 4), (700, 701), (4095, 4096),
    ]  # fmt: skip
    assert plain == fast


def test_written_pages_are_told_once_and_again_after_a_new_write(image: Path) -> None:
    writer = Writer(image, tracked=True)
    try:
        with GuestMemory(writer.pid, image) as seen:
            if not seen.tracked:
                pytest.skip("this kernel cannot track writes (Linux 6.7)")
            writer.write((PAGE, 1), (3 * PAGE, 1))
            assert seen.written_pages() == Runs.of([(PAGE, 2 * PAGE), (3 * PAGE, 4 * PAGE)])
            assert len(seen.written_pages()) == 0
            writer.write((3 * PAGE, 2), (8 * PAGE, 1))
            assert seen.written_pages() == Runs.of([(3 * PAGE, 4 * PAGE), (8 * PAGE, 9 * PAGE)])
            assert seen.private_pages().total == 3 * PAGE
    finally:
        writer.close()


def test_written_pages_of_densely_written_memory_are_the_same(image: Path) -> None:
    writer = Writer(image, tracked=True)
    try:
        with GuestMemory(writer.pid, image) as seen:
            if not seen.tracked:
                pytest.skip("this kernel cannot track writes (Linux 6.7)")
            dense = range(2 * MIB, 12 * MIB, PAGE)
            writer.write((PAGE, 1), *((offset, 1) for offset in dense))
            whole = Runs.of([(PAGE, 2 * PAGE), (2 * MIB, 12 * MIB)])
            assert seen.written_pages() == whole
            assert seen.private_pages() == whole  # from here on it knows where memory is dense
            assert len(seen.written_pages()) == 0
            writer.write((0, 2), (5 * MIB, 2), (12 * MIB, 2), (14 * MIB, 2))
            assert [low for low, _ in seen.written_pages()] == [0, 5 * MIB, 12 * MIB, 14 * MIB]
            assert len(seen.written_pages()) == 0
            assert seen.private_pages().total == whole.total + 3 * PAGE
    finally:
        writer.close()


def test_a_capture_holds_the_writes_and_the_image_below_stays(
    writer: Writer, image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    writes = ((PAGE + 1, ord("x")), (3 * MIB, ord("y")))
    writer.write(*writes)
    report = capture(writer, tmp_path / "captured")
    assert (tmp_path / "captured").read_bytes() == expected(image, *writes)
    assert image.read_bytes() == before
    assert report.written == 2 * PAGE


def test_what_is_written_during_the_capture_is_in_it(
    writer: Writer, image: Path, tmp_path: Path
) -> None:
    early = tuple((page * PAGE, 7) for page in range(64))
    late = ((3 * PAGE, 8), (5 * MIB, 9))
    writer.write(*early)
    capture(writer, tmp_path / "captured", meanwhile=lambda: writer.write(*late))
    assert (tmp_path / "captured").read_bytes() == expected(image, *early, *late)


def test_a_second_capture_writes_only_what_changed_since_the_first(
    writer: Writer, image: Path, tmp_path: Path
) -> None:
    first = tuple((page * PAGE, 7) for page in range(512))
    writer.write(*first)
    assert capture(writer, tmp_path / "first").written == 512 * PAGE
    second = ((100 * PAGE, 8), (2000 * PAGE, 9))
    writer.write(*second)
    report = capture(writer, tmp_path / "second", below=tmp_path / "first")
    assert report.written == 2 * PAGE
    assert (tmp_path / "second").read_bytes() == expected(image, *first, *second)
    assert (tmp_path / "first").read_bytes() == expected(image, *first)


def test_more_than_the_buffer_holds_is_captured_too(
    writer: Writer, image: Path, tmp_path: Path
) -> None:
    early = tuple((page * PAGE, 7) for page in range(1024))
    late = tuple((page * PAGE, 8) for page in range(512, 1536))
    writer.write(*early)
    capture(
        writer,
        tmp_path / "captured",
        budget=BufferBudget(MIB),
        meanwhile=lambda: writer.write(*late),
    )
    assert (tmp_path / "captured").read_bytes() == expected(image, *early, *late)


def test_pages_of_zeros_become_holes(writer: Writer, image: Path, tmp_path: Path) -> None:
    writer.write((8 * MIB, 0))
    report = capture(writer, tmp_path / "captured")
    assert (report.written, report.zeroed + report.unchanged) == (0, PAGE)
    assert (tmp_path / "captured").stat().st_blocks <= image.stat().st_blocks


def test_a_zeroed_page_hides_the_data_below(tmp_path: Path) -> None:
    image = tmp_path / "small"
    image.write_bytes(b"\1" + bytes(2 * MIB - 1))
    writer = Writer(image, tracked=False)
    try:
        writer.write((0, 0))
        capture(writer, tmp_path / "captured")
    finally:
        writer.close()
    assert (tmp_path / "captured").read_bytes() == bytes(2 * MIB)


def test_thousands_of_scattered_pages_are_read_in_their_places(
    writer: Writer, image: Path, tmp_path: Path
) -> None:
    writes = tuple((page * PAGE + page % PAGE, page % 251 + 1) for page in range(0, 4096, 2))
    writer.write(*writes)
    report = capture(writer, tmp_path / "captured")
    assert report.written == len(writes) * PAGE
    assert (tmp_path / "captured").read_bytes() == expected(image, *writes)


def test_captures_share_their_buffers_and_none_waits_for_another(
    writer: Writer, image: Path, tmp_path: Path
) -> None:
    """One that finds nothing left has a small buffer; the rest goes straight to its image."""
    budget = BufferBudget(4 * MIB)
    assert budget.take(32 * MIB) == 4 * MIB
    late = tuple((page * PAGE, page % 250 + 1) for page in range(0, 4096, 2))  # 8 MiB
    writer.write((0, 9))
    capture(writer, tmp_path / "first", budget=budget, meanwhile=lambda: writer.write(*late))
    assert (tmp_path / "first").read_bytes() == expected(image, *late)


def test_what_captures_take_of_the_budget_they_give_back(writer: Writer, tmp_path: Path) -> None:
    budget = BufferBudget(24 * MIB)
    writer.write((0, 9))
    capture(writer, tmp_path / "first", budget=budget)
    with pytest.raises(HostFailure):
        capture(writer, tmp_path / "second", budget=budget, meanwhile=writer.close)
    assert budget.take(5) == 0  # whole pages only
    assert budget.take(32 * MIB) == 24 * MIB
    assert budget.take(32 * MIB) == 16 * MIB  # a few, whatever others use
    budget.give_back(40 * MIB)
    assert budget.take(32 * MIB) == 24 * MIB


@pytest.mark.parametrize("tracked", [True, False])
def test_where_files_share_blocks_a_capture_costs_what_changed(
    reflink_dir: Path, tracked: bool
) -> None:
    image = reflink_dir / "image"
    create_sparse(image, 64 * MIB)
    writer = Writer(image, tracked=tracked)
    try:
        first = tuple((page * PAGE, 7) for page in range(8192))
        writer.write(*first)
        capture(writer, reflink_dir / "first")
        second = tuple((page * PAGE, 8) for page in range(0, 8192, 8))
        writer.write(*second)
        report = capture(writer, reflink_dir / "second", below=reflink_dir / "first")
        assert (reflink_dir / "second").read_bytes() == expected(image, *first, *second)
    finally:
        writer.close()
    assert report.written == len(second) * PAGE
    fsync_file(reflink_dir / "second")
    stored = exclusive_bytes(reflink_dir / "second")
    assert report.written <= stored <= 1.3 * report.written


def test_more_runs_than_one_call_of_the_kernel_returns(
    writer: Writer, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write(*((page * PAGE, 1) for page in range(0, 4096, 2)))
    with GuestMemory(writer.pid, image) as seen:
        whole = seen.private_pages()
        assert [start // PAGE for start, _ in whole] == list(range(0, 4096, 2))
        for calls in (64, 511, 512, 513, 1024, 2048):
            monkeypatch.setattr(memory, "_REGIONS_PER_CALL", calls)
            assert seen.private_pages() == whole


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """Room to swap to, for hosts that have none; needs root."""
    if os.geteuid() != 0 or shutil.which("swapon") is None:
        pytest.skip("only root can add swap space")
    file = tmp_path / "swap"
    with file.open("wb") as made:
        os.posix_fallocate(made.fileno(), 0, 64 * MIB)
    file.chmod(0o600)
    subprocess.run(["mkswap", str(file)], check=True, capture_output=True)
    if subprocess.run(["swapon", str(file)], check=False, capture_output=True).returncode:
        pytest.skip("this file system cannot hold swap space")
    try:
        yield
    finally:
        subprocess.run(["swapoff", str(file)], check=True)


@pytest.mark.usefixtures("swap")
def test_pages_that_are_swapped_out_are_captured(
    writer: Writer, image: Path, tmp_path: Path
) -> None:
    writes = tuple((page * PAGE, page % 250 + 1) for page in range(1024))
    writer.write(*writes)
    (mapping,) = memory.find_mappings(writer.pid, image)
    page_out(writer.pid, mapping.start, 4 * MIB)
    swapped = re.search(r"Swap: +(\d+) kB", Path(f"/proc/{writer.pid}/smaps_rollup").read_text())
    assert swapped is not None
    assert int(swapped[1]) >= 2048  # most of the four MiB
    capture(writer, tmp_path / "captured")
    assert (tmp_path / "captured").read_bytes() == expected(image, *writes)


def page_out(pid: int, address: int, length: int) -> None:
    """process_madvise(2) with MADV_PAGEOUT (21): have the kernel swap these pages out."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        vector = (ctypes.c_ulong * 2)(address, length)
        done = libc.syscall(440, pidfd, vector, ctypes.c_ulong(1), 21, 0)
    finally:
        os.close(pidfd)
    assert done == length, os.strerror(ctypes.get_errno())


def test_an_image_with_another_name_is_never_written(image: Path, tmp_path: Path) -> None:
    os.link(image, tmp_path / "somebody-else's")
    with pytest.raises(HostFailure, match="shared memory image"), open_private(image):
        pass


def test_a_process_that_is_gone_or_maps_nothing_is_an_error(image: Path) -> None:
    with pytest.raises(HostFailure, match="does not map"):
        GuestMemory(os.getpid(), image)
    finished = subprocess.Popen([sys.executable, "-S", "-c", ""])
    finished.wait()
    with pytest.raises(HostFailure, match="gone"):
        GuestMemory(finished.pid, image)


def test_a_vmm_that_dies_during_the_capture_is_an_error(writer: Writer, tmp_path: Path) -> None:
    writer.write(*((page * PAGE, 1) for page in range(8)))
    with pytest.raises(HostFailure):
        capture(writer, tmp_path / "captured", meanwhile=writer.close)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9))),
    st.integers(1, 7),
)
def test_pieces_hold_the_same_pages(gaps: list[tuple[int, int]], limit: int) -> None:
    position, pairs = 0, []
    for gap, length in gaps:
        pairs.append((position + gap, position + gap + length))
        position += gap + length
    runs = Runs.of(pairs)
    pieces = list(runs.pieces(limit))
    assert all(0 < piece.total <= limit for piece in pieces)
    assert Runs.of(pair for piece in pieces for pair in piece) == runs
