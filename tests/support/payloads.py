"""Payloads to damage, compress and move: sparse files made of a few pieces."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import strategies as st

from stillframe.host.files import create_sparse
from stillframe.model.units import KIB, MIB
from stillframe.store.digests import NO_DATA
from stillframe.store.manifest import EXTENT
from stillframe.store.paths import Payload
from stillframe.store.payloads import seal
from stillframe.store.verification import Depth, Verification, verify

Pieces = list[tuple[int, bytes]]
LIMIT = 3 * MIB + 5000  # largest size the strategies make: a few frames and a short last one


def write_pieces(path: Path, size: int, pieces: Iterable[tuple[int, bytes]]) -> None:
    """A new sparse file of ``size`` bytes with data at some offsets."""
    create_sparse(path, size)
    with path.open("r+b") as file:
        for offset, data in pieces:
            file.seek(min(offset, size))
            file.write(data[: max(0, size - offset)])


def noise(length: int, seed: int = 0) -> bytes:
    """Bytes that do not compress, always the same."""
    return random.Random(seed).randbytes(length)


sizes = st.one_of(
    st.integers(0, LIMIT),
    st.sampled_from([0, 1, 4096, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, MIB, MIB + 1, 2 * MIB]),
)
contents = st.one_of(
    st.binary(min_size=1, max_size=200),
    st.builds(noise, st.integers(1, 200 * KIB), st.integers(0, 5)),
    st.builds(bytes, st.integers(1, 70 * KIB)),  # zeros that are data
)
pieces = st.lists(st.tuples(st.integers(0, LIMIT), contents), max_size=6)


def make_payload(
    directory: Path, *, memory: tuple[int, Pieces] | None = None, seed: int = 1
) -> Payload:
    """A sealed payload: memory of some frames with holes, devices, a disk."""
    payload = Payload(directory)
    directory.mkdir(mode=0o700)
    size, parts = memory or (
        4 * MIB + 4096,
        [(0, noise(70 * KIB, seed)), (MIB, b"text " * 50_000), (3 * MIB + 777, noise(5000, seed))],
    )
    write_pieces(payload.memory, size, parts)
    write_pieces(payload.devices, 5000, [(0, noise(5000, seed + 1))])
    write_pieces(payload.overlay, 2 * MIB, [(64 * KIB, noise(80 * KIB, seed + 2))])
    seal(payload, {"hypervisor": "fake"})
    return payload


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def listing(directory: Path) -> list[str]:
    """The names in a directory."""
    return sorted(path.name for path in directory.iterdir())


def expected_table(path: Path) -> bytes:
    """The table by its definition, extent by extent."""
    data = path.read_bytes()
    extents = [data[at : at + EXTENT] for at in range(0, len(data), EXTENT)]
    return b"".join(blake3(e).digest() if any(e) else NO_DATA for e in extents)


def verified(payload: Payload, depth: Depth = Depth.FULL, **options: object) -> Verification:
    """The result of verifying a payload."""
    *_, last = verify(payload, depth, **options)  # type: ignore[arg-type]
    return last


def broken_reads(monkeypatch: pytest.MonkeyPatch, path: Path, bad: int) -> None:
    """Make reading the byte ``bad`` of a file fail, as a bad sector does."""
    inode, pread = path.stat().st_ino, os.pread

    def read(fd: int, length: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == inode and offset <= bad < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", read)
