"""Reading hostile tar streams: compressed any way, strictly, within limits, without extraction."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import zstandard

from stillframe.model.errors import InvalidRequest, StillframeError

MAX_ENTRIES = 1_000_000
MAX_PATH = 4096  # bytes, Linux PATH_MAX
MAX_HEADER = 1024 * 1024  # a PAX or GNU long-name record
MAX_UNPACKED = 64 * 1024**3
MAX_RATIO = 200  # unpacked to packed, looked at beyond RATIO_FREE bytes
RATIO_FREE = 256 * 1024**2
_EXTENDED = frozenset((b"x", b"g", b"X", b"L", b"K"))
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes of a layer: a file, or ``size`` bytes of it from ``offset`` (0: to the end).

    ``diff_id`` is the digest its uncompressed bytes must have, if known (OCI image config).
    """

    path: Path
    offset: int = 0
    size: int = 0
    diff_id: str | None = None

    @property
    def length(self) -> int:
        """Packed bytes."""
        return self.size or self.path.stat().st_size - self.offset


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class _Slice:
    """Bounded reading of a file from where it stands."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1, /) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._file.read(wanted)
        self._left -= len(data)
        return data


class _Limited:
    """Counts and hashes unpacked bytes, and refuses decompression bombs (S24)."""

    def __init__(self, source: _Readable, packed: int, *, hashing: bool) -> None:
        self._source, self._packed = source, max(packed, 1)
        self._hash = hashlib.sha256() if hashing else None
        self.total = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size if size >= 0 else 1 << 20)
        self.total += len(data)
        if self._hash is not None:
            self._hash.update(data)
        check_expansion(self.total, self._packed)
        return data

    def finish(self) -> str | None:
        """Read what follows the archive; the digest of all bytes if hashing was wanted."""
        while self.read(1 << 20):
            pass
        return f"sha256:{self._hash.hexdigest()}" if self._hash is not None else None


def check_expansion(unpacked: int, packed: int) -> None:
    """Raise InvalidRequest when unpacked bytes are too many, or too many for the packed ones."""
    if unpacked > MAX_UNPACKED or (unpacked > RATIO_FREE and unpacked > MAX_RATIO * max(packed, 1)):
        raise refused("a layer unpacks to too many bytes", unpacked_bytes=unpacked)


def refused(message: str, **facts: object) -> InvalidRequest:
    """The error for a layer that must not be used (code ``invalid_layer``)."""
    return InvalidRequest(
        message, code="invalid_layer", hint="the image is damaged or hostile; rebuild it", **facts
    )


class _StrictInfo(tarfile.TarInfo):
    """Refuses what tarfile overlooks: damage after the first entry, oversized records."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENDED and info.size > MAX_HEADER:
            raise refused("an extended tar header is too long", size_bytes=info.size)
        if info.size < 0:
            raise refused("a tar entry has a negative size")
        return info

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _StrictInfo:
        try:
            return super().fromtarfile(tarfile)
        except (_Truncated, _Invalid) as error:
            raise refused(f"the tar stream is damaged: {error}") from error


# Known to tarfile, unknown to its type stubs.
_Truncated: type[Exception] = vars(tarfile)["TruncatedHeaderError"]
_Invalid: type[Exception] = vars(tarfile)["InvalidHeaderError"]


@contextlib.contextmanager
def reading(blob: Blob, *, verify: bool = False) -> Iterator[tarfile.TarFile]:
    """Open a layer as a stream of entries; with ``verify`` check its diff_id on leaving.

    Raises InvalidRequest (``invalid_layer``) for damage, truncation, bombs and a wrong digest.
    """
    try:
        with blob.path.open("rb") as file:
            file.seek(blob.offset)
            packed = blob.length
            stream = _Limited(
                _decompress(file, packed), packed, hashing=verify and blob.diff_id is not None
            )
            with tarfile.open(
                fileobj=cast(Any, stream),
                mode="r|",
                tarinfo=_StrictInfo,
                encoding="utf-8",
                errors="surrogateescape",
            ) as archive:
                yield archive
            digest = stream.finish()
            if digest is not None and digest != blob.diff_id:
                raise refused(
                    "a layer's content is not what the image says",
                    expected=blob.diff_id,
                    found=digest,
                )
    except StillframeError:
        raise
    except _DAMAGE as error:
        raise refused(f"a layer cannot be read: {error or 'it is cut off'}") from error
    except (ValueError, OverflowError, UnicodeError) as error:
        raise refused(f"a layer has a malformed header: {error}") from error


def _decompress(file: IO[bytes], size: int) -> _Readable:
    start = file.tell()
    magic = file.read(6)
    file.seek(start)
    source = _Slice(file, size)
    if magic.startswith(b"\x1f\x8b"):
        return cast(_Readable, gzip.GzipFile(fileobj=cast(Any, source), mode="rb"))
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
            cast(Any, source), read_across_frames=True
        )
        return cast(_Readable, reader)
    if magic.startswith((b"BZh", b"\xfd7zXZ")):
        raise refused("a layer uses a compression other than gzip or zstd")
    return source


def split_path(name: str) -> tuple[str, ...]:
    """The components of an entry's name, rooted; empty for the root itself.

    A leading ``/`` and ``./`` are dropped. Raises InvalidRequest naming the entry for ``..``,
    NUL, an over-long name or component.
    """
    if "\0" in name:
        raise refused(f"entry {name[:80]!r} has a NUL in its name", entry=name[:256])
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise refused(f"entry {name[:80]!r} leaves the image", entry=name[:256])
    if len(_raw(name)) > MAX_PATH or any(len(_raw(part)) > 255 for part in parts):
        raise refused(f"entry {name[:80]!r} has too long a name", entry=name[:256])
    return parts


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def entries(archive: tarfile.TarFile) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """The entries with their positions, without keeping them all as tarfile does."""
    for index, info in enumerate(archive):
        vars(archive)["members"].clear()
        if info.size < 0:  # a PAX record says so; it would count against others
            raise refused(f"entry {info.name[:80]!r} has a negative size", entry=info.name[:256])
        yield index, info
