"""Compression through the official SDK: asked for, by policy, of a standby; and what it answers."""

from __future__ import annotations

from typing import Any

from hypeman import Hypeman

from support.contract import Maker, Refused
from support.server import eventually_empty, run_in

ZSTD: Any = {"enabled": True, "algorithm": "zstd", "level": 3}


def wait_compressed(sdk: Hypeman, snapshot_id: str) -> None:
    """Look until the server says that it is done, with whatever end."""

    def unfinished() -> list[str]:
        state = sdk.snapshots.get(snapshot_id).compression_state
        return ["compressing"] if state == "compressing" else []

    eventually_empty(unfinished)
    done = sdk.snapshots.get(snapshot_id)
    assert done.compression_state == "compressed", done.compression_error


def test_a_compressed_snapshot_says_so_and_forks_as_before(sdk: Hypeman, make: Maker) -> None:
    made = make()
    run_in(sdk, made.id, "set", "who", "source")
    taken = sdk.instances.snapshots.create(made.id, kind="Standby", compression=ZSTD)
    assert taken.compression_state == "compressing"
    assert taken.compression is not None
    assert (taken.compression.algorithm, taken.compression.level) == ("zstd", 3)
    wait_compressed(sdk, taken.id)
    done = sdk.snapshots.get(taken.id)
    assert done.compressed_size_bytes is not None
    assert done.uncompressed_size_bytes is not None
    assert 0 < done.compressed_size_bytes < done.uncompressed_size_bytes
    assert done.size_bytes < taken.size_bytes
    assert done.compression_error is None
    fork = sdk.snapshots.fork(taken.id, name=f"{made.name}-fork")
    assert run_in(sdk, fork.id, "get", "who").strip() == "source"
    assert sdk.snapshots.get(taken.id) == done
    sdk.snapshots.delete(taken.id)
    assert run_in(sdk, fork.id, "get", "who").strip() == "source"


def test_an_instances_policy_holds_unless_the_request_says_otherwise(
    sdk: Hypeman, make: Maker
) -> None:
    policy: Any = {"compression": {"enabled": True, "algorithm": "lz4"}}
    made = make(snapshot_policy=policy)
    by_policy = sdk.instances.snapshots.create(made.id, kind="Standby")
    assert by_policy.compression is not None
    assert (by_policy.compression.algorithm, by_policy.compression.level) == ("lz4", 0)
    wait_compressed(sdk, by_policy.id)
    off: Any = {"enabled": False}
    raw = sdk.instances.snapshots.create(made.id, kind="Standby", compression=off)
    assert (raw.compression_state, raw.compression) == ("none", None)


def test_a_standby_is_compressed_and_restored(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    made = make()
    run_in(sdk, made.id, "set", "who", "source")
    for delay in (None, "1h"):  # at once, and called off by the restore
        options: Any = {} if delay is None else {"compression_delay": delay}
        asleep = sdk.instances.standby(made.id, compression=ZSTD, **options)
        assert asleep.state == "Standby"
        refused(409, "invalid_state", sdk.instances.standby, made.id, compression=ZSTD)
        assert sdk.instances.restore(made.id).state == "Running"
        assert run_in(sdk, made.id, "get", "who").strip() == "source"
