"""Instances that are deleted by themselves, by a clock that the scenarios set."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from stillframe.api.app import create_app
from stillframe.engine.engine import Engine
from stillframe.engine.interface import CreateRequest, EngineInterface, ForkRequest
from stillframe.model.errors import Conflict, VmmFailure
from stillframe.model.values import Instance, SnapshotKind
from stillframe.vmm.fake.driver import FakeMachine
from support.api_double import SECRET, bearer
from support.clock import DAY, HOUR, MINUTE, START, SetClock, look
from support.engine import make_engine, running, traces

pytestmark = pytest.mark.usefixtures("clock", "vms_end")

LIVE = SnapshotKind.STANDBY


async def opened(directory: Path, clock: SetClock) -> Engine:
    engine = make_engine(directory)
    clock.rule(engine)
    await engine.open()
    return engine


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(cast(EngineInterface, engine), jwt_secret=SECRET, version="9.9")
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://server", headers=bearer()
    ) as client:
        yield client


async def fleeting(engine: Engine, name: str = "source", **wishes: Any) -> Instance:
    """A Running instance that has an hour, unless told otherwise."""
    made = await running(engine, name)
    return await engine.set_expiry(made.id, **(wishes or {"lifetime": HOUR}))


def names(engine: Engine) -> list[str]:
    return [instance.name for instance in engine.list_instances()]


# -- what happens -----------------------------------------------------------------------------
async def test_an_instance_is_deleted_when_its_time_has_come_and_its_snapshots_stay(
    engine: Engine, clock: SetClock, tmp_path: Path
) -> None:
    request = CreateRequest("source", "stillframe/base", lifetime=HOUR)
    source = await engine.create(request)
    assert source.expires_at == START + HOUR
    await running_again(engine, source)
    made = await engine.snapshot(source.id, kind=LIVE)
    clock.go_on(HOUR - MINUTE)
    await look(engine)
    assert names(engine) == ["source"]
    clock.go_on(MINUTE)
    assert [snapshot.id for snapshot in await look(engine)] == [made.id]
    assert names(engine) == []
    assert traces(tmp_path) == [f"snapshots/{made.id}"]
    assert not engine.context.records.intents


async def running_again(engine: Engine, instance: Instance) -> None:
    await engine.wait(instance.id, state=instance.state.RUNNING, timeout=timedelta(minutes=1))


async def test_the_task_wakes_by_itself(engine: Engine, clock: SetClock) -> None:
    source = await fleeting(engine)
    with engine.context.listening(source.id) as gone:
        clock.go_on(HOUR)
        engine.scheduler.wake()
        async with asyncio.timeout(60):
            while names(engine):
                gone.clear()
                await gone.wait()


async def test_forks_and_restores_inherit_no_end(engine: Engine, clock: SetClock) -> None:
    source = await fleeting(engine)
    made = await engine.snapshot(source.id, kind=LIVE)
    fork = await engine.fork_snapshot(made.id, ForkRequest("fork"))
    twin = await engine.fork(source.id, name="twin", from_running=True)
    assert (fork.expires_at, twin.expires_at) == (None, None)
    later = await engine.set_expiry(source.id, lifetime=3 * HOUR)
    await engine.stop(source.id)
    restored = await engine.restore_snapshot(source.id, made.id)
    assert restored.expires_at == later.expires_at == START + 3 * HOUR
    clock.go_on(2 * HOUR)
    await look(engine)
    assert set(names(engine)) == {"source", "fork", "twin"}


async def test_a_clock_that_leaps_forward_is_not_believed_at_once(
    engine: Engine, clock: SetClock
) -> None:
    source = await fleeting(engine)
    await look(engine)
    clock.leap(30 * DAY)
    await look(engine)
    assert names(engine) == ["source"]
    saved = await engine.set_expiry(source.id, lifetime=timedelta(0))
    assert saved.expires_at is None
    clock.go_on(2 * DAY)
    await look(engine)
    assert names(engine) == ["source"]


async def test_an_end_that_came_while_no_server_ran_is_made_up_for(
    tmp_path: Path, clock: SetClock
) -> None:
    engine = await opened(tmp_path, clock)
    await fleeting(engine)
    await engine.close()
    clock.go_on(2 * HOUR)
    engine = await opened(tmp_path, clock)
    try:
        await look(engine)
        assert names(engine) == []
        assert traces(tmp_path) == []
    finally:
        await engine.close()


async def test_a_deletion_that_fails_is_tried_again(
    engine: Engine, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleeting(engine)
    clock.go_on(HOUR)
    kill = FakeMachine.kill

    async def stuck(machine: FakeMachine) -> None:
        raise VmmFailure("it cannot be ended")

    monkeypatch.setattr(FakeMachine, "kill", stuck)
    await look(engine)
    assert names(engine) == ["source"]
    monkeypatch.setattr(FakeMachine, "kill", kill)
    clock.go_on(2 * MINUTE)
    await look(engine)
    assert names(engine) == []


async def test_what_has_expired_is_not_saved_while_it_goes(engine: Engine, clock: SetClock) -> None:
    source = await fleeting(engine)
    async with engine.context.exclusive(source.id, "a long verb"):
        clock.go_on(HOUR)
        saving = asyncio.create_task(engine.set_expiry(source.id, lifetime=DAY))
        await asyncio.sleep(0)
    with pytest.raises(Conflict) as refused:
        await saving
    assert refused.value.code == "instance_expired"


async def test_what_is_given_longer_in_time_stays_though_its_turn_comes_later(
    engine: Engine, clock: SetClock
) -> None:
    source = await fleeting(engine)
    async with engine.context.exclusive(source.id, "a long verb"):
        saving = asyncio.create_task(engine.set_expiry(source.id, lifetime=DAY))
        await asyncio.sleep(0)
        clock.go_on(HOUR)
        engine.scheduler.tick()
    assert (await saving).expires_at == START + HOUR + DAY
    await engine.scheduler.settled()
    assert names(engine) == ["source"]


# -- by the contract --------------------------------------------------------------------------
async def test_the_contract_s_fields(client: httpx.AsyncClient, engine: Engine) -> None:
    body = {"name": "box", "image": "stillframe/base", "ttl": "90m"}
    made = await client.post("/instances", json=body)
    assert (made.status_code, made.json()["expires_at"]) == (201, "2030-01-01T13:30:00Z")
    await running_again(engine, engine.find_instance("box"))
    for change, expected in (
        ({"expires_at": "2030-02-01T01:00:00+01:00"}, "2030-02-01T00:00:00Z"),
        ({}, "2030-02-01T00:00:00Z"),
        ({"expires_at": None, "auto_standby": {"enabled": False}}, "2030-02-01T00:00:00Z"),
        ({"ttl": "1h"}, "2030-01-01T13:00:00Z"),
        ({"ttl": "0s"}, None),
    ):
        changed = await client.patch("/instances/box", json=change)
        assert (changed.status_code, changed.json()["expires_at"]) == (200, expected)
        assert (await client.get("/instances/box")).json()["expires_at"] == expected


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"ttl": "soon"}, (400, "invalid_ttl")),
        ({"ttl": "-1s"}, (400, "invalid_ttl")),
        ({"expires_at": "2029-12-31T23:59:59Z"}, (400, "invalid_expires_at")),
        ({"expires_at": "9999-12-31T23:59:59-01:00"}, (400, "invalid_expires_at")),
        ({"expires_at": "2031-01-01T00:00:00Z", "ttl": "0s"}, (400, "invalid_request")),
        ({"expires_at": "tomorrow"}, (400, "Bad Request")),
        ({"auto_standby": {"enabled": True, "idle_timeout": "5m"}}, (501, "not_supported")),
        ({"restart_policy": {"policy": "always"}}, (501, "not_supported")),
    ],
)
async def test_what_cannot_be_is_refused_when_made_and_when_changed(
    client: httpx.AsyncClient, engine: Engine, change: dict[str, Any], refusal: tuple[int, str]
) -> None:
    body = {"name": "box", "image": "stillframe/base", **change}
    made = await client.post("/instances", json=body)
    assert (made.status_code, made.json()["code"]) == refusal
    assert names(engine) == []
    await engine.create(CreateRequest("box", "stillframe/base"))
    changed = await client.patch("/instances/box", json=change)
    assert (changed.status_code, changed.json()["code"]) == refusal


async def test_what_an_instance_has_no_credentials_for_cannot_be_changed(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    await engine.create(CreateRequest("box", "stillframe/base"))
    env = await client.patch("/instances/box", json={"env": {"A": "1"}})
    assert (env.status_code, env.json()["code"]) == (400, "invalid_request")
    gone = await client.patch("/instances/none", json={"ttl": "1h"})
    assert (gone.status_code, gone.json()["code"]) == (404, "not_found")


async def test_one_that_is_being_made_waits_for_its_end(engine: Engine, clock: SetClock) -> None:
    source = await fleeting(engine)
    being_made = replace(source, state=source.state.CREATED)
    engine.context.records.put_instance(being_made)
    clock.go_on(HOUR)
    await look(engine)
    assert names(engine) == ["source"]
    engine.context.records.put_instance(source)
    await look(engine)
    assert names(engine) == []
