"""The archive: one snapshot as one stream of bytes, for another host or for keeping.

A head, then records, each a header and its stored bytes: the manifest first, other documents, the
digest tables, then the contents in frames of 1 MiB of which those of zeros are left out; at last
a trailer. Every header holds the digest of its stored bytes and a link, the digest of the link
before and of the header itself. So the chain of links vouches for all bytes before, and a transfer
can go on from any record with nothing but its position. docs/format.md has the layout.

The stream of a snapshot is always the same, whatever represents its memory; the document about it
must not tell of that either (``engine/moving/export.about_of``).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Self

from blake3 import blake3

from stillframe.model.units import KIB, MIB

VERSION = 1
HEAD = struct.pack("<8sII", b"SFARCHIV", VERSION, 0)
FRAME = MIB  # bytes of content in one record; the last of a file may have less
MAX_STORED = FRAME + 8 * KIB  # zstd adds a little to what it cannot compress
RAW, ZSTD = 0, 1  # how a record's content is stored
TRAILER = struct.Struct("<QQ32s")  # records, bytes of content, link of the record before
_FIELDS = struct.Struct("<BBHIIIQ32s")
HEADER_LENGTH = _FIELDS.size + 32


class Part(IntEnum):
    """What a record belongs to; records come in this order. These are all the files there can be.

    The digest table of a file has the number of the file less 16.
    """

    MANIFEST = 1
    ABOUT = 2
    IMAGE = 3
    BOOT = 4
    MEMORY_TABLE = 16
    OVERLAY_TABLE = 18
    ROOT_TABLE = 20
    KERNEL_TABLE = 22
    INITRD_TABLE = 23
    MEMORY = 32
    DEVICES = 33
    OVERLAY = 34
    ROOT = 36
    CONFIG = 37
    KERNEL = 38
    INITRD = 39
    TRAILER = 255


PARTS = frozenset(int(part) for part in Part)
DOCUMENTS = (Part.MANIFEST, Part.ABOUT, Part.IMAGE, Part.BOOT)
PAYLOAD_FILES = {"memory": Part.MEMORY, "devices": Part.DEVICES, "overlay.raw": Part.OVERLAY}
IMAGE_FILES = {"root.squashfs": Part.ROOT, "config.json": Part.CONFIG}
BOOT_FILES = {"kernel": Part.KERNEL, "initrd": Part.INITRD}
SMALL_FILES = ("devices", "config.json")  # one digest as a whole, no table


def table_part(part: Part) -> Part:
    """The part that is the digest table of a file."""
    return Part(part - 16)


@dataclass(frozen=True, slots=True)
class Header:
    """What precedes the stored bytes of a record.

    ``stored`` and ``length`` are the bytes that follow and the bytes of content they hold,
    ``offset`` is where the content lies in its file, ``digest`` the BLAKE3 of the stored bytes.
    """

    part: int
    encoding: int
    stored: int
    length: int
    offset: int
    digest: bytes

    def encode(self, link_before: bytes) -> bytes:
        """The header's bytes; the last 32 are its link."""
        fields = _FIELDS.pack(
            self.part, self.encoding, 0, self.stored, self.length, 0, self.offset, self.digest
        )
        return fields + blake3(link_before + fields).digest()

    @classmethod
    def decode(cls, data: bytes, link_before: bytes) -> Self | None:
        """A header from its bytes; None when it does not follow ``link_before``."""
        part, encoding, _, stored, length, _, offset, digest = _FIELDS.unpack_from(data)
        header = cls(part, encoding, stored, length, offset, digest)
        return header if header.encode(link_before) == data else None


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two records, from which a transfer can go on; at first, before the head.

    ``offset`` is the byte of the stream, ``records`` and ``data`` count the records and the bytes
    of content before it, ``part`` and ``part_offset`` say where the contents go on, and ``link`` is
    that of the record before.
    """

    offset: int = 0
    records: int = 0
    data: int = 0
    part: int = 0
    part_offset: int = 0
    link: bytes = blake3(HEAD).digest()

    def after_head(self) -> Position:
        """The position after the head."""
        return replace(self, offset=len(HEAD))

    def after(self, header: Header, encoded: bytes) -> Position:
        """The position after a record."""
        return Position(
            self.offset + len(encoded) + header.stored,
            self.records + 1,
            self.data + header.length,
            header.part,
            header.offset + header.length,
            encoded[-32:],
        )
