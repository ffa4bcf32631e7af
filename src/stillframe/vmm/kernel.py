"""The uncompressed kernel that Firecracker boots, out of the bzImage that distributions ship.

The layout is that of the Linux/x86 boot protocol (Documentation/arch/x86/boot.rst,
``payload_offset`` since protocol 2.08): the compressed ELF file lies in the protected-mode code.
"""

from __future__ import annotations

import lzma
import os
import struct
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import zstandard

from stillframe.model.errors import HostFailure, NotSupported

_ELF = b"\x7fELF"
_HEADER = struct.Struct("<4sH")  # at 0x202: "HdrS" and the protocol's version
_PAYLOAD = struct.Struct("<II")  # at 0x248: offset and length of the payload
_SECTOR = 512
_DECOMPRESS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x28\xb5\x2f\xfd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    b"\xfd7zX": lambda data: lzma.LZMADecompressor().decompress(data),
    b"\x1f\x8b\x08": lambda data: zlib.decompressobj(31).decompress(data),
}


def uncompressed_kernel(kernel: Path) -> Path:
    """``kernel`` itself if it is an ELF file, else the one within, kept beside it for next time.

    Raises NotSupported for a kernel that cannot be read so, HostFailure.
    """
    kept = kernel.with_name(f"{kernel.name}.elf")
    if kept.exists():
        return kept
    try:
        data = kernel.read_bytes()
        if data.startswith(_ELF):
            return kernel
        building = kept.with_name(f".{kept.name}.{uuid.uuid4().hex}")
        try:
            building.write_bytes(_within(data))
            building.replace(kept)  # whoever is last wins: they are all alike
        finally:
            building.unlink(missing_ok=True)
    except OSError as error:
        raise HostFailure(
            f"the kernel cannot be unpacked: {os.strerror(error.errno or 0)}"
        ) from error
    return kept


def _within(image: bytes) -> bytes:
    """The ELF file in a bzImage. Raises NotSupported."""
    try:
        magic, protocol = _HEADER.unpack_from(image, 0x202)
        offset, length = _PAYLOAD.unpack_from(image, 0x248)
    except struct.error as error:
        raise NotSupported("the kernel is neither an ELF file nor a bzImage") from error
    if magic != b"HdrS" or protocol < 0x208:
        raise NotSupported("the kernel is neither an ELF file nor a bzImage of protocol 2.08")
    start = ((image[0x1F1] or 4) + 1) * _SECTOR + offset
    payload = image[start : start + length]
    for signature, decompress in _DECOMPRESS.items():
        if payload.startswith(signature):
            try:
                found = decompress(payload)
            except (zstandard.ZstdError, lzma.LZMAError, zlib.error) as error:
                raise NotSupported(f"the kernel's payload is damaged: {error}") from error
            if found.startswith(_ELF):
                return found
    raise NotSupported("the kernel's payload is compressed in a way that is not known here")
