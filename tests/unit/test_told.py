"""What an archive tells of its instance must be good for all that a fork may be asked for."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, ForkRequest
from stillframe.engine.moving.export import about_of
from stillframe.model.errors import InvalidRequest
from stillframe.model.states import InstanceState
from stillframe.model.units import MIB, parse_duration
from stillframe.model.values import CompressionConfig, Snapshot, SnapshotPolicy
from stillframe.store.archive_export import export
from stillframe.store.manifest import read_manifest
from stillframe.store.paths import Payload
from stillframe.store.payloads import seal
from support.compressing import LIVE, ZSTD, captured
from support.engine import ask
from support.moving import take


def told(engine: Engine, made: Snapshot, change: dict[str, Any], **words: Any) -> bytes:
    """An archive that tells of another template, and other words of the snapshot itself."""
    about = about_of(made)
    about["snapshot"]["template"].update(change)
    about["snapshot"].update(words)
    return b"".join(export(engine.context.data.snapshot(made.id), about=about))


async def test_a_policy_that_comes_along_serves_every_fork(engine: Engine) -> None:
    made = await captured(engine)
    longest = parse_duration("2555555h")
    policy = {
        "compression": {"enabled": True, "algorithm": "zstd", "level": 19},
        "standby_compression_delay": f"P{longest.days}DT{longest.seconds}S",
    }
    arrived = await take(engine, told(engine, made, {"snapshot_policy": policy}, name="second"))
    fork = await engine.fork_snapshot(arrived.id, ForkRequest("fork"))
    assert fork.snapshot_policy is not None
    assert fork.snapshot_policy.standby_compression_delay == longest
    asleep = await engine.standby(fork.id)
    assert asleep.state is InstanceState.STANDBY
    await engine.restore(fork.id)
    assert await ask(engine, fork.id, "get", "who") == "source"
    await engine.snapshot(fork.id, kind=LIVE)


async def test_a_policy_with_a_level_that_is_not_used_is_taken(engine: Engine) -> None:
    made = await captured(engine)
    policy = {"compression": {"enabled": False, "level": 99}}
    arrived = await take(engine, told(engine, made, {"snapshot_policy": policy}, name="second"))
    fork = await engine.fork_snapshot(arrived.id, ForkRequest("fork"))
    await engine.standby(fork.id)


@pytest.mark.parametrize(
    "policy",
    [
        SnapshotPolicy(CompressionConfig(True, ZSTD.algorithm, 99)),
        SnapshotPolicy(standby_compression_delay=timedelta(seconds=-5)),
        SnapshotPolicy(standby_compression_delay=timedelta.max),
    ],
)
async def test_a_person_is_refused_the_same_policy(engine: Engine, policy: SnapshotPolicy) -> None:
    request = CreateRequest("source", "stillframe/base", snapshot_policy=policy)
    with pytest.raises(InvalidRequest):
        await engine.create(request)
    assert engine.list_instances() == []


@pytest.mark.parametrize(
    ("field", "size"),
    [("memory_bytes", 2 * MIB), ("overlay_bytes", MIB), ("overlay_bytes", 32 * MIB + 4096)],
)
async def test_sizes_that_nobody_could_ask_for_are_refused(
    engine: Engine, tmp_path: Path, field: str, size: int
) -> None:
    made = await captured(engine)
    payload = Payload(tmp_path / "resized")
    shutil.copytree(engine.context.data.snapshot(made.id).directory, payload.directory)
    manifest = read_manifest(payload.manifest)
    facts = {key: manifest[key] for key in manifest.keys() - {"format", "files", "blake3"}}
    for left in (payload.manifest, *payload.directory.glob("*.blake3")):
        left.unlink()
    file = payload.memory if field == "memory_bytes" else payload.overlay
    os.truncate(file, size)
    seal(payload, {**facts, field: size} if field in facts else facts)
    about = about_of(made)
    about["snapshot"].update(name="second")
    about["snapshot"]["template"][field] = size
    with pytest.raises(InvalidRequest, match="sizes"):
        await take(engine, b"".join(export(payload, about=about)))
    assert [snapshot.id for snapshot in engine.list_snapshots()] == [made.id]
