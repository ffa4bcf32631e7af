"""Snapshots through the official SDK: capture, restore in place, fork, filters, refusals."""

from __future__ import annotations

from typing import Any

from hypeman import Hypeman

from support.contract import Maker, Refused

NO_ID = "z" * 24


def test_a_running_instance_is_captured_and_runs_on(sdk: Hypeman, make: Maker) -> None:
    made = make()
    taken = sdk.instances.snapshots.create(
        made.id, kind="Standby", name="first", tags={"why": "test"}
    )
    assert (taken.kind, taken.name, taken.tags) == ("Standby", "first", {"why": "test"})
    assert (taken.source_instance_id, taken.source_instance_name) == (made.id, made.name)
    assert taken.size_bytes > 0
    assert sdk.instances.get(made.id).state == "Running"
    assert sdk.snapshots.get(taken.id).id == taken.id


def test_lists_filter_exactly(sdk: Hypeman, make: Maker) -> None:
    one, two = make(), make()
    create = sdk.instances.snapshots.create
    first = create(one.id, kind="Standby", name="same", tags={"n": "1"})
    second = create(two.id, kind="Standby", name="same", tags={"n": "2", "m": "x"})
    sdk.instances.stop(two.id)
    third = create(two.id, kind="Stopped")

    def ids(**filters: Any) -> list[str]:
        return [snapshot.id for snapshot in sdk.snapshots.list(**filters)]

    assert ids(name="same") == [first.id, second.id]
    assert ids(source_instance_id=two.id) == [second.id, third.id]
    assert ids(kind="Stopped") == [third.id]
    assert ids(tags={"n": "2", "m": "x"}) == [second.id]
    assert ids(tags={"n": "1", "m": "x"}) == []


def test_an_instance_goes_back_to_its_snapshot(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    made = make()
    taken = sdk.instances.snapshots.create(made.id, kind="Standby")
    back = sdk.instances.snapshots.restore
    refused(409, "invalid_state", back, taken.id, id=made.id)
    sdk.instances.stop(made.id)
    other = make()
    sdk.instances.stop(other.id)
    refused(400, "invalid_request", back, taken.id, id=other.id)
    refused(400, "invalid_request", back, taken.id, id=made.id, target_hypervisor="qemu")
    restored = back(taken.id, id=made.id)
    assert (restored.id, restored.name) == (made.id, made.name)
    assert sdk.instances.wait(made.id, state="Running").state == "Running"


def test_a_fork_needs_neither_source_nor_snapshot_afterwards(sdk: Hypeman, make: Maker) -> None:
    made = make()
    taken = sdk.instances.snapshots.create(made.id, kind="Standby")
    sdk.instances.delete(made.id)
    fork = sdk.snapshots.fork(taken.id, name=f"{made.name}-fork")
    assert sdk.instances.wait(fork.id, state="Running").state == "Running"
    sdk.snapshots.delete(taken.id)
    assert sdk.instances.get(fork.id).state == "Running"
    assert sdk.instances.standby(fork.id).state == "Standby"


def test_a_stopped_snapshot_forks_to_a_stopped_instance(sdk: Hypeman, make: Maker) -> None:
    made = make()
    sdk.instances.stop(made.id)
    taken = sdk.instances.snapshots.create(made.id, kind="Stopped")
    fork = sdk.snapshots.fork(taken.id, name=f"{made.name}-cold")
    assert fork.state == "Stopped"
    warm = sdk.snapshots.fork(taken.id, name=f"{made.name}-warm", target_state="Running")
    assert sdk.instances.wait(warm.id, state="Running").state == "Running"


def test_snapshots_are_refused_as_documented(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    made = make()
    create = sdk.instances.snapshots.create
    create(made.id, kind="Standby", name="taken")
    refused(409, "conflict", create, made.id, kind="Standby", name="taken")
    refused(409, "conflict", create, made.id, kind="Stopped")
    refused(400, "invalid_request", create, made.id, kind="Standby", name="Not Good")
    refused(400, "Bad Request", create, made.id, kind="Warm")
    compression: Any = {"enabled": True, "algorithm": "lz4", "level": 10}
    refused(
        400,
        "invalid_snapshot_compression",
        create,
        made.id,
        kind="Standby",
        compression=compression,
    )
    refused(
        400,
        "invalid_request",
        create,
        made.id,
        kind="Stopped",
        compression={"enabled": True},
    )


def test_a_fork_is_refused_as_documented(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    made = make()
    taken = sdk.instances.snapshots.create(made.id, kind="Standby", name="base")
    fork = sdk.snapshots.fork
    refused(409, "conflict", fork, taken.id, name=made.name)
    refused(400, "invalid_request", fork, taken.id, name="Bad Name")
    refused(400, "invalid_request", fork, taken.id, name="ok", target_hypervisor="qemu")
    refused(404, "not_found", fork, NO_ID, name="ok")
    # A snapshot is known by its id only.
    refused(404, "not_found", fork, "base", name="ok")
    refused(404, "not_found", sdk.snapshots.get, "base")


def test_a_deleted_snapshot_is_gone(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    taken = sdk.instances.snapshots.create(make().id, kind="Standby")
    sdk.snapshots.delete(taken.id)
    refused(404, "not_found", sdk.snapshots.get, taken.id)
    refused(404, "not_found", sdk.snapshots.delete, taken.id)
