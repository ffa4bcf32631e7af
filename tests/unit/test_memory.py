"""Capturing dirty pages from a real process that maps an image privately."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.host import memory
from stillframe.host.files import clone, create_sparse
from stillframe.host.memory import PAGE, Run
from stillframe.model.errors import HostFailure

MIB = 1 << 20
WRITER = """
import mmap, sys
size = int(sys.argv[2])
with open(sys.argv[1], "r+b") as file:
    image = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE)
print("mapped", flush=True)
for line in sys.stdin:
    offset, value = map(int, line.split())
    image[offset] = value
    print("written", flush=True)
"""


class Writer:
    """A stand-in for a VMM: maps the image privately and writes single bytes when told."""

    def __init__(self, image: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", WRITER, str(image), str(image.stat().st_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("mapped")
        self.pid = self.process.pid

    def write(self, offset: int, value: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{offset} {value}\n")
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


@pytest.fixture
def writer(image: Path) -> Iterator[Writer]:
    process = Writer(image)
    yield process
    process.close()


def capture(writer: Writer, image: Path, destination: Path) -> memory.WriteReport:
    clone(image, destination)
    pages = memory.read_dirty_pages(writer.pid, image, memory.prepare_buffer(writer.pid, image))
    try:
        return memory.write_dirty_pages(pages, destination)
    finally:
        pages.close()


def test_an_untouched_mapping_has_no_dirty_pages(writer: Writer, image: Path) -> None:
    assert memory.dirty_runs(writer.pid, memory.find_mappings(writer.pid, image)) == []


def test_dirty_runs_are_the_written_pages_merged(writer: Writer, image: Path) -> None:
    for offset in (5 * PAGE, 6 * PAGE + 17, 9 * MIB):
        writer.write(offset, 1)
    runs = memory.dirty_runs(writer.pid, memory.find_mappings(writer.pid, image))
    assert runs == [Run(5 * PAGE, 2 * PAGE), Run(9 * MIB, PAGE)]


def test_both_ways_of_scanning_agree(writer: Writer, image: Path) -> None:
    for page in (0, 1, 3, 700, 4095):
        writer.write(page * PAGE, 9)
    (mapping,) = memory.find_mappings(writer.pid, image)
    fd = os.open(f"/proc/{writer.pid}/pagemap", os.O_RDONLY)
    try:
        plain = list(memory.scan_pagemap(fd, mapping.start, mapping.end))
        try:
            fast = list(memory.scan_ioctl(fd, mapping.start, mapping.end))
        except OSError:
            pytest.skip("this kernel has no PAGEMAP_SCAN")
    finally:
        os.close(fd)
    assert [(a - mapping.start, b - mapping.start) for a, b in plain] == [
        (0, 2 * PAGE), (3 * PAGE, 4 * PAGE), (700 * PAGE, 701 * PAGE), (4095 * PAGE, 4096 * PAGE),
    ]  # fmt: skip
    assert plain == fast


def test_a_capture_holds_the_writes_and_the_image_below_stays(
    writer: Writer, image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    writer.write(PAGE + 1, ord("x"))
    writer.write(3 * MIB, ord("y"))
    report = capture(writer, image, tmp_path / "captured")
    expected = bytearray(before)
    expected[PAGE + 1], expected[3 * MIB] = ord("x"), ord("y")
    assert (tmp_path / "captured").read_bytes() == bytes(expected)
    assert image.read_bytes() == before
    assert report.written == 2 * PAGE


def test_pages_of_zeros_become_holes(writer: Writer, image: Path, tmp_path: Path) -> None:
    for index in range(PAGE):
        if index < 4:  # the page is dirty, and zero once its data byte is gone
            writer.write(8 * MIB + index, 0)
    report = capture(writer, image, tmp_path / "captured")
    assert (report.written, report.zeroed) == (0, PAGE)
    assert (tmp_path / "captured").stat().st_blocks <= image.stat().st_blocks


def test_a_zeroed_page_hides_the_data_below(writer: Writer, tmp_path: Path) -> None:
    image = tmp_path / "small"
    image.write_bytes(b"\1" + bytes(2 * MIB - 1))
    other = Writer(image)
    try:
        other.write(0, 0)
        capture(other, image, tmp_path / "captured")
    finally:
        other.close()
    assert (tmp_path / "captured").read_bytes() == bytes(2 * MIB)


def test_pages_dirtied_after_the_buffer_was_prepared_are_captured_too(
    writer: Writer, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_BUFFER_RESERVE", PAGE)
    buffer = memory.prepare_buffer(writer.pid, image)
    for page in range(64):
        writer.write(page * PAGE, 7)
    pages = memory.read_dirty_pages(writer.pid, image, buffer)
    assert pages.length == 64 * PAGE
    assert pages.buffer is not None
    assert all(pages.buffer[page * PAGE] == 7 for page in range(64))
    pages.close()


def test_an_image_with_another_name_is_never_written(
    writer: Writer, image: Path, tmp_path: Path
) -> None:
    writer.write(0, 1)
    destination = tmp_path / "captured"
    clone(image, destination)
    os.link(destination, tmp_path / "somebody-else's")
    pages = memory.read_dirty_pages(writer.pid, image)
    with pytest.raises(HostFailure, match="shared memory image"):
        memory.write_dirty_pages(pages, destination)
    pages.close()
    assert destination.read_bytes() == image.read_bytes()


def test_a_process_that_is_gone_or_maps_nothing_is_an_error(image: Path) -> None:
    with pytest.raises(HostFailure, match="does not map"):
        memory.find_mappings(os.getpid(), image)
    finished = subprocess.Popen([sys.executable, "-S", "-c", ""])
    finished.wait()
    with pytest.raises(HostFailure, match="gone"):
        memory.find_mappings(finished.pid, image)
