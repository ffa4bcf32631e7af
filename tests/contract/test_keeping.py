"""Schedules by the official SDK, and the commands that keep snapshots, on a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypeman import Hypeman

from support.contract import Maker, Refused
from support.server import Server

Cli = Callable[..., str]


@pytest.fixture
def cli(server: Server) -> Cli:
    """Run a command that must succeed; what it printed."""

    def cli(*arguments: str) -> str:
        done = server.cli(*arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    return cli


def test_a_schedule_is_set_replaced_and_ended(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    made, schedules = make(), sdk.instances.snapshot_schedule
    refused(404, "not_found", schedules.get, made.id)
    first = schedules.update(
        made.id, interval="24h", retention={"max_count": 7}, name_prefix="nightly",
        metadata={"team": "a"},
    )  # fmt: skip
    assert (first.instance_id, first.interval, first.name_prefix) == (
        made.id, "24h0m0s", "nightly"
    )  # fmt: skip
    assert first.retention.max_count == 7
    assert first.next_run_at - first.created_at == timedelta(days=1)
    assert (first.last_run_at, first.last_snapshot_id, first.last_error) == (None, None, None)
    second = schedules.update(made.name, interval="24h", retention={"max_age": "168h"})
    assert (second.created_at, second.next_run_at) == (first.created_at, first.next_run_at)
    assert (second.retention.max_count, second.retention.max_age) == (0, "168h0m0s")
    assert schedules.get(made.id) == second
    schedules.delete(made.id)
    refused(404, "not_found", schedules.delete, made.id)
    refused(404, "not_found", schedules.get, "nobody")


def test_a_schedule_is_refused_as_documented(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    made, schedules = make(), sdk.instances.snapshot_schedule
    keep: Any = {"max_count": 1}
    changes: list[dict[str, Any]] = [
        {"interval": "30s"}, {"interval": "daily"}, {"retention": {}}, {"name_prefix": "-x"},
        {"retention": {"max_count": 0}}, {"metadata": {"": "x"}},
    ]  # fmt: skip
    for wrong in changes:
        options: Any = {"interval": "1h", "retention": keep, **wrong}
        refused(400, "invalid_request", schedules.update, made.id, **options)
    broken: Any = 5
    refused(400, "Bad Request", schedules.update, made.id, interval="1h", retention=broken)
    refused(404, "not_found", schedules.update, "nobody", interval="1h", retention=keep)
    refused(404, "not_found", schedules.get, made.id)


def test_a_schedule_is_gone_with_its_instance(
    sdk: Hypeman, make: Maker, refused: Refused, cli: Cli
) -> None:
    made, schedules = make(), sdk.instances.snapshot_schedule
    schedules.update(made.id, interval="1h", retention={"max_count": 1})
    taken = json.loads(cli("schedule", "run", made.id, "--json"))["last_snapshot_id"]
    sdk.instances.delete(made.id)
    refused(404, "not_found", schedules.get, made.id)
    assert sdk.snapshots.get(taken).source_instance_id == made.id


def test_resources_are_those_of_the_host(sdk: Hypeman, make: Maker) -> None:
    made = make()
    sdk.instances.snapshots.create(made.id, kind="Standby")
    found = sdk.resources.get()
    assert found.memory.capacity >= found.memory.allocated >= 128 * 2**20
    assert [row.instance_name for row in found.allocations] == [made.name]
    assert found.disk_breakdown is not None
    extensions: dict[str, Any] = found.disk_breakdown.to_dict()
    assert extensions["snapshots_bytes"] > 0


def test_the_schedule_commands(cli: Cli, make: Maker, server: Server) -> None:
    name = make().name
    assert server.cli("schedule", "get", name).returncode == 1
    cron = ("--cron", "0 3 * * *", "--daily", "7", "--minimum-age", "1h", "--prefix", "nightly")
    made = json.loads(cli("schedule", "set", name, *cron, "-t", "a=b", "--json"))
    assert (made["cron"], made["policy"]) == ("0 3 * * *", {"daily": 7, "minimum_age": "1h0m0s"})
    paused = json.loads(cli("schedule", "pause", name, "--json"))
    assert {**paused, "paused": False, "updated_at": ""} == {**made, "updated_at": ""}
    for _ in range(2):
        assert "last_snapshot_id:" in cli("schedule", "run", name)
    rows = [line.split() for line in cli("schedule", "explain", name).splitlines()]
    assert rows[0] == ["NAME", "ID", "AGE", "VERDICT", "FREES", "WHY"]
    assert [row[3] for row in rows[1:]] == ["keep", "keep"]
    assert rows[1][0].startswith("nightly-")
    assert json.loads(cli("schedule", "resume", name, "--json"))["paused"] is False
    every = json.loads(cli("schedule", "set", name, "--every", "2h", "--max-count", "3", "--json"))
    assert (every["interval"], every["retention"]) == ("2h0m0s", {"max_count": 3})
    assert cli("schedule", "rm", name) == f"{name}\n"


def test_the_words_beside_a_snapshot_by_command(cli: Cli, make: Maker, server: Server) -> None:
    name = make().name
    instance = json.loads(cli("inspect", name, "--json"))
    cli("snapshot", "create", name, "-n", "one", "-t", "a=1", "-t", "b=2")
    edit = ("snapshot", "edit", "one", "--json", "-n", "two", "-t", "c=3", "--untag", "a")
    edited = json.loads(cli(*edit, "-d", "before the upgrade", "--expires", "72h", "--pin"))
    assert (edited["name"], edited["tags"]) == ("two", {"b": "2", "c": "3"})
    assert (edited["description"], edited["pinned"]) == ("before the upgrade", True)
    assert "expires_at" in edited
    refused = server.cli("snapshot", "rm", "two")
    assert refused.returncode == 1
    assert "is pinned (hint: " in refused.stderr
    preview = cli("snapshot", "rm", "two", "--dry-run")
    assert "is pinned" in preview
    for dry in (("fork", name, "three"), ("rm", name), ("snapshot", "fork", "two", "--count", "2")):
        (told, *_) = json.loads(cli(*dry, "--dry-run", "--json"))
        assert told.get("instance_id") == (None if dry[0] == "snapshot" else instance["id"])
    assert [one["name"] for one in json.loads(cli("ps", "--json"))].count("three") == 0
    assert server.cli("snapshot", "edit", "two").returncode == 2
    cleared = json.loads(cli("snapshot", "edit", "two", "--json", "--expires", "never", "-d", ""))
    assert not {"expires_at", "description"} & cleared.keys()
    assert cli("snapshot", "rm", "two", "--force") == f"{edited['id']}\n"


def test_the_family_is_drawn_as_a_tree(cli: Cli, make: Maker, sdk: Hypeman) -> None:
    name = make().name
    cli("snapshot", "create", name, "-n", "base")
    cli("snapshot", "create", name, "-n", "later")
    cli("snapshot", "fork", "base", f"{name}-fork")
    cli("snapshot", "create", f"{name}-fork", "-n", "deep")
    sdk.instances.delete(name)
    lines = cli("snapshot", "tree", "--instance", f"{name}-fork").splitlines()
    shown = [line.lstrip("├│└─ \xa0").split()[0] for line in lines]
    assert shown == [name, "base", f"{name}-fork", "deep", "later"]
    indents = [len(line) - len(line.lstrip("├│└─ \xa0")) for line in lines]
    assert indents == [0, 4, 8, 12, 4]
    assert lines[0].endswith("deleted instance")
    assert f"memory shared with {name}-fork" in lines[1]
    marked = cli("snapshot", "tree", "deep").splitlines()
    assert [line.lstrip("├│└─ \xa0").split()[0] for line in marked] == [
        name, "base", f"{name}-fork", "deep",
    ]  # fmt: skip
    assert marked[-1].endswith("←")
    assert json.loads(cli("snapshot", "tree", "deep", "--json"))["snapshot"]["name"] == "deep"
