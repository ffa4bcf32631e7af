"""A compressed image gives back every byte, to us and to the programs, or says where it is damaged.

The numbers are those of the fault catalogue: F13-F15, F41, F43, F51, F53, F55 and S24.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import lz4.frame  # type: ignore[import-untyped]
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.host.files import allocated_bytes
from stillframe.model.errors import DamagedData, InvalidRequest
from stillframe.model.units import GIB, KIB, MIB
from stillframe.model.values import CompressionAlgorithm, CompressionConfig
from stillframe.store.compression import (
    FRAME,
    CompressedReader,
    CompressedSize,
    compress,
    decode,
    effective,
    expand,
)
from stillframe.store.digests import span_digests
from stillframe.store.manifest import EXTENT
from stillframe.store.paths import Payload
from stillframe.store.payloads import (
    check,
    memory_file,
    open_content,
    settle,
    switch_to_compressed,
)
from stillframe.store.verification import Depth, verify
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

ZSTD, LZ4 = CompressionAlgorithm.ZSTD, CompressionAlgorithm.LZ4
BOTH = pytest.mark.parametrize("algorithm", [ZSTD, LZ4])
CONFIGS = [
    CompressionConfig(True),
    CompressionConfig(True, ZSTD, 1),
    CompressionConfig(True, ZSTD, 6),
    CompressionConfig(True, LZ4),
    CompressionConfig(True, LZ4, 4),
]
SIZE = 3 * MIB + 5000
PARTS: Pieces = [(0, noise(600 * KIB)), (MIB + 9, b"text " * 100), (3 * MIB + 1, noise(3000))]


def packed(directory: Path, algorithm: CompressionAlgorithm = ZSTD) -> tuple[Path, Path]:
    """An image and its compressed representation: noise, text, zeros, a short last frame."""
    source, destination = directory / "image", directory / "packed"
    write_pieces(source, SIZE, PARTS)
    assert compress(source, destination, CompressionConfig(True, algorithm)) is not None
    return source, destination


def unpacked_by_the_program(algorithm: CompressionAlgorithm, path: Path) -> bytes:
    program = "lz4" if algorithm is LZ4 else "zstd"
    with path.open("rb") as file:
        done = subprocess.run([program, "-d", "-c"], stdin=file, capture_output=True, check=True)
    return done.stdout


@settings(deadline=None, max_examples=60)
@given(sizes, pieces, st.sampled_from(CONFIGS), st.sampled_from([1, 3]))
def test_what_is_compressed_expands_to_the_same_bytes(
    size: int, parts: Pieces, config: CompressionConfig, threads: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, there, back = (Path(directory, n) for n in ("image", "there", "back"))
        write_pieces(source, size, parts)
        found = compress(source, there, config, threads=threads)
        assert found == CompressedSize(size, there.stat().st_size)
        assert expand(there, back, size=size, threads=threads) == size
        assert back.read_bytes() == source.read_bytes()
        assert allocated_bytes(back) <= allocated_bytes(source) + 8 * KIB
        assert back.stat().st_mode & 0o777 == there.stat().st_mode & 0o777 == 0o600


@settings(deadline=None, max_examples=20)
@given(sizes, pieces, st.sampled_from(CONFIGS))
def test_the_programs_give_back_the_image(
    size: int, parts: Pieces, config: CompressionConfig
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, there = Path(directory, "image"), Path(directory, "there")
        write_pieces(source, size, parts)
        compress(source, there, config)
        assert unpacked_by_the_program(config.algorithm or ZSTD, there) == source.read_bytes()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, SIZE), st.integers(0, SIZE), st.sampled_from([ZSTD, LZ4]))
def test_any_range_can_be_read(one: int, two: int, algorithm: CompressionAlgorithm) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, there = packed(Path(directory), algorithm)
        start, end = sorted((one, two))
        with CompressedReader(there) as reader:
            assert reader.read(start, end - start) == source.read_bytes()[start:end]


@BOTH
def test_f51_holes_cost_nothing_in_either_form(
    tmp_path: Path, algorithm: CompressionAlgorithm
) -> None:
    source, there, back = tmp_path / "image", tmp_path / "there", tmp_path / "back"
    write_pieces(source, 64 * MIB, [(10 * MIB, noise(4096)), (50 * MIB, b"x")])
    config = CompressionConfig(True, algorithm)
    size = compress(source, there, config)
    assert size is not None
    assert size.stored < 64 * (5 * KIB)  # what lz4 needs for a MiB of zeros
    assert expand(there, back, size=64 * MIB) == 64 * MIB
    assert allocated_bytes(back) <= 64 * KIB
    assert back.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(("algorithm", "level"), [
    (ZSTD, 0), (ZSTD, 20), (ZSTD, -1), (LZ4, -1), (LZ4, 10),
])  # fmt: skip
def test_a_level_out_of_range_is_refused(
    tmp_path: Path, algorithm: CompressionAlgorithm, level: int
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compress(tmp_path / "a", tmp_path / "b", CompressionConfig(True, algorithm, level))
    assert caught.value.code == "invalid_snapshot_compression"
    assert not (tmp_path / "b").exists()


def test_defaults_are_those_of_the_contract() -> None:
    assert effective(CompressionConfig(True)) == (ZSTD, 1)
    assert effective(CompressionConfig(True, LZ4)) == (LZ4, 0)
    with pytest.raises(InvalidRequest):
        effective(CompressionConfig(False))


@pytest.mark.parametrize(("algorithm", "levels"), [(ZSTD, (1, 19)), (LZ4, (0, 9))])
def test_higher_levels_make_it_smaller(
    tmp_path: Path, algorithm: CompressionAlgorithm, levels: tuple[int, int]
) -> None:
    source = tmp_path / "image"
    shutil.copyfile(shutil.which("python3") or "/bin/bash", source)
    stored = []
    for level in levels:
        size = compress(source, tmp_path / str(level), CompressionConfig(True, algorithm, level))
        assert size is not None
        stored.append(size.stored)
    assert stored[1] < stored[0]


# -- breaking off ----------------------------------------------------------------------------------
def after(calls: int) -> Callable[[], bool]:
    """Says yes when asked more often than ``calls`` times."""
    count = itertools.count()
    return lambda: next(count) >= calls


@BOTH
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_cancelled_work_leaves_nothing(
    tmp_path: Path, algorithm: CompressionAlgorithm, calls: int
) -> None:
    source, there = packed(tmp_path, algorithm)
    before = there.read_bytes()
    config = CompressionConfig(True, algorithm)
    assert compress(source, tmp_path / "other", config, cancelled=after(calls)) is None
    assert expand(there, tmp_path / "back", size=SIZE, cancelled=after(min(calls, 2))) is None
    assert listing(tmp_path) == ["image", "packed"]
    assert there.read_bytes() == before


def test_progress_is_told_frame_by_frame(tmp_path: Path) -> None:
    source, there = packed(tmp_path)
    told: list[tuple[int, int]] = []
    compress(
        source, tmp_path / "other", CompressionConfig(True),
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(MIB, SIZE), (2 * MIB, SIZE), (3 * MIB, SIZE), (SIZE, SIZE)]
    told.clear()
    expand(
        there, tmp_path / "back", size=SIZE,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(MIB, SIZE), (2 * MIB, SIZE), (SIZE, SIZE)]  # the third frame is zeros


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("name", ["pwrite", "fsync"])
def test_f41_f43_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    source, there = packed(tmp_path)
    real, calls = getattr(os, name), itertools.count()

    def fail(*arguments: object) -> object:
        if next(calls) >= (1 if name == "pwrite" else 0):
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        compress(source, tmp_path / "other", CompressionConfig(True))
    with pytest.raises(OSError, match=os.strerror(code)):
        expand(there, tmp_path / "back", size=SIZE)
    assert listing(tmp_path) == ["image", "packed"]


def test_f53_nothing_is_written_into_a_file_that_is_there(tmp_path: Path) -> None:
    source, there = packed(tmp_path)
    (tmp_path / "base").write_bytes(b"base")
    os.link(tmp_path / "base", tmp_path / "shared")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("shared", "link"):
        with pytest.raises(FileExistsError):
            compress(source, tmp_path / name, CompressionConfig(True))
        with pytest.raises(FileExistsError):
            expand(there, tmp_path / name, size=SIZE)
    assert (tmp_path / "base").read_bytes() == b"base"
    assert not (tmp_path / "nowhere").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    source, there = packed(tmp_path)
    (tmp_path / "a").symlink_to(source)
    (tmp_path / "b").symlink_to(there)
    with pytest.raises(OSError, match="symbolic link"):
        compress(tmp_path / "a", tmp_path / "c", CompressionConfig(True))
    with pytest.raises(OSError, match="symbolic link"):
        expand(tmp_path / "b", tmp_path / "d", size=SIZE)


# -- damage ----------------------------------------------------------------------------------------
def frames_of(path: Path) -> list[tuple[int, int]]:
    """Where the frames of the packed image lie, read as docs/format.md says."""
    data = path.read_bytes()
    (count,) = struct.unpack_from("<I", data, len(data) - 60 + 12)
    start = len(data) - 60 - 36 * count
    lengths = [struct.unpack_from("<I", data, start + 36 * n)[0] & 0x7FFFFFFF for n in range(count)]
    ends = list(itertools.accumulate(lengths))
    return list(zip([0, *ends], ends, strict=False))


def everything(path: Path) -> None:
    """Read all that is stored."""
    with CompressedReader(path) as reader:
        reader.check_holes(0, reader.size)
        span_digests(reader, 0, reader.size)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**40), st.sampled_from([ZSTD, LZ4]))
def test_f55_any_flipped_bit_is_found_and_located(
    chosen: int, algorithm: CompressionAlgorithm
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, there = packed(Path(directory), algorithm)
        back = Path(directory, "back")
        frames = frames_of(there)
        bit = chosen % (there.stat().st_size * 8)
        flip(there, bit)
        with pytest.raises(DamagedData) as caught:
            everything(there)
        facts = caught.value.facts
        assert facts["file"] == "packed"
        hit = [n for n, (start, end) in enumerate(frames) if start <= bit // 8 < end]
        if hit:
            assert facts["offset"] == hit[0] * FRAME
            assert facts["length"] == min(FRAME, SIZE - hit[0] * FRAME)
        try:
            expand(there, back, size=SIZE)
            assert hit == [2]  # the frame of zeros is not needed
            assert back.read_bytes() == source.read_bytes()
        except DamagedData:
            assert not back.exists()


@BOTH
def test_f55_a_truncated_file_is_damage_wherever_it_ends(
    tmp_path: Path, algorithm: CompressionAlgorithm
) -> None:
    _, there = packed(tmp_path, algorithm)
    whole = there.read_bytes()
    borders = {border for frame in frames_of(there) for border in frame}
    places = {b + d for b in borders for d in (-1, 0, 1)} | {0, 1, len(whole) - 1, len(whole) - 60}
    for length in sorted(p for p in places if 0 <= p < len(whole)):
        there.write_bytes(whole[:length])
        with pytest.raises(DamagedData) as caught:
            expand(there, tmp_path / "back", size=SIZE)
        assert caught.value.facts["file"] == "packed"
    there.write_bytes(whole + b"\0")
    with pytest.raises(DamagedData):
        expand(there, tmp_path / "back", size=SIZE)
    assert listing(tmp_path) == ["image", "packed"]


def forged(path: Path, frames: list[bytes], **fields: int) -> None:
    """A file whose seek table is right for frames of any content."""
    entries = b"".join(struct.pack("<I32s", len(f), blake3(f).digest()) for f in frames)
    values = {
        "size": MIB, "frame": FRAME, "count": len(frames), "number": 1, "version": 1, "zero": 0,
        **fields,
    }  # fmt: skip
    head = struct.pack("<QIIBBH", *values.values())
    table = entries + head + blake3(entries + head).digest() + b"SFFRAMES"
    path.write_bytes(b"".join(frames) + struct.pack("<II", 0x184D2A5B, len(table)) + table)


def zstd(data: bytes, *, with_length: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=with_length).compress(data)


def a_claim_of(size: int) -> bytes:
    """The head of a zstd frame that claims to hold ``size`` bytes, and a short block."""
    return struct.pack("<IBBQ", 0xFD2FB528, 0b11000000, 88, size) + struct.pack("<I", 9)[:3] + b"x"


BOMBS = {
    "256 MiB of zeros": (1, zstd(bytes(GIB // 4))),
    "256 MiB without their length": (1, zstd(bytes(GIB // 4), with_length=False)),
    "a claim of an EiB": (1, a_claim_of(1 << 60)),
    "a claim that is right, content that is not": (1, a_claim_of(MIB)),
    "two frames": (1, zstd(bytes(MIB)) + zstd(b"more")),
    "two halves": (1, zstd(bytes(MIB // 2)) * 2),
    "too little": (1, zstd(b"short")),
    "nothing": (1, b""),
    "a skippable frame": (1, struct.pack("<II", 0x184D2A50, MIB) + bytes(MIB)),
    "lz4 as zstd": (1, lz4.frame.compress(bytes(MIB))),
    "lz4: 256 MiB of zeros": (2, lz4.frame.compress(bytes(GIB // 4))),
    "lz4: without its length": (2, lz4.frame.compress(bytes(GIB // 4), store_size=False)),
    "lz4: another length": (
        2,
        lz4.frame.compress(bytes(4 * MIB), store_size=True).replace(
            struct.pack("<Q", 4 * MIB), struct.pack("<Q", MIB), 1
        ),
    ),
    "lz4: cut short": (2, lz4.frame.compress(noise(MIB))[:-1000]),
    "lz4: two frames": (2, lz4.frame.compress(bytes(MIB)) + lz4.frame.compress(b"more")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_f55_s24_a_bomb_does_not_expand(tmp_path: Path, name: str) -> None:
    number, frame = BOMBS[name]
    forged(tmp_path / "packed", [frame], number=number)
    with pytest.raises(DamagedData) as caught:
        expand(tmp_path / "packed", tmp_path / "back", size=MIB)
    assert (caught.value.facts["offset"], caught.value.facts["length"]) == (0, MIB)
    assert listing(tmp_path) == ["packed"]


@pytest.mark.parametrize(
    "frame", [b"", b"\0", noise(100), b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"]
)
@BOTH
def test_f55_what_is_no_frame_is_an_error_of_one_kind(
    frame: bytes, algorithm: CompressionAlgorithm
) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(algorithm, frame, MIB)


@pytest.mark.parametrize("fields", [
    {"size": 2**63}, {"size": 2 * MIB}, {"count": 2**32 - 1}, {"count": 0}, {"frame": 0},
    {"frame": 2**32 - EXTENT}, {"frame": 1000}, {"number": 0}, {"number": 3}, {"version": 2},
    {"zero": 1}, {"size": 2**63, "frame": 16 * MIB},
])  # fmt: skip
def test_f55_a_seek_table_that_claims_too_much_is_damage(
    tmp_path: Path, fields: dict[str, int]
) -> None:
    forged(tmp_path / "packed", [zstd(bytes(MIB))], **fields)
    with pytest.raises(DamagedData, match="seek table"):
        expand(tmp_path / "packed", tmp_path / "back", size=MIB)
    assert listing(tmp_path) == ["packed"]


def test_f55_an_image_of_another_size_is_damage(tmp_path: Path) -> None:
    _, there = packed(tmp_path)
    with pytest.raises(DamagedData, match=str(SIZE)):
        expand(there, tmp_path / "back", size=SIZE + 1)
    assert not (tmp_path / "back").exists()


def test_f45_a_bad_sector_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, there = packed(tmp_path)
    bad, pread = frames_of(there)[1][0], os.pread

    def read(fd: int, length: int, offset: int) -> bytes:
        if offset <= bad < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", read)
    with pytest.raises(DamagedData, match="cannot be read") as caught:
        expand(there, tmp_path / "back", size=SIZE)
    assert caught.value.facts["offset"] == MIB


# -- the representations of a payload --------------------------------------------------------------
@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return make_payload(tmp_path / "payload")


def packed_beside(payload: Payload, algorithm: CompressionAlgorithm) -> None:
    being_built = payload.being_built(payload.compressed(algorithm))
    compress(payload.memory, being_built, CompressionConfig(True, algorithm))


def content(payload: Payload) -> bytes:
    with open_content(payload, "memory") as reader:
        return reader.read(0, reader.size)


@BOTH
def test_a_compressed_payload_passes_check_and_verify(
    payload: Payload, algorithm: CompressionAlgorithm
) -> None:
    image, manifest = payload.memory.read_bytes(), payload.manifest.read_bytes()
    packed_beside(payload, algorithm)
    switch_to_compressed(payload, algorithm)
    assert memory_file(payload) == (payload.compressed(algorithm), algorithm)
    assert content(payload) == image
    assert payload.manifest.read_bytes() == manifest
    assert check(payload)["files"]["memory"]["size"] == len(image)
    for depth in Depth:
        *_, last = verify(payload, depth)
        assert last.damage == ()


@BOTH
def test_f55_verify_locates_damage_in_a_compressed_image(
    payload: Payload, algorithm: CompressionAlgorithm
) -> None:
    packed_beside(payload, algorithm)
    switch_to_compressed(payload, algorithm)
    path = payload.compressed(algorithm)
    frames = frames_of(path)
    flip(path, 8 * frames[1][0] + 100)
    flip(path, 8 * frames[2][0] + 100)  # a frame of zeros
    *_, last = verify(payload, Depth.FULL)
    assert [(d.file, d.offset, d.length) for d in last.damage] == [("memory", MIB, 2 * MIB)]
    assert path.name in last.damage[0].reason
    flip(path, 8 * (path.stat().st_size - 100))
    *_, last = verify(payload, Depth.MANIFEST)
    assert [d.file for d in last.damage] == ["memory"]
    with pytest.raises(DamagedData) as caught:
        check(payload)
    assert caught.value.facts["file"] == path.name


def test_f55_another_image_in_the_right_form_is_damage(payload: Payload, tmp_path: Path) -> None:
    other = tmp_path / "other"
    data = bytearray(payload.memory.read_bytes())
    data[MIB] ^= 1
    other.write_bytes(data)
    compress(other, payload.being_built(payload.compressed(ZSTD)), CompressionConfig(True))
    switch_to_compressed(payload, ZSTD)
    *_, last = verify(payload, Depth.FULL)
    assert [(d.offset, d.length) for d in last.damage] == [(MIB, EXTENT)]


class Crash(Exception):
    """The server dies here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Die before the given change of the directory."""
    count = itertools.count()
    for name in ("rename", "unlink"):
        real = getattr(Path, name)

        def step(*arguments: object, real: Callable[..., object] = real, **more: object) -> object:
            if next(count) == call:
                raise Crash
            return real(*arguments, **more)

        monkeypatch.setattr(Path, name, step)


@BOTH
@pytest.mark.parametrize("call", range(5))
def test_f13_f14_f15_a_crash_leaves_one_valid_representation(
    payload: Payload, monkeypatch: pytest.MonkeyPatch, algorithm: CompressionAlgorithm, call: int
) -> None:
    image = payload.memory.read_bytes()
    packed_beside(payload, algorithm)
    with monkeypatch.context() as patch:
        crash_at(patch, call)
        try:
            switch_to_compressed(payload, algorithm)
        except Crash:
            assert call < 3
    valid = payload.compressed(algorithm) if call >= 2 else payload.memory
    for _ in range(2):  # before and after clearing up
        assert memory_file(payload) == (valid, algorithm if call >= 2 else None)
        assert content(payload) == image
        check(payload)
        settle(payload)
    found = {payload.memory.name, *(p.name for p in payload.directory.glob("*memory.[zl]*"))}
    assert {name for name in listing(payload.directory) if name in found} == {valid.name}
    assert settle(payload) == []


def test_f13_half_a_representation_is_never_taken(payload: Payload) -> None:
    payload.being_built(payload.compressed(LZ4)).write_bytes(b"half")
    assert memory_file(payload) == (payload.memory, None)
    assert settle(payload) == [".memory.lz4.new"]


def test_a_payload_without_memory_has_no_representation(payload: Payload) -> None:
    payload.memory.unlink()
    assert memory_file(payload) is None
    assert settle(payload) == []
    with pytest.raises(DamagedData, match="memory is missing"):
        check(payload)
