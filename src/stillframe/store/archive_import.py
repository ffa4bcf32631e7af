"""Taking an archive in: fed with bytes as they come, verified before a byte is kept.

What arrives is believed in nothing: lengths are bounded before they are used, contents are expanded
to at most one frame, file names come from a table of ours, and everything is written into one new
directory through its descriptor, never through a link. The manifest is written last, so what is not
complete can never be taken for a snapshot.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blake3 import blake3

from stillframe.host.files import create_new, read_exactly, write_fully, write_sparse
from stillframe.model.errors import DamagedData, InvalidRequest
from stillframe.model.values import CompressionAlgorithm
from stillframe.store.archive import (
    BOOT_FILES,
    DOCUMENTS,
    FRAME,
    HEAD,
    HEADER_LENGTH,
    IMAGE_FILES,
    MAX_STORED,
    PARTS,
    PAYLOAD_FILES,
    RAW,
    SMALL_FILES,
    TRAILER,
    ZSTD,
    Header,
    Part,
    Position,
    table_part,
)
from stillframe.store.compression import decode
from stillframe.store.digests import DIGEST, extent_digests, spans, table_digest, table_size
from stillframe.store.manifest import (
    EXTENT,
    MAX_SMALL,
    FileEntry,
    file_entries,
    parse_manifest,
    table_name,
)

_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Limits:
    """What an import may take: ``size`` of all files, and ``data``, the part that is not zeros.

    Both in bytes.
    """

    size: int
    data: int


@dataclass(frozen=True, slots=True)
class Imported:
    """A complete import: its documents, bytes of all files, and what came along.

    That are the names of the image's and the boot pair's files in the directory.
    """

    manifest: dict[str, Any]
    about: dict[str, Any] | None
    image: dict[str, Any] | None
    boot: dict[str, Any] | None
    image_files: tuple[str, ...]
    boot_files: tuple[str, ...]
    size: int


@dataclass(slots=True)
class _File:
    """A file being written, what vouches for it, and how far its contents have come."""

    name: str
    fd: int
    size: int
    digest: str | None = None  # of the whole file, for small files and digest tables
    table: _File | None = None
    done: int = 0
    verified: bool = False


class Importer:
    """Takes one archive into one new directory. Used by one thread at a time.

    Feed it with the bytes as they arrive, then ``finish``. After a dropped connection ``rewind``
    says from which position to go on. Leaving the ``with`` block without ``finish`` removes all.
    """

    def __init__(self, directory: Path, limits: Limits) -> None:
        """Make the new ``directory`` (mode 0700). Raises OSError when it exists."""
        directory.mkdir(mode=0o700)
        with contextlib.ExitStack() as undo:
            undo.callback(directory.rmdir)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._dir_fd = os.open(directory, flags)
            undo.pop_all()
        self._directory, self._limits = directory, limits
        self._files: dict[Part, _File] = {}
        self._created: list[str] = []
        self._manifest: dict[str, Any] = {}
        self._manifest_bytes = b""
        self._about: dict[str, Any] | None = None
        self._image: dict[str, Any] | None = None
        self._boot: dict[str, Any] | None = None
        self._size = 0
        self._buffer = bytearray()
        self._step: Callable[[bytes], None] = self._take_head
        self._needed = len(HEAD)
        self._header: Header | None = None
        self._encoded = b""
        self._failure: BaseException | None = None
        self._complete = False
        self._open = True
        self.position = Position()

    # -- the stream -------------------------------------------------------------------------------
    @property
    def complete(self) -> bool:
        """Whether the trailer has come."""
        return self._complete

    @property
    def total(self) -> int:
        """Bytes of all files, as the manifest says; 0 before it has come."""
        return self._size

    @property
    def documents_complete(self) -> bool:
        """Whether all documents have come: what follows are tables and contents."""
        return self.position.part > max(DOCUMENTS)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest; empty before it has come."""
        return self._manifest

    @property
    def about(self) -> dict[str, Any] | None:
        """What the archive says about the snapshot, if it has come."""
        return self._about

    @property
    def image(self) -> dict[str, Any] | None:
        """The manifest of the image that comes along, if it has come."""
        return self._image

    @property
    def boot(self) -> dict[str, Any] | None:
        """The manifest of the kernel and initrd that come along, if it has come."""
        return self._boot

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream, in pieces of any length.

        Raises InvalidRequest for what is no archive, is of an unknown version, breaks its rules or
        a limit; DamagedData (fact ``offset``, of the stream) for bytes that are not what was
        sent; OSError. After any of these the import can only be aborted.
        """
        if self._failure is not None:
            raise self._failure
        view = memoryview(data)
        try:
            while view:
                if self._complete:
                    raise self._damaged("has bytes after its end")
                taken = view[: self._needed - len(self._buffer)]
                self._buffer += taken
                view = view[len(taken) :]
                if len(self._buffer) == self._needed:
                    whole = bytes(self._buffer)
                    self._buffer.clear()
                    self._step(whole)
        except Exception as error:
            self._failure = error
            raise

    def rewind(self) -> Position:
        """Forget a record that came only in part; the position from which to feed again."""
        if self._failure is not None:
            raise self._failure
        self._buffer.clear()
        if self.position.offset and not self._complete:
            self._expect(self._take_header, HEADER_LENGTH)
        return self.position

    def _expect(self, step: Callable[[bytes], None], needed: int) -> None:
        self._step, self._needed = step, needed

    def _take_head(self, data: bytes) -> None:
        if data[:8] != HEAD[:8]:
            raise InvalidRequest("this is not a snapshot archive")
        if data != HEAD:
            raise InvalidRequest(
                "this archive has an unknown version",
                hint="it was made by another version of stillframe",
                version=int.from_bytes(data[8:12], "little"),
            )
        self.position = self.position.after_head()
        self._expect(self._take_header, HEADER_LENGTH)

    def _take_header(self, data: bytes) -> None:
        header = Header.decode(data, self.position.link)
        if header is None:
            raise self._damaged("has a record that does not follow the one before")
        as_it_is = header.encoding == RAW and header.stored == header.length
        good = (
            header.part in PARTS
            and header.part >= self.position.part
            and header.length <= FRAME
            and header.stored <= MAX_STORED
            and (as_it_is or header.encoding == ZSTD)
        )  # fmt: skip
        if not good:
            raise self._refused("has a record that may not be there")
        self._header, self._encoded = header, data
        self._expect(self._take_stored, header.stored)
        if header.stored == 0:
            self._take_stored(b"")

    def _take_stored(self, stored: bytes) -> None:
        header = self._header
        assert header is not None  # noqa: S101 - set with this step
        if blake3(stored).digest() != header.digest:
            raise self._damaged("has a record that does not match its digest")
        content = stored
        if header.encoding == ZSTD:
            try:
                content = decode(CompressionAlgorithm.ZSTD, stored, header.length)
            except ValueError as error:
                raise self._refused(f"has a record that cannot be expanded: {error}") from error
        self._accept(Part(header.part), header.offset, content)
        if not self._complete:
            self._expect(self._take_header, HEADER_LENGTH)
        self.position = self.position.after(header, self._encoded)

    # -- what records hold ------------------------------------------------------------------------
    def _accept(self, part: Part, offset: int, content: bytes) -> None:
        if not self._manifest and part is not Part.MANIFEST:
            raise self._refused("does not begin with a manifest")
        if part is Part.TRAILER:
            self._take_trailer(content)
        elif part in DOCUMENTS:
            if part <= self.position.part or offset:
                raise self._refused("has a document twice")
            self._take_document(part, content)
        else:
            self._take_content(part, offset, content)

    def _take_document(self, part: Part, content: bytes) -> None:
        if part is Part.ABOUT:
            try:
                about = json.loads(content.decode())
            except (ValueError, RecursionError) as error:
                raise self._refused("has a document that is not JSON") from error
            if not isinstance(about, dict):
                raise self._refused("has a document that is no object")
            self._about = about
            return
        manifest = parse_manifest(content, _MANIFEST if part is Part.MANIFEST else part.name)
        if part is Part.MANIFEST:
            self._manifest, self._manifest_bytes = manifest, content
            self._create_files(file_entries(manifest), PAYLOAD_FILES)
        elif part is Part.BOOT:
            self._boot = manifest
            self._create_files(file_entries(manifest), BOOT_FILES)
        else:
            self._image = manifest
            self._create_files(file_entries(manifest), IMAGE_FILES)

    def _create_files(self, entries: Mapping[str, FileEntry], known: Mapping[str, Part]) -> None:
        for name, entry in entries.items():
            small = name in SMALL_FILES
            good = (
                entry.blake3 is not None and entry.table is None and entry.size <= MAX_SMALL
                if small
                else entry.table is not None
            )
            if name not in known or not good:
                raise self._refused(f"has a manifest with a file {name!r} that may not be there")
            self._size += entry.size + (0 if small else table_size(entry.size))
        if self._size > self._limits.size:
            raise self._too_large("files", self._size, self._limits.size)
        for name, entry in entries.items():
            part, table = known[name], None
            if entry.table is not None:
                size = table_size(entry.size)
                table = self._create(table_part(part), entry.table, size, entry.table_blake3)
            self._create(part, name, entry.size, entry.blake3).table = table

    def _create(self, part: Part, name: str, size: int, digest: str | None) -> _File:
        fd = create_new(name, dir_fd=self._dir_fd)
        self._created.append(name)
        self._files[part] = _File(name, fd, size, digest)
        os.ftruncate(fd, size)
        return self._files[part]

    def _take_content(self, part: Part, offset: int, content: bytes) -> None:
        file, length = self._files.get(part), len(content)
        if file is None:
            raise self._refused("has contents for a file that its manifest does not list")
        in_place = offset >= file.done and offset % FRAME == 0
        if not in_place or not 0 < length == min(FRAME, file.size - offset):
            raise self._refused(f"has contents of {file.name} where they may not be")
        taken = self.position.data + length
        if taken > self._limits.data:
            raise self._too_large("contents", taken, self._limits.data)
        self._verify_before(part)
        if file.table is not None:
            self._check_hole(file, offset)
            begin = offset // EXTENT * DIGEST
            if extent_digests(content) != read_exactly(file.table.fd, table_size(length), begin):
                raise self._mismatch(file, offset)
        write_sparse(file.fd, content, offset)
        file.done = offset + length

    def _take_trailer(self, content: bytes) -> None:
        here = self.position
        if content != TRAILER.pack(here.records, here.data, here.link):
            raise self._refused("has a trailer that does not fit")
        self._verify_before(Part.TRAILER)
        self._complete = True
        self._needed = 0

    # -- verifying --------------------------------------------------------------------------------
    def _verify_before(self, part: Part) -> None:
        """Verify the files whose contents have all come, since those of ``part`` come now."""
        for number in sorted(self._files):
            file = self._files[number]
            if number < part and not file.verified:
                if file.table is not None:
                    self._check_hole(file, file.size)
                elif table_digest(file.fd) != file.digest:
                    raise self._mismatch(file, 0)
                file.verified = True

    def _check_hole(self, file: _File, end: int) -> None:
        """What was left out since the last contents must be zeros by the table too."""
        assert file.table is not None  # noqa: S101 - asked by the callers
        first, last = table_size(file.done), table_size(end)
        for start, stop in spans(first, last, FRAME):
            if read_exactly(file.table.fd, stop - start, start) != bytes(stop - start):
                raise self._mismatch(file, start // DIGEST * EXTENT)

    def _mismatch(self, file: _File, offset: int) -> DamagedData:
        return DamagedData(
            f"the archive's {file.name} does not match its digest at byte {offset}",
            file=file.name, offset=self.position.offset,
        )  # fmt: skip

    def _damaged(self, what: str) -> DamagedData:
        offset = self.position.offset
        return DamagedData(f"the archive {what}, at byte {offset} or after", offset=offset)

    def _refused(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"the archive {what}", offset=self.position.offset)

    def _too_large(self, what: str, size: int, limit: int) -> InvalidRequest:
        return InvalidRequest(
            f"the archive's {what} take {size} bytes, {limit} are allowed",
            code="archive_too_large", size=size, limit=limit,
        )  # fmt: skip

    # -- the end ----------------------------------------------------------------------------------
    def finish(self) -> Imported:
        """Make all durable and write the manifest, last. Raises DamagedData when bytes are missing.

        OSError as well; then the import can only be aborted.
        """
        if self._failure is not None:
            raise self._failure
        if not self._complete:
            raise self._damaged("ends before its trailer")
        for file in self._files.values():
            os.fsync(file.fd)
        self._write_manifest()
        self._close()
        return Imported(
            self._manifest, self._about, self._image, self._boot,
            self._arrived(IMAGE_FILES), self._arrived(BOOT_FILES), self._size,
        )  # fmt: skip

    def _arrived(self, known: Mapping[str, Part]) -> tuple[str, ...]:
        names = {file.name for file in self._files.values()}
        return tuple(n for name in known for n in (name, table_name(name)) if n in names)

    def _write_manifest(self) -> None:
        building = f".{_MANIFEST}.new"
        fd = create_new(building, dir_fd=self._dir_fd)
        self._created += [building, _MANIFEST]
        try:
            write_fully(fd, self._manifest_bytes, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(building, _MANIFEST, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
        os.fsync(self._dir_fd)

    def abort(self) -> None:
        """Remove all that was written. Does nothing after ``finish``."""
        if not self._open:
            return
        for name in self._created:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._dir_fd)
        self._close()
        with contextlib.suppress(OSError):  # not ours any more
            self._directory.rmdir()

    def _close(self) -> None:
        self._open = False
        for file in self._files.values():
            os.close(file.fd)
        os.close(self._dir_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()
