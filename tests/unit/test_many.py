"""Ten thousand snapshots: a start and a list do nothing for each of them that is worth a name."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import FrameType

import pytest

from crash.many import make_many
from stillframe.api.schemas.snapshots import SnapshotAnswer, respond_snapshots
from stillframe.model.values import (
    CompressionAlgorithm,
    CompressionConfig,
    CompressionState,
    Snapshot,
)
from stillframe.store.paths import DataDirectory, Payload
from support.engine import make_engine, open_engine


def functions_called(work: Callable[[], object]) -> int:
    """How many functions written in Python the work calls: its weight, whatever the machine."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def shortest(work: Callable[[], object]) -> float:
    """Processor seconds of the fastest of a few tries."""
    tries = []
    for _ in range(5):
        began = time.process_time()
        work()
        tries.append(time.process_time() - began)
    return min(tries)


async def test_a_start_looks_at_no_file_of_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_many(tmp_path, 200, payloads=False)
    looked: list[str] = []
    path_of = DataDirectory.snapshot

    def counted(self: DataDirectory, snapshot_id: str) -> Payload:
        looked.append(snapshot_id)
        return path_of(self, snapshot_id)

    monkeypatch.setattr(DataDirectory, "snapshot", counted)
    engine = make_engine(tmp_path)
    await engine.open()
    try:
        assert len(engine.list_snapshots()) == 200
        engine.metrics()
        assert looked == []
    finally:
        await engine.close()


async def test_the_lineage_of_one_looks_at_nobody_who_shares_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_many(tmp_path, 200)
    looked: list[str] = []
    path_of = DataDirectory.snapshot

    def counted(self: DataDirectory, snapshot_id: str) -> Payload:
        looked.append(snapshot_id)
        return path_of(self, snapshot_id)

    monkeypatch.setattr(DataDirectory, "snapshot", counted)
    async with open_engine(tmp_path) as engine:
        chosen = engine.list_snapshots()[100]
        told = await engine.lineage(chosen.id)
        assert told.snapshot.exclusive_bytes
        assert set(looked) == {chosen.id}


async def test_a_filter_costs_next_to_nothing_for_what_it_leaves_out(tmp_path: Path) -> None:
    make_many(tmp_path, 1000, payloads=False)
    engine = make_engine(tmp_path)
    try:
        calls = functions_called(
            lambda: respond_snapshots(engine.list_snapshots(tags={"number": "7"}))
        )
        assert 1000 < calls < 2000
    finally:
        await engine.close()


async def test_a_long_list_is_written_in_one_go(tmp_path: Path) -> None:
    make_many(tmp_path, 500, payloads=False)
    engine = make_engine(tmp_path)
    try:
        found = engine.list_snapshots()
        fresh = [replace(one, pinned=True) for one in found]
        respond_snapshots(fresh[:1])
        assert functions_called(lambda: respond_snapshots(fresh)) < 10 * len(fresh)
        together = shortest(lambda: respond_snapshots(fresh))
        one_by_one = shortest(lambda: [SnapshotAnswer.of(one).plain() for one in found])
        assert together < one_by_one / 20
    finally:
        await engine.close()


def test_a_listed_snapshot_is_told_as_one_alone(tmp_path: Path) -> None:
    make_many(tmp_path, 1, payloads=False)
    engine = make_engine(tmp_path)
    (plain,) = engine.list_snapshots()
    engine.context.records.close()
    rich: Snapshot = replace(
        plain,
        created_at=datetime(2026, 1, 1, 3, tzinfo=timezone(timedelta(hours=2))),
        expires_at=datetime(2027, 1, 1, microsecond=5, tzinfo=UTC),
        tags={"ü": '"'}, timings_ms={"total": 1.5}, pause_ms=0.0, pinned=True, damaged="it is",
        compression=CompressionConfig(True, CompressionAlgorithm.LZ4, 0),
        compression_state=CompressionState.COMPRESSED,
        compressed_size_bytes=1, uncompressed_size_bytes=2,
    )  # fmt: skip
    answered = json.loads(bytes(respond_snapshots([plain, rich]).body))
    assert answered == [SnapshotAnswer.of(plain).plain(), SnapshotAnswer.of(rich).plain()]
    renamed = replace(plain, name="another")
    assert json.loads(bytes(respond_snapshots([renamed]).body))[0]["name"] == "another"
