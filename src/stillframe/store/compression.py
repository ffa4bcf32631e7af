"""The compressed representation of a memory image: independent frames and a seek table.

One frame of zstd or lz4 for each MiB of the image, in order, then one skippable frame with the seek
table: for each frame its stored length and the BLAKE3 of its stored bytes, then a footer with a
digest of its own. A frame of zeros is stored too (always the same few bytes) but never made nor
expanded, so the ``zstd`` and ``lz4`` programs give back exactly the image. docs/format.md has the
layout.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lz4.frame  # type: ignore[import-untyped]
import zstandard
from blake3 import blake3

from stillframe.host.files import (
    is_host_trouble,
    new_file,
    open_regular,
    read_exactly,
    write_fully,
    write_sparse,
)
from stillframe.host.threads import in_order
from stillframe.model.errors import DamagedData, InvalidRequest
from stillframe.model.units import MIB
from stillframe.model.values import COMPRESSION_LEVELS, CompressionAlgorithm, CompressionConfig
from stillframe.store.manifest import EXTENT, damaged
from stillframe.store.readers import FileReader, Reader

FRAME = MIB  # bytes of the image in one frame; the last frame may be shorter
_NUMBERS = {CompressionAlgorithm.ZSTD: 1, CompressionAlgorithm.LZ4: 2}
_ALGORITHMS = {number: algorithm for algorithm, number in _NUMBERS.items()}
_ENTRY = struct.Struct("<I32s")  # stored length, bit 31 set for a frame of zeros; BLAKE3
_ZEROS = 1 << 31
# The footer: image size, frame length, frames, algorithm, version, zero; digest; magic.
_FIELDS = struct.Struct("<QIIBBH")
_MAGIC, _VERSION = b"SFFRAMES", 1
_FOOTER = _FIELDS.size + 32 + len(_MAGIC)
_SKIPPABLE = struct.Struct("<II")
_SKIPPABLE_MAGIC = 0x184D2A5B  # one of the 16 that both formats set aside
_MAX_FRAME = 16 * MIB


@dataclass(frozen=True, slots=True)
class CompressedSize:
    """Bytes of an image and of its compressed representation."""

    image: int
    stored: int


def effective(config: CompressionConfig) -> tuple[CompressionAlgorithm, int]:
    """Algorithm and level of an enabled configuration, with the contract's defaults.

    Raises InvalidRequest (``invalid_snapshot_compression``) for a level out of range.
    """
    algorithm = config.algorithm or CompressionAlgorithm.ZSTD
    lowest, highest, default = COMPRESSION_LEVELS[algorithm]
    level = default if config.level is None else config.level
    if not config.enabled or not lowest <= level <= highest:
        raise InvalidRequest(
            f"{algorithm.value} has levels {lowest} to {highest}",
            code="invalid_snapshot_compression",
            level=level,
        )
    return algorithm, level


def encoder(algorithm: CompressionAlgorithm, level: int) -> Callable[[bytes], bytes]:
    """What makes one complete frame of its argument; may be called from several threads."""
    if algorithm is CompressionAlgorithm.LZ4:
        return lambda data: lz4.frame.compress(
            data, compression_level=level, block_size=lz4.frame.BLOCKSIZE_MAX1MB,
            block_linked=False, content_checksum=True, store_size=True,
        )  # fmt: skip
    local = threading.local()

    def encode(data: bytes) -> bytes:
        if not hasattr(local, "compressor"):
            local.compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        frame: bytes = local.compressor.compress(data)
        return frame

    return encode


def decode(algorithm: CompressionAlgorithm, frame: bytes, length: int) -> bytes:
    """The content of exactly one frame, which must be ``length`` bytes.

    Never makes more than that, whatever the frame claims. Raises ValueError.
    """
    try:
        if algorithm is CompressionAlgorithm.ZSTD:
            if zstandard.get_frame_parameters(frame).content_size != length:
                raise ValueError("the frame has another length")
            data = _decompressor().decompress(frame, allow_extra_data=False)
        else:
            if lz4.frame.get_frame_info(frame)["content_size"] != length:
                raise ValueError("the frame has another length")
            unpacking = lz4.frame.LZ4FrameDecompressor()
            data = unpacking.decompress(frame, max_length=length)
            if not unpacking.eof or unpacking.unused_data:
                raise ValueError("the frame does not end where it should")
    except (zstandard.ZstdError, RuntimeError, EOFError) as error:
        raise ValueError(str(error)) from error
    if len(data) != length:
        raise ValueError("the frame has another length")
    return data


_per_thread = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_per_thread, "decompressor"):
        _per_thread.decompressor = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _per_thread.decompressor
    return decompressor


def compress(
    source: Path,
    destination: Path,
    config: CompressionConfig,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    threads: int | None = None,
) -> CompressedSize | None:
    """Compress the image ``source`` into the new file ``destination``; durable on return.

    ``cancelled`` is asked before each frame; then the answer is None. ``progress`` is told the
    bytes of the image done and in all. Raises InvalidRequest, OSError. Unless the answer is a
    size, there is no destination.
    """
    algorithm, level = effective(config)
    table = _SeekTable(algorithm)
    with contextlib.suppress(_Cancelled), contextlib.ExitStack() as stack:
        reader = stack.enter_context(FileReader(source))
        fd = stack.enter_context(new_file(destination))
        frames = _frames(reader, encoder(algorithm, level), threads)
        for frame, zeros in stack.enter_context(contextlib.closing(frames)):
            if cancelled():
                raise _Cancelled
            write_fully(fd, frame, table.end)
            table.add(frame, zeros)
            progress(min(table.frames * FRAME, reader.size), reader.size)
        last = table.encode(reader.size)
        write_fully(fd, last, table.end)
        os.fsync(fd)
        return CompressedSize(reader.size, table.end + len(last))
    return None


class _Cancelled(Exception):
    """The caller wants no more of it."""


def _frames(
    reader: Reader, encode: Callable[[bytes], bytes], threads: int | None
) -> Generator[tuple[bytes, bool]]:
    """Each frame of the image in order, and whether it is one of zeros."""
    zeros: dict[int, bytes] = {}

    def work(offset: int) -> tuple[bytes, bool]:
        length = min(FRAME, reader.size - offset)
        if next(reader.data(offset, offset + length), None) is not None:
            data = reader.read(offset, length)
            if data != bytes(length):
                return encode(data), False
        if length not in zeros:
            zeros[length] = encode(bytes(length))
        return zeros[length], True

    return in_order(work, range(0, reader.size, FRAME), threads)


@dataclass(slots=True)
class _SeekTable:
    """The seek table while its frames are being written; ``end`` is where the next one goes."""

    algorithm: CompressionAlgorithm
    frames: int = 0
    end: int = 0
    entries: bytearray = field(default_factory=bytearray)

    def add(self, frame: bytes, zeros: bool) -> None:
        """Note the next frame."""
        self.entries += _ENTRY.pack(len(frame) | zeros * _ZEROS, blake3(frame).digest())
        self.frames += 1
        self.end += len(frame)

    def encode(self, size: int) -> bytes:
        """The skippable frame that ends the file of an image of ``size`` bytes."""
        fields = _FIELDS.pack(
            size, FRAME, self.frames, _NUMBERS[self.algorithm], _VERSION, 0
        )  # fmt: skip
        digest = blake3(bytes(self.entries) + fields).digest()
        content = bytes(self.entries) + fields + digest + _MAGIC
        return _SKIPPABLE.pack(_SKIPPABLE_MAGIC, len(content)) + content


def expand(
    source: Path,
    destination: Path,
    *,
    size: int,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    threads: int | None = None,
) -> int | None:
    """Expand ``source`` into the new sparse file ``destination``; durable on return.

    ``size`` is what the manifest says about the image: nothing is written for a source that
    claims another. Every frame is checked. Answers the bytes of the image, None when cancelled.
    Raises DamagedData (facts ``file``, ``offset`` and ``length`` in the image), OSError; unless
    the answer is a size, there is no destination.
    """
    with contextlib.suppress(_Cancelled), contextlib.ExitStack() as stack:
        reader = stack.enter_context(CompressedReader(source))
        if reader.size != size:
            raise damaged(source.name, f"holds {reader.size} bytes, {size} expected")
        fd = stack.enter_context(new_file(destination))
        os.ftruncate(fd, size)

        def work(frame: tuple[int, int]) -> int:
            start, end = frame
            write_sparse(fd, reader.read(start, end - start), start)
            return end

        ends = in_order(work, reader.data(0, size), threads)
        for end in stack.enter_context(contextlib.closing(ends)):
            if cancelled():
                raise _Cancelled
            progress(end, size)
        os.fsync(fd)
        return size
    return None


class CompressedReader(Reader):
    """Reads an image from its compressed representation, frame by frame.

    Raises DamagedData when the seek table is damaged, OSError.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        with contextlib.ExitStack() as undo:
            self._fd = open_regular(path)
            undo.callback(os.close, self._fd)
            self._load(os.fstat(self._fd).st_size)
            undo.pop_all()

    def _load(self, file_size: int) -> None:
        if file_size < _SKIPPABLE.size + _FOOTER:
            raise damaged(self.name, "is too short")
        footer = read_exactly(self._fd, _FOOTER, file_size - _FOOTER)
        fields, digest, magic = footer[: _FIELDS.size], footer[_FIELDS.size : -8], footer[-8:]
        size, self.frame, count, number, version, zero = _FIELDS.unpack(fields)
        content = count * _ENTRY.size + _FOOTER
        begin = file_size - content - _SKIPPABLE.size
        good = (
            magic == _MAGIC and version == _VERSION and zero == 0
            and number in _ALGORITHMS
            and 0 < self.frame <= _MAX_FRAME and self.frame % EXTENT == 0
            and count == -(-size // self.frame) and begin >= 0
        )  # fmt: skip
        if not good:
            raise damaged(self.name, "has no seek table at its end, or one that is not known")
        head = read_exactly(self._fd, _SKIPPABLE.size + content - _FOOTER, begin)
        entries = head[_SKIPPABLE.size :]
        if (
            head[: _SKIPPABLE.size] != _SKIPPABLE.pack(_SKIPPABLE_MAGIC, content)
            or blake3(entries + fields).digest() != digest
        ):
            raise damaged(self.name, "has a seek table that does not match its digest")
        self.size, self.algorithm, self._entries = size, _ALGORITHMS[number], entries
        lengths = [stored & ~_ZEROS for stored, _ in _ENTRY.iter_unpack(entries)]
        self._starts = [0, *itertools.accumulate(lengths)]
        if self._starts[-1] != begin:
            raise damaged(self.name, "has a seek table that does not match its length")

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges of whole frames that hold something else than zeros."""
        for number in range(start // self.frame, -(-min(end, self.size) // self.frame)):
            if not self._entry(number)[0] & _ZEROS:
                yield number * self.frame, min((number + 1) * self.frame, self.size)

    def check_holes(self, start: int, end: int) -> None:
        """Check the stored bytes of the frames of zeros. Raises as ``read``."""
        for number in range(start // self.frame, -(-min(end, self.size) // self.frame)):
            if self._entry(number)[0] & _ZEROS:
                self.read_stored(number)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the image. Raises DamagedData naming the range of a bad frame, OSError."""
        first = offset // self.frame
        frames = range(first, -(-(offset + length) // self.frame))
        if len(frames) == 1:
            data = self._read_frame(first)
        else:
            data = b"".join([self._read_frame(number) for number in frames])
        skipped = offset - first * self.frame
        return data if len(data) == length else data[skipped : skipped + length]

    def read_stored(self, number: int) -> bytes:
        """The stored bytes of a frame, checked against their digest. Raises as ``read``."""
        begin, end = self._starts[number : number + 2]
        if end - begin > self.frame + self.frame // 8 + 4096:  # more than any frame can take
            raise self._bad(number, "is too long")
        try:
            stored = read_exactly(self._fd, end - begin, begin)
        except OSError as error:
            if is_host_trouble(error):
                raise
            raise self._bad(number, f"cannot be read: {error.strerror or error}") from error
        if blake3(stored).digest() != self._entry(number)[1]:
            raise self._bad(number, "does not match its digest")
        return stored

    def _read_frame(self, number: int) -> bytes:
        length = min(self.frame, self.size - number * self.frame)
        if self._entry(number)[0] & _ZEROS:
            return bytes(length)
        try:
            return decode(self.algorithm, self.read_stored(number), length)
        except ValueError as error:
            raise self._bad(number, f"cannot be expanded: {error}") from error

    def _entry(self, number: int) -> tuple[int, bytes]:
        stored, digest = _ENTRY.unpack_from(self._entries, number * _ENTRY.size)
        return stored, digest

    def _bad(self, number: int, what: str) -> DamagedData:
        start = number * self.frame
        length = min(self.frame, self.size - start)
        return damaged(self.name, f"has a frame that {what}", offset=start, length=length)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
