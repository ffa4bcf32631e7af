"""Damage to a payload is found and located, never raised, and nothing is changed by looking.

The numbers are those of the fault catalogue: F45, F47 and F60.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.host.files import create_sparse, remove_tree
from stillframe.model.errors import DamagedData, NotFound
from stillframe.model.units import MIB
from stillframe.model.values import CompressionAlgorithm, CompressionConfig
from stillframe.store.compression import compress
from stillframe.store.manifest import (
    EXTENT,
)
from stillframe.store.paths import Payload
from stillframe.store.payloads import (
    check,
    seal,
    switch_to_compressed,
)
from stillframe.store.verification import Depth, verify
from support.payloads import (
    broken_reads,
    flip,
    make_payload,
    noise,
    verified,
    write_pieces,
)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return make_payload(tmp_path / "payload")


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


FILES = ["memory", "devices", "overlay.raw", "memory.blake3", "overlay.raw.blake3", "manifest.json"]


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(FILES), st.integers(0, 2**40))
def test_f47_a_flipped_bit_is_located(name: str, chosen: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        payload = make_payload(Path(directory, "payload"))
        path = payload.directory / name
        bit = chosen % (path.stat().st_size * 8)
        flip(path, bit)
        (damage,) = verified(payload).damage
        assert damage.file == name
        if name in ("memory", "overlay.raw"):
            assert damage.offset <= bit // 8 < damage.offset + damage.length
            assert damage.length <= EXTENT
        if name in ("devices", "manifest.json"):
            with pytest.raises(DamagedData) as caught:
                check(payload)
            assert caught.value.facts["file"] == name


def test_f47_neighbouring_damage_is_one_place(payload: Payload) -> None:
    with payload.memory.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(3 * EXTENT))  # lost, as by a hole
        file.seek(2 * MIB + EXTENT)
        file.write(b"where nothing was")
    found = verified(payload)
    places = [(d.file, d.offset, d.length) for d in found.damage]
    assert places == [("memory", MIB, 3 * EXTENT), ("memory", 2 * MIB + EXTENT, EXTENT)]
    assert found.damaged_bytes == 4 * EXTENT


@pytest.mark.parametrize(
    ("name", "bad"), [("memory", MIB + 3 * EXTENT + 9), ("overlay.raw", 70_000)]
)
def test_f45_a_bad_sector_is_located(
    payload: Payload, monkeypatch: pytest.MonkeyPatch, name: str, bad: int
) -> None:
    broken_reads(monkeypatch, payload.directory / name, bad)
    (damage,) = verified(payload).damage
    assert (damage.file, damage.offset, damage.length) == (name, bad // EXTENT * EXTENT, EXTENT)
    assert "cannot be read" in damage.reason


def test_f45_device_state_that_cannot_be_read_is_damage(
    payload: Payload, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_reads(monkeypatch, payload.devices, 100)
    with pytest.raises(DamagedData, match="devices cannot be read"):
        check(payload)
    (damage,) = verified(payload, Depth.MANIFEST).damage
    assert damage.file == "devices"


def test_f45_a_table_that_cannot_be_read_is_damage(
    payload: Payload, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_reads(monkeypatch, payload.table("memory"), 100)
    (damage,) = verified(payload).damage
    assert damage.file == "memory.blake3"


def test_a_file_that_shrinks_while_it_is_verified_is_damage(payload: Payload) -> None:
    steps = verify(payload, Depth.FULL)
    next(steps)
    os.truncate(payload.memory, MIB + 5000)
    *_, last = steps
    assert {damage.file for damage in last.damage} == {"memory"}
    assert last.damage[0].offset == MIB


@pytest.mark.parametrize("name", ["memory", "devices", "overlay.raw", "memory.blake3"])
def test_a_missing_file_hides_no_other_damage(payload: Payload, name: str) -> None:
    (payload.directory / name).unlink()
    flip(payload.overlay if name != "overlay.raw" else payload.memory, 8 * 66_000)
    assert len(verified(payload).damage) == 2


def test_the_depth_decides_what_is_read(payload: Payload) -> None:
    flip(payload.memory, 8 * (MIB + 5))
    assert verified(payload, Depth.MANIFEST).damage == ()
    assert verified(payload, Depth.SAMPLE, share=1.0).damage == verified(payload).damage != ()


def test_a_sample_reads_its_share_of_the_data_and_the_seed_chooses(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    write_pieces(payload.memory, 200 * MIB, [(20 * MIB, noise(40 * MIB))])
    seal(payload, {})
    for start in range(20 * MIB, 60 * MIB, MIB):
        flip(payload.memory, 8 * start)
    samples = [verified(payload, Depth.SAMPLE, share=0.1, seed=seed) for seed in (1, 1, 2)]
    assert [s.total_bytes for s in samples] == [4 * MIB] * 3
    places = [[d.offset for d in s.damage] for s in samples]
    assert places[0] == places[1] != places[2]
    assert len(places[0]) == 4


def test_a_sample_looks_where_data_should_be(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    write_pieces(payload.memory, 16 * MIB, [(8 * MIB, noise(MIB))])
    seal(payload, {})
    payload.memory.unlink()
    create_sparse(payload.memory, 16 * MIB)
    (damage,) = verified(payload, Depth.SAMPLE, share=0.01).damage
    assert (damage.offset, damage.length) == (8 * MIB, MIB)


def test_progress_is_told_with_its_speed(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    write_pieces(payload.memory, 40 * MIB, [(0, noise(30 * MIB))])
    seal(payload, {})
    seconds = iter(range(1000))
    steps = list(verify(payload, Depth.FULL, clock=lambda: float(next(seconds))))
    assert len(steps) > 4
    checked = [step.checked_bytes for step in steps]
    assert checked == sorted(checked)
    assert steps[0].checked_bytes == 0
    assert steps[-1].checked_bytes == steps[-1].total_bytes == 30 * MIB
    assert steps[-1].bytes_per_second == 30 * MIB / steps[-1].seconds


def test_verifying_can_be_broken_off(payload: Payload) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    steps = verify(payload, Depth.FULL)
    next(steps)
    steps.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_so_much_damage_is_counted_and_the_first_places_named(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    create_sparse(payload.memory, 3000 * EXTENT)
    seal(payload, {})
    with payload.memory.open("r+b") as file:
        for number in range(0, 3000, 2):
            file.seek(number * EXTENT)
            file.write(b"x")
    found = verified(payload)
    assert found.damaged_bytes == 1500 * EXTENT
    assert len(found.damage) == 1000


def test_verifying_changes_nothing(payload: Payload) -> None:
    flip(payload.memory, 4000)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in payload.directory.iterdir()}
    verified(payload)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in payload.directory.iterdir()}
    assert before == after


def test_f60_compressing_or_deleting_meanwhile_is_no_damage(
    payload: Payload, scratch: Path
) -> None:
    algorithm = CompressionAlgorithm.ZSTD
    final = payload.compressed(algorithm)
    steps = verify(payload, Depth.FULL)
    next(steps)
    compress(payload.memory, payload.being_built(final), CompressionConfig(True, algorithm))
    next(steps)
    switch_to_compressed(payload, algorithm)
    *_, last = steps
    assert (last.damage, last.checked_bytes) == ((), last.total_bytes)

    shutil.copytree(payload.directory, scratch / "copy")
    copy = Payload(scratch / "copy")
    steps = verify(copy, Depth.FULL)
    next(steps)
    remove_tree(copy.directory)
    *_, last = steps
    assert (last.damage, last.checked_bytes) == ((), last.total_bytes)
    with pytest.raises(NotFound):
        verified(copy)
