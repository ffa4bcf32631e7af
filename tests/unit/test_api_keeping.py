"""Edits, previews, lineage, schedules and resources by HTTP, on the fake hypervisor."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from stillframe.api.app import create_app
from stillframe.engine.engine import Engine
from stillframe.engine.interface import EngineInterface, ForkRequest
from stillframe.engine.verbs import snapshot as taking
from stillframe.model.errors import VmmFailure
from stillframe.model.retention import Retention
from stillframe.model.schedules import ScheduleRequest
from stillframe.model.states import InstanceState
from stillframe.model.values import Instance, SnapshotKind
from support.api_double import PRIVATE, SECRET, bearer
from support.clock import HOUR, SetClock
from support.engine import ask, make_engine, running, traces

pytestmark = pytest.mark.usefixtures("clock", "vms_end")

DISK, LIVE = SnapshotKind.STOPPED, SnapshotKind.STANDBY
HOURLY: dict[str, Any] = {"interval": "1h", "retention": {"max_count": 2}}


@pytest.fixture
async def client(engine: Engine, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(
        cast(EngineInterface, engine),
        jwt_secret=SECRET,
        version="9.9",
        private_paths=[PRIVATE],
        upload_dir=tmp_path,
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://server", headers=bearer()
    ) as client:
        yield client


@pytest.fixture
async def source(engine: Engine) -> Instance:
    """A Stopped instance."""
    return await engine.stop((await running(engine)).id)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


# -- edits ------------------------------------------------------------------------------------
async def test_the_words_beside_a_snapshot_change_and_null_clears(
    client: httpx.AsyncClient, engine: Engine, source: Instance, tmp_path: Path
) -> None:
    made = await engine.snapshot(source.id, kind=DISK, name="one", tags={"a": "1", "b": "2"})
    path = f"/snapshots/{made.id}"
    changes = {
        "name": "two", "tags": {"c": "3"}, "description": "before\nthe upgrade", "pinned": True,
        "expires_at": "2030-02-01T00:00:00+01:00", "unknown": 1,
    }  # fmt: skip
    edited = (await client.patch(path, json=changes)).json()
    assert edited["name"] == "two"
    assert edited["tags"] == {"c": "3"}
    assert edited["description"] == "before\nthe upgrade"
    assert (edited["expires_at"], edited["pinned"]) == ("2030-01-31T23:00:00Z", True)
    assert (await client.patch(path, json={})).json() == edited
    assert (await client.get(path)).json() == edited
    again = make_engine(tmp_path)  # what the database has
    assert again.context.records.snapshots[made.id].description == "before\nthe upgrade"
    await again.close()
    cleared = (await client.patch(path, json=dict.fromkeys(changes))).json()
    assert cleared["tags"] == {}
    assert cleared["pinned"] is False
    assert not {"name", "description", "expires_at"} & cleared.keys()
    assert cleared["stored_bytes"] == made.stored_bytes


async def test_a_name_is_unique_for_its_source(
    client: httpx.AsyncClient, engine: Engine, source: Instance
) -> None:
    one = await engine.snapshot(source.id, kind=DISK, name="one")
    await engine.snapshot(source.id, kind=DISK, name="two")
    answer = await client.patch(f"/snapshots/{one.id}", json={"name": "two"})
    assert refusal(answer) == (409, "conflict")
    assert answer.headers["x-should-retry"] == "false"
    assert (await client.patch(f"/snapshots/{one.id}", json={"name": "one"})).status_code == 200


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": "Not Good"}, "invalid_request"),
        ({"name": 7}, "Bad Request"),
        ({"tags": {"a": 1}}, "Bad Request"),
        ({"tags": {"ä": "1"}}, "invalid_request"),
        ({"pinned": "yes"}, "Bad Request"),
        ({"description": "x" * 4097}, "invalid_request"),
        ({"description": "\x1b[31mred"}, "invalid_request"),
        ({"expires_at": "2029-12-31T00:00:00Z"}, "invalid_expires_at"),
        ({"expires_at": "2030-02-01T00:00:00"}, "Bad Request"),
        ({"expires_at": "soon"}, "Bad Request"),
    ],
)
async def test_a_bad_change_is_refused_and_changes_nothing(
    client: httpx.AsyncClient, engine: Engine, source: Instance, change: Any, code: str
) -> None:
    made = await engine.snapshot(source.id, kind=DISK, name="one")
    changes = {"description": "new", **change}
    answer = await client.patch(f"/snapshots/{made.id}", json=changes)
    assert refusal(answer) == (400, code)
    assert engine.find_snapshot(made.id) == made
    assert (await client.patch(f"/snapshots/{'z' * 24}", json={})).status_code == 404


async def test_editing_needs_the_right_to_write(client: httpx.AsyncClient) -> None:
    reader = bearer(permissions=["snapshot:read"])
    answer = await client.patch(f"/snapshots/{'z' * 24}", json={}, headers=reader)
    assert refusal(answer) == (403, "Forbidden")


# -- deletion ---------------------------------------------------------------------------------
async def test_a_pinned_snapshot_is_deleted_with_force_only(
    client: httpx.AsyncClient, engine: Engine, source: Instance
) -> None:
    made = await engine.snapshot(source.id, kind=DISK)
    path = f"/snapshots/{made.id}"
    await client.patch(path, json={"pinned": True})
    answer = await client.delete(path)
    assert refusal(answer) == (409, "conflict")
    assert "hint" in [detail["code"] for detail in answer.json()["details"]]
    preview = (await client.delete(path, params={"dry_run": "true"})).json()
    assert (preview["refused"], preview["pinned"]) == (answer.json()["message"], True)
    forced = (await client.delete(path, params={"dry_run": "true", "force": "true"})).json()
    assert "refused" not in forced
    assert (await client.delete(path, params={"force": "true"})).status_code == 204
    assert (await client.delete(path)).status_code == 404


async def test_a_dry_run_tells_who_shares_and_deletes_nothing(
    client: httpx.AsyncClient, engine: Engine, tmp_path: Path
) -> None:
    running_source = await running(engine)
    made = await engine.snapshot(running_source.id, kind=LIVE, name="base")
    path = f"/snapshots/{made.id}"
    alone = (await client.delete(path, params={"dry_run": "true"})).json()
    assert (alone["shared_with"], alone["in_use"]) == ([], 0)
    fork = await engine.fork_snapshot(made.id, ForkRequest("fork"))
    shared = (await client.delete(path, params={"dry_run": "true"})).json()
    assert [(s["kind"], s["name"]) for s in shared["shared_with"]] == [("instance", "fork")]
    payload = tmp_path / "snapshots" / made.id
    # The image and its digest table, which the fork holds by links of its own.
    held = sum((payload / name).stat().st_blocks * 512 for name in ("memory", "memory.blake3"))
    assert alone["bytes_freed"] - shared["bytes_freed"] == held > 0
    assert (await client.get(path)).status_code == 200
    assert (await client.delete(path)).status_code == 204
    assert await ask(engine, fork.id, "true") == ""


# -- lineage ----------------------------------------------------------------------------------
async def test_lineage_tells_descent_sharing_and_what_deletion_frees(
    client: httpx.AsyncClient, engine: Engine, clock: SetClock
) -> None:
    clock.step = timedelta(seconds=1)
    web = await running(engine, "web")
    one = await engine.snapshot(web.id, kind=LIVE, name="one")
    two = await engine.snapshot(web.id, kind=LIVE, name="two")
    fork = await engine.fork_snapshot(one.id, ForkRequest("fork"))
    deep = await engine.snapshot(fork.id, kind=LIVE, name="deep")
    assert (two.parent_snapshot_id, deep.parent_snapshot_id) == (one.id, one.id)
    found = (await client.get(f"/snapshots/{one.id}/lineage")).json()
    assert found["snapshot"]["shares_memory_with"] == [fork.id]
    assert [relative["name"] for relative in found["ancestors"]] == ["web"]
    assert [relative["name"] for relative in found["descendants"]] == ["two", "fork", "deep"]
    assert all(r["exclusive_bytes"] > 0 for r in found["descendants"])
    await engine.delete(web.id)
    await engine.delete_snapshot(one.id)
    above = (await client.get(f"/snapshots/{deep.id}/lineage")).json()["ancestors"]
    assert [(r["name"], r["deleted"]) for r in above] == [
        ("fork", False), ("one", True), ("web", True)
    ]  # fmt: skip
    assert await ask(engine, fork.id, "true") == ""
    everyone = (await client.get("/lineage")).json()
    assert {r["name"] for r in everyone} == {"web", "one", "two", "fork", "deep"}


async def test_the_family_of_one_instance_leaves_strangers_out(
    client: httpx.AsyncClient, engine: Engine, clock: SetClock, source: Instance
) -> None:
    clock.step = timedelta(seconds=1)
    stranger = await engine.stop((await running(engine, "stranger")).id)
    await engine.snapshot(stranger.id, kind=DISK, name="foreign")
    made = await engine.snapshot(source.id, kind=DISK, name="own")
    await engine.fork_snapshot(made.id, ForkRequest("cold"))
    family = (await client.get("/lineage", params={"instance": "cold"})).json()
    assert [relative["name"] for relative in family] == ["source", "own", "cold"]
    assert (await client.get("/lineage", params={"instance": "nobody"})).status_code == 404


async def test_a_restore_makes_the_next_snapshot_descend_from_the_restored_one(
    engine: Engine, source: Instance
) -> None:
    one = await engine.snapshot(source.id, kind=DISK)
    await engine.snapshot(source.id, kind=DISK)
    await engine.restore_snapshot(source.id, one.id)
    third = await engine.snapshot(source.id, kind=DISK)
    assert third.parent_snapshot_id == one.id


# -- schedules --------------------------------------------------------------------------------
async def test_a_schedule_has_the_contract_s_fields(
    client: httpx.AsyncClient, source: Instance
) -> None:
    path = f"/instances/{source.name}/snapshot-schedule"
    assert refusal(await client.get(path)) == (404, "not_found")
    wanted = {
        "interval": "90m", "retention": {"max_age": "24h"}, "name_prefix": "nightly",
        "metadata": {"team": "a"},
    }  # fmt: skip
    made = (await client.put(path, json=wanted)).json()
    assert made == {
        "instance_id": source.id,
        "interval": "1h30m0s",
        "retention": {"max_count": 0, "max_age": "24h0m0s"},
        "next_run_at": "2030-01-01T13:30:00Z",
        "created_at": "2030-01-01T12:00:00Z",
        "updated_at": "2030-01-01T12:00:00Z",
        "name_prefix": "nightly",
        "metadata": {"team": "a"},
        "paused": False,
    }
    assert (await client.get(path)).json() == made
    assert (await client.delete(path)).status_code == 204
    assert refusal(await client.delete(path)) == (404, "not_found")
    assert refusal(await client.get("/instances/nobody/snapshot-schedule")) == (404, "not_found")


async def test_a_schedule_by_cron_with_a_policy_runs_by_hand_and_explains_itself(
    client: httpx.AsyncClient, source: Instance
) -> None:
    path = f"/instances/{source.id}/snapshot-schedule"
    policy = {"keep_last": 1, "daily": 7, "minimum_age": "30m"}
    wanted = {"cron": "0 3 * * *", "policy": policy, "paused": True, "name_prefix": None}
    made = (await client.put(path, json=wanted)).json()
    assert (made["cron"], made["interval"], made["paused"]) == ("0 3 * * *", "24h0m0s", True)
    assert made["policy"] == {"keep_last": 1, "daily": 7, "minimum_age": "30m0s"}
    assert made["retention"] == {"max_count": 0}
    for _ in range(2):
        ran = (await client.post(path + "/run")).json()
    assert ran["last_run_at"] == "2030-01-01T12:00:00Z"
    plan = (await client.get(path + "/retention")).json()
    assert (plan["kept"], plan["deleted"], plan["bytes_freed"]) == (2, 0, 0)
    assert plan["snapshots"][-1]["snapshot_id"] == ran["last_snapshot_id"]
    assert plan["snapshots"][0]["reasons"] == ["0s old, younger than minimum_age 30m0s"]


async def test_a_run_that_fails_says_so_at_once_and_later(
    client: httpx.AsyncClient, source: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/instances/{source.id}/snapshot-schedule"
    await client.put(path, json=HOURLY)

    async def refused(*_: object, **__: object) -> None:
        raise VmmFailure(f"cannot open {PRIVATE}/x")

    monkeypatch.setattr(taking, "snapshot", refused)
    assert refusal(await client.post(path + "/run")) == (500, "hypervisor_error")
    assert (await client.get(path)).json()["last_error"] == "cannot open <data>/x"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"interval": None}, "Bad Request"),
        ({"retention": None}, "Bad Request"),
        ({"interval": 60}, "Bad Request"),
        ({"retention": {"max_count": -1}}, "Bad Request"),
        ({"policy": {"daily": 2**31}}, "Bad Request"),
        ({"interval": "59s"}, "invalid_request"),
        ({"interval": "often"}, "invalid_request"),
        ({"retention": {}}, "invalid_request"),
        ({"retention": {"max_count": 0, "max_age": "0s"}}, "invalid_request"),
        ({"retention": {"max_age": "-1h"}}, "invalid_request"),
        ({"cron": "@daily"}, "invalid_request"),
        ({"interval": None, "cron": "61 * * * *"}, "invalid_request"),
        ({"name_prefix": "Not Good"}, "invalid_request"),
        ({"name_prefix": "x" * 48}, "invalid_request"),
        ({"metadata": {"{": ""}}, "invalid_request"),
    ],
)
async def test_a_bad_schedule_is_refused(
    client: httpx.AsyncClient, source: Instance, change: dict[str, Any], code: str
) -> None:
    path = f"/instances/{source.id}/snapshot-schedule"
    assert refusal(await client.put(path, json={**HOURLY, **change})) == (400, code)
    assert (await client.get(path)).status_code == 404


# -- quotas and resources ---------------------------------------------------------------------
async def test_a_quota_refuses_before_the_guest_is_paused(
    client: httpx.AsyncClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    machine = engine.context.live[source.id].machine

    async def paused() -> None:
        pytest.fail("the guest was paused")

    monkeypatch.setattr(machine, "pause", paused)
    path, body = f"/instances/{source.id}/snapshots", {"kind": "Standby"}
    limits = engine.context.settings
    for limited, expected, facts in (
        (replace(limits, max_snapshot_bytes=4096), (409, "insufficient_resources"), "stored_bytes"),
        (replace(limits, min_free_bytes=2**60), (507, "storage_full"), "free_bytes"),
    ):
        monkeypatch.setattr(engine.context, "settings", limited)
        answer = await client.post(path, json=body)
        assert refusal(answer) == expected
        assert facts in [detail["code"] for detail in answer.json()["details"]]
        assert answer.headers["x-should-retry"] == "false"
        monkeypatch.undo()
        monkeypatch.setattr(machine, "pause", paused)
    monkeypatch.undo()
    assert (await client.post(path, json=body)).status_code == 201


async def test_a_quota_of_snapshots_counts_those_being_made(
    client: httpx.AsyncClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(engine.context.settings, max_snapshots=1)
    monkeypatch.setattr(engine.context, "settings", settings)
    sources = [await engine.stop((await running(engine, name)).id) for name in ("one", "two")]
    inside: list[httpx.Response] = []
    fill = taking._fill

    async def meanwhile(*arguments: Any) -> Any:
        inside.append(await client.post(f"/instances/{sources[1].id}/snapshots", json=body))
        return await fill(*arguments)

    body = {"kind": "Stopped"}
    monkeypatch.setattr(taking, "_fill", meanwhile)
    assert (await client.post(f"/instances/{sources[0].id}/snapshots", json=body)).is_success
    assert refusal(inside[0]) == (409, "insufficient_resources")
    assert inside[0].json()["message"] == "the server has 1 snapshots, 1 are allowed"


async def test_resources_are_those_of_the_host_and_the_records(
    client: httpx.AsyncClient, engine: Engine, source: Instance, tmp_path: Path
) -> None:
    awake = await running(engine, "awake")
    made = await engine.snapshot(awake.id, kind=LIVE)
    fork = await engine.fork_snapshot(made.id, ForkRequest("fork"))
    body = (await client.get("/resources")).json()
    memory = body["memory"]
    assert (memory["type"], memory["allocated"]) == ("memory", 2 * awake.memory_bytes)
    assert memory["capacity"] > memory["available"] > 0
    assert body["cpu"]["allocated"] == 2
    rows = {row["instance_name"]: row for row in body["allocations"]}
    assert rows["source"]["cpu"] == rows["source"]["memory_bytes"] == 0
    assert rows["fork"]["disk_bytes"] == fork.overlay_bytes
    used = body["disk_breakdown"]
    files = [p for p in (tmp_path / "snapshots").rglob("*") if p.is_file()]
    assert used["snapshots_bytes"] == sum(p.stat().st_blocks for p in files) * 512
    assert used["overlays_bytes"] > 0
    assert body["disk"]["allocated"] == (
        used["images_bytes"] + used["overlays_bytes"] + used["snapshots_bytes"]
    )
    assert body["snapshots"]["count"] == 1
    assert body["snapshots"]["stored_bytes"] == made.stored_bytes
    reader = bearer(permissions=["instance:read"])
    assert (await client.get("/resources", headers=reader)).status_code == 403


async def test_a_dry_run_of_a_fork_and_a_restore_answers_what_would_happen(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    source = await running(engine)
    made = await engine.snapshot(source.id, kind=LIVE, name="base")
    dry = {"dry_run": "true"}
    path = f"/snapshots/{made.id}/fork"
    told = await client.post(path, params=dry, json={"name": "fork"})
    assert told.status_code == 200
    assert (told.json()["name"], told.json()["refused"]) == ("fork", [])
    taken = (await client.post(path, params=dry, json={"name": "source"})).json()
    assert "already exists" in taken["refused"][0]
    path = f"/instances/{source.id}/snapshots/{made.id}/restore"
    told = await client.post(path, params=dry, json={})
    assert told.status_code == 200
    assert "must be Standby or Stopped" in told.json()["refused"][0]
    assert [instance.name for instance in engine.list_instances()] == ["source"]


async def test_a_dry_run_of_what_is_done_to_an_instance_does_nothing(
    client: httpx.AsyncClient, engine: Engine, tmp_path: Path
) -> None:
    source = await running(engine)
    made = await engine.snapshot(source.id, kind=LIVE, name="base")
    fork = await engine.fork_snapshot(made.id, ForkRequest("fork"))
    dry, before = {"dry_run": "true"}, traces(tmp_path)
    path = f"/instances/{source.id}/fork"
    told = await client.post(path, params=dry, json={"name": "live", "from_running": True})
    assert (told.status_code, told.json()["refused"]) == (200, [])
    assert (told.json()["instance_id"], told.json()["state"]) == (source.id, "Running")
    assert told.json()["bytes_captured"] > 0
    refused = (await client.post(path, params=dry, json={"name": "fork"})).json()["refused"]
    assert "already exists" in refused[0]
    assert "Running" in refused[1]
    wish = {"count": 2, "overrides": [{"name": "source"}, {"name": "new"}]}
    several = await client.post(f"/snapshots/{made.id}/forks", params=dry, json=wish)
    assert several.status_code == 200
    assert [bool(one["refused"]) for one in several.json()] == [True, False]
    gone = await client.delete(f"/instances/{fork.id}", params=dry)
    assert gone.status_code == 200
    assert gone.json()["instance_id"] == fork.id
    assert [one["name"] for one in gone.json()["shared_with"]] == ["base"]
    assert traces(tmp_path) == before


async def test_a_dry_run_where_there_is_none_is_refused_and_nothing_is_done(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    source = await running(engine)
    engine.set_schedule(source.id, ScheduleRequest(Retention(max_count=1), interval=HOUR))
    dry = {"dry_run": "true"}
    for method, path in (
        ("POST", f"/instances/{source.id}/restore"),
        ("POST", f"/instances/{source.id}/standby"),
        ("POST", f"/instances/{source.id}/stop"),
        ("POST", f"/instances/{source.id}/snapshots"),
        ("POST", f"/instances/{source.id}/snapshot-schedule/run"),
        ("DELETE", f"/instances/{source.id}/snapshot-schedule"),
        ("DELETE", "/images/stillframe%2Fbase"),
    ):
        answer = await client.request(method, path, params=dry)
        assert answer.status_code == 400, path
        assert "nothing was done" in answer.json()["message"]
    assert engine.list_snapshots() == []
    assert engine.find_schedule(source.id).last_run_at is None
    assert engine.find_instance(source.id).state is InstanceState.RUNNING
