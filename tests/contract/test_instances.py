"""Instances through the official SDK: life cycle, waiting, forks, and every documented refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypeman import Hypeman, NotFoundError

from support.contract import IMAGE, Maker, Refused, body_of
from support.server import eventually_empty

NO_ID = "z" * 24


def test_an_instance_lives_through_its_whole_life(sdk: Hypeman, make: Maker) -> None:
    made = make(tags={"team": "life"}, env={"A": "1"})
    assert (made.size, made.overlay_size, made.vcpus) == ("128.0 MB", "64.0 MB", 1)
    assert (made.env, made.tags, made.has_snapshot) == ({"A": "1"}, {"team": "life"}, False)
    assert sdk.instances.get(made.name).id == sdk.instances.get(made.id[:12]).id == made.id
    assert [i.id for i in sdk.instances.list(tags={"team": "life"}, state="Running")] == [made.id]
    assert sdk.instances.list(tags={"team": "other"}) == []

    resting = sdk.instances.standby(made.id)
    assert (resting.state, resting.has_snapshot) == ("Standby", True)
    assert sdk.instances.standby(made.id).state == "Standby"
    assert sdk.instances.restore(made.id).state in ("Running", "Initializing")
    assert sdk.instances.wait(made.id, state="Running").state == "Running"
    assert sdk.instances.restore(made.id).state == "Running"

    assert sdk.instances.stop(made.id).state == "Stopped"
    assert sdk.instances.stop(made.id).state == "Stopped"
    assert sdk.instances.start(made.id).state in ("Running", "Initializing")
    assert sdk.instances.wait(made.id, state="Running").state == "Running"
    phases = sdk.instances.get(made.id).phase_durations_ms or {}
    assert {"running", "standby", "stopped"} <= set(phases)

    sdk.instances.delete(made.id)
    with pytest.raises(NotFoundError):
        sdk.instances.get(made.id)
    with pytest.raises(NotFoundError):
        sdk.instances.delete(made.id)


def test_limits_are_told_and_go_with_forks(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    network: Any = {"bandwidth_download": "1Gbps", "bandwidth_upload": "125KB/s"}
    made = make(disk_io_bps="100MB/s", network=network)
    assert made.disk_io_bps == "100.0 MB/s"
    assert made.network is not None
    told = (made.network.bandwidth_download, made.network.bandwidth_upload)
    assert told == ("119.2 MB/s", "125.0 KB/s")
    snapshot = sdk.instances.snapshots.create(made.id, kind="Standby")
    fork = sdk.snapshots.fork(snapshot.id, name=f"{made.name}-fork")
    assert (fork.disk_io_bps, fork.network) == (made.disk_io_bps, made.network)
    sdk.instances.standby(made.id)
    rows = {row.instance_id: row for row in sdk.resources.get().allocations}
    assert (rows[fork.id].disk_io_bps, rows[made.id].disk_io_bps) == (100 << 20, 0)
    assert rows[fork.id].network_download_bps == 125_000_000
    assert rows[fork.id].network_upload_bps == 125 << 10
    plain = make()
    assert plain.disk_io_bps is None
    assert plain.network is not None
    assert plain.network.bandwidth_upload is None


def test_expires_at_is_always_there(sdk: Hypeman, make: Maker) -> None:
    made = make()
    answer = sdk.instances.with_raw_response.get(made.id)
    assert answer.http_response.json()["expires_at"] is None


def test_nothing_is_known_by_a_wrong_id(sdk: Hypeman, refused: Refused) -> None:
    instances = sdk.instances
    for call in (
        instances.get,
        instances.delete,
        instances.start,
        instances.stop,
        instances.standby,
        instances.restore,
    ):
        refused(404, "not_found", call, NO_ID)
    refused(404, "not_found", instances.fork, NO_ID, name="a")
    refused(404, "not_found", instances.wait, NO_ID, state="Running")
    refused(404, "not_found", instances.stat, NO_ID, path="/")
    refused(404, "not_found", instances.snapshots.create, NO_ID, kind="Standby")
    refused(404, "not_found", instances.logs, NO_ID)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"name": "UPPER"}, (400, "invalid_request")),
        ({"size": "1 elephant"}, (400, "invalid_size")),
        ({"size": "1KB"}, (400, "invalid_size")),
        ({"overlay_size": "900TB"}, (400, "invalid_overlay_size")),
        ({"disk_io_bps": "fast"}, (400, "invalid_disk_io_bps")),
        ({"network": {"bandwidth_upload": "0bps"}}, (400, "invalid_bandwidth_upload")),
        ({"vcpus": 4096}, (400, "invalid_request")),
        ({"platform": "linux/s390x"}, (400, "invalid_platform")),
        ({"hypervisor": "xen"}, (400, "Bad Request")),
        ({"hypervisor": "vz"}, (501, "not_supported")),
        ({"volumes": [{"volume_id": "v", "mount_path": "/m"}]}, (501, "not_supported")),
        ({"ttl": "soon"}, (400, "invalid_ttl")),
        ({"restart_policy": {"policy": "always"}}, (501, "not_supported")),
    ],
)
def test_a_bad_wish_leaves_nothing_behind(
    sdk: Hypeman,
    refused: Refused,
    fresh_name: Callable[[], str],
    options: dict[str, Any],
    refusal: tuple[int, str],
) -> None:
    wanted = {"name": fresh_name(), "image": IMAGE, "size": "128MB", **options}
    refused(*refusal, sdk.instances.create, **wanted)
    assert wanted["name"] not in [instance.name for instance in sdk.instances.list()]


def test_a_name_belongs_to_one_instance(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    made = make()
    error = refused(
        400, "already_exists", sdk.instances.create, name=made.name, image=IMAGE, size="128MB"
    )
    assert "hint" in [detail["code"] for detail in body_of(error)["details"]]
    refused(409, "name_conflict", sdk.instances.fork, made.id, name=made.name, from_running=True)


def test_a_wrong_state_is_refused_and_not_retried(
    sdk: Hypeman, make: Maker, refused: Refused
) -> None:
    made = make()
    error = refused(409, "invalid_state", sdk.instances.fork, made.id, name="never")
    assert error.response.headers["x-should-retry"] == "false"
    refused(409, "invalid_state", sdk.instances.start, made.id, cmd=["true"])
    sdk.instances.standby(made.id)
    refused(409, "invalid_state", sdk.instances.start, made.id)
    refused(409, "invalid_state", sdk.instances.stop, made.id)
    refused(409, "invalid_state", sdk.instances.stat, made.id, path="/")
    refused(
        409,
        "invalid_state",
        sdk.instances.standby,
        made.id,
        compression={"enabled": False},
    )


def test_standby_options_are_checked_before_anything(
    sdk: Hypeman, make: Maker, refused: Refused
) -> None:
    made = make()
    standby = sdk.instances.standby
    for level in (0, 20):
        refused(
            400,
            "invalid_snapshot_compression",
            standby,
            made.id,
            compression={"enabled": True, "algorithm": "zstd", "level": level},
        )
    refused(400, "invalid_compression_delay", standby, made.id, compression_delay="-1s")
    assert sdk.instances.get(made.id).state == "Running"


def test_wait_ends_in_the_ways_the_contract_names(
    sdk: Hypeman, make: Maker, refused: Refused
) -> None:
    made = make()
    late = sdk.instances.wait(made.id, state="Stopped", api_timeout="100ms")
    assert (late.state, late.timed_out) == ("Running", True)
    sdk.instances.stop(made.id)
    elsewhere = sdk.instances.wait(made.id, state="Running", api_timeout="60s")
    assert (elsewhere.state, elsewhere.timed_out) == ("Stopped", False)
    refused(400, "invalid_state", sdk.instances.wait, made.id, state="Unknown")
    for bad in ("0s", "-5s", "soon"):
        refused(
            400, "invalid_timeout", sdk.instances.wait, made.id, state="Stopped", api_timeout=bad
        )


def test_forks_of_a_running_instance_run_beside_it(sdk: Hypeman, make: Maker) -> None:
    made = make(tags={"kind": "parent"})
    fork = sdk.instances.fork(made.id, name=f"{made.name}-fork", from_running=True)
    assert fork.id != made.id
    assert fork.tags == {"kind": "parent"}
    assert sdk.instances.wait(fork.id, state="Running").state == "Running"
    assert sdk.instances.get(made.id).state == "Running"
    resting = sdk.instances.fork(
        made.id, name=f"{made.name}-rest", from_running=True, target_state="Standby"
    )
    assert resting.state == "Standby"


def test_an_instance_with_an_end_is_told_and_changed_by_the_sdk(sdk: Hypeman, make: Maker) -> None:
    made = make(ttl="1h")
    assert made.expires_at is not None
    stats = sdk.instances.stats(made.id)
    assert stats.instance_id == made.id
    assert stats.memory_rss_bytes > 0
    later = sdk.instances.update(made.id, ttl="2h").expires_at
    assert later is not None
    assert later > made.expires_at
    assert sdk.instances.update(made.id, ttl="0s").expires_at is None
    # A second is enough to see it go; how soon is the scheduler's to say.
    sdk.instances.update(made.id, ttl="1s")
    eventually_empty(lambda: [one for one in sdk.instances.list() if one.id == made.id], 60)
