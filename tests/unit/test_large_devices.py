"""Device state that holds the guest's memory too, as that of vz does, is larger than 64 MiB."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.host.files import create_sparse
from stillframe.model.errors import DamagedData, InvalidRequest
from stillframe.model.values import CompressionAlgorithm, CompressionConfig
from stillframe.store.compression import compress
from stillframe.store.manifest import MAX_SMALL, file_entries, read_manifest
from stillframe.store.paths import Payload
from stillframe.store.payloads import check, seal, share_memory, switch_to_compressed
from stillframe.store.verification import Depth
from support.archives import archive
from support.payloads import flip, noise, verified

SIZE = MAX_SMALL + 100_000


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    """An empty memory image, and state with something at its start and its end."""
    made = Payload(tmp_path / "payload")
    made.directory.mkdir()
    create_sparse(made.memory, 4 << 20)
    create_sparse(made.devices, SIZE)
    with made.devices.open("r+b") as file:
        file.write(noise(100_000))
        file.seek(SIZE - 100_000)
        file.write(noise(100_000))
    made.overlay.write_bytes(b"o" * 4096)
    seal(made, {"hypervisor": "vz"})
    return made


def test_it_has_a_digest_table_and_damage_in_it_is_found(payload: Payload) -> None:
    entry = file_entries(check(payload))["devices"]
    assert (entry.size, entry.table, entry.blake3) == (SIZE, "devices.blake3", None)
    assert verified(payload, Depth.FULL).damage == ()
    flip(payload.devices, 8 * (SIZE - 5))
    found = verified(payload, Depth.FULL).damage
    assert [one.file for one in found] == ["devices"]
    with payload.devices.open("r+b") as file:
        file.truncate(SIZE - 1)
    with pytest.raises(DamagedData, match="devices"):
        check(payload)


def test_whoever_shares_the_memory_has_the_table_too(payload: Payload, tmp_path: Path) -> None:
    other = Payload(tmp_path / "other")
    other.directory.mkdir()
    tables = share_memory(payload, other)
    assert set(tables) == {"memory", "devices"}
    seal(other, {"hypervisor": "vz"}, tables)
    mine, others = (file_entries(read_manifest(one.manifest)) for one in (payload, other))
    assert mine["devices"] == others["devices"]
    assert verified(other, Depth.FULL).damage == ()


def test_compressing_the_memory_leaves_it_alone(payload: Payload) -> None:
    before = payload.devices.stat()
    algorithm = CompressionAlgorithm.ZSTD
    compress_memory(payload, algorithm)
    after = payload.devices.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
    assert payload.compressed(algorithm).exists()
    assert verified(payload, Depth.FULL).damage == ()


def compress_memory(payload: Payload, algorithm: CompressionAlgorithm) -> None:
    final = payload.being_built(payload.compressed(algorithm))
    compress(payload.memory, final, CompressionConfig(True, algorithm))
    switch_to_compressed(payload, algorithm)


def test_it_is_not_exported(payload: Payload) -> None:
    with pytest.raises(InvalidRequest, match="cannot be exported") as refused:
        archive(payload)
    assert "on the Mac that saved it" in str(refused.value.hint)
