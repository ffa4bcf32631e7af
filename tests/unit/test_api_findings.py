"""What was found in the HTTP layer by using it against the contract, each as a scenario."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from stillframe.api.app import create_app
from stillframe.api.routes import absent
from stillframe.engine.engine import Engine
from stillframe.engine.interface import EngineInterface
from stillframe.engine.moving.export import about_of
from stillframe.host import capacity
from stillframe.host.capacity import Traffic
from stillframe.model.errors import GuestFailure, InvalidRequest
from stillframe.model.values import Hypervisor, ImageStatus, SnapshotKind
from stillframe.store.archive_export import export
from stillframe.vmm.driver import Driver
from support.api_double import SECRET, DoubleEngine, DoubleSession, app_over, bearer, served
from support.clock import stopped
from support.engine import make_engine, open_engine, running
from support.moving import take

JSON = {"Content-Type": "application/json"}
DISK = SnapshotKind.STOPPED


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with open_engine(tmp_path / "data") as engine:
        yield engine


def talking_to(engine: EngineInterface | DoubleEngine) -> httpx.AsyncClient:
    app = create_app(cast(EngineInterface, engine), jwt_secret=SECRET, version="9.9")
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=bearer())


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with talking_to(engine) as client:
        yield client


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


# -- times ------------------------------------------------------------------------------------
async def test_a_time_that_has_no_utc_is_refused_and_the_list_goes_on(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    source = await stopped(engine)
    made = await engine.snapshot(source.id, kind=DISK)
    path = f"/snapshots/{made.id}"
    last = {"expires_at": "9999-12-31T23:59:59-01:00"}
    assert code_of(await client.patch(path, json=last)) == (400, "invalid_expires_at")
    edited = await client.patch(path, json={"expires_at": "2100-01-01T01:00:00+01:00"})
    assert edited.json()["expires_at"] == "2100-01-01T00:00:00Z"
    assert engine.find_snapshot(made.id).expires_at == datetime(2100, 1, 1, tzinfo=UTC)
    # An older server may have kept such a time: it hides no other snapshot.
    odd = datetime(9999, 12, 31, 23, 59, tzinfo=timezone(timedelta(hours=-1)))
    engine.context.records.update_snapshot(replace(made, expires_at=odd))
    for listing in ("/snapshots", "/lineage", path):
        assert (await client.get(listing)).status_code == 200


async def test_times_that_an_archive_tells_are_kept_in_utc(engine: Engine) -> None:
    source = await stopped(engine)
    made = await engine.snapshot(source.id, kind=DISK)
    payload = engine.context.data.snapshot(made.id)
    abroad = replace(made, created_at=made.created_at.astimezone(timezone(timedelta(hours=9))))
    arrived = await take(engine, b"".join(export(payload, about=about_of(abroad))))
    assert arrived.created_at == made.created_at
    assert arrived.created_at.utcoffset() == timedelta(0)


# -- texts ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "body",
    [
        r'{"name":"a","image":"b","env":{"A":"\ud800"}}',
        r'{"name":"a","image":"b","env":{"\ud800":"1"}}',
        r'{"name":"a","image":"b","env":{"\ud800=":"1"}}',
        r'{"name":"a","image":"b","cmd":["\ud800"]}',
        r'{"name":"a","image":"b","tags":{"\ud800":"1"}}',
        r'{"name":"a","image":"\udfff"}',
        r'{"name":"\ud800","image":"b"}',
    ],
)
async def test_half_a_surrogate_pair_is_a_bad_request(body: str) -> None:
    async with talking_to(DoubleEngine()) as client:
        answer = await client.post("/instances", content=body, headers=JSON)
        assert code_of(answer) == (400, "Bad Request")
        whole = r'{"name":"a","image":"b","env":{"A":"\ud83d\ude00"}}'
        assert (await client.post("/instances", content=whole, headers=JSON)).is_success


async def test_the_engine_refuses_such_text_by_itself(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    source = await stopped(engine)
    made = await engine.snapshot(source.id, kind=DISK)
    told = await client.patch(
        f"/snapshots/{made.id}", content=r'{"description":"\ud800"}', headers=JSON
    )
    assert told.status_code == 400
    with pytest.raises(InvalidRequest):
        engine.edit_snapshot(made.id, {"description": "\ud800"})


# -- answers ----------------------------------------------------------------------------------
async def test_an_unforeseen_failure_is_repeated_only_where_nothing_can_have_been_done() -> None:
    double = DoubleEngine()
    double.failures = {"stop": ZeroDivisionError("x"), "list_instances": ZeroDivisionError("x")}
    async with talking_to(double) as client:
        stop = await client.post("/instances/web/stop")
        assert (stop.status_code, stop.headers.get("x-should-retry")) == (500, "false")
        listing = await client.get("/instances")
        assert (listing.status_code, listing.headers.get("x-should-retry")) == (500, None)


async def test_asking_for_an_image_again_leaves_its_tags_alone(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    await engine.context.images.ensure("stillframe/base", tags={"team": "a"})
    for body, tags in (({}, {"team": "a"}), ({"tags": {"b": "2"}}, {"b": "2"}), ({"tags": {}}, {})):
        asked = await client.post("/images", json={"name": "stillframe/base", **body})
        assert (asked.status_code, asked.json().get("tags", {})) == (202, tags)
        for pull in list(engine.context.images._pulls.values()):
            await pull.task
        assert dict(engine.find_image("stillframe/base").tags) == tags


async def test_a_schedule_takes_fifty_tags_beside_its_own_marks(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    source = await stopped(engine)
    wanted: dict[str, Any] = {"interval": "1h", "retention": {"max_count": 1}}
    path = f"/instances/{source.id}/snapshot-schedule"
    for count, status in ((50, 200), (51, 400)):
        metadata = {f"key-{number}": "value" for number in range(count)}
        put = await client.put(path, json={**wanted, "metadata": metadata})
        assert put.status_code == status
    taken = engine.find_snapshot(str((await engine.run_schedule(source.id)).last_snapshot_id))
    assert len(taken.tags) == 52
    edited = engine.edit_snapshot(taken.id, {"tags": {**taken.tags, "key-1": "other"}})
    payload = engine.context.data.snapshot(taken.id)
    arrived = await take(engine, b"".join(export(payload, about=about_of(edited))), name="again")
    assert len(arrived.tags) == 50


# -- hypervisors ------------------------------------------------------------------------------
async def test_the_fake_hypervisor_is_unknown_to_a_server_without_it(tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "real")
    drivers = cast(dict[Hypervisor, Driver], engine.context.drivers)
    async with open_engine(tmp_path / "real", engine), talking_to(engine) as client:
        source = await stopped(engine)
        made = await engine.snapshot(source.id, kind=DISK)
        del drivers[Hypervisor.FAKE]
        body = {"name": "a", "image": "stillframe/base", "hypervisor": "fake"}
        assert code_of(await client.post("/instances", json=body)) == (400, "invalid_request")
        fork = {"name": "a", "target_hypervisor": "fake"}
        asked = await client.post(f"/snapshots/{made.id}/fork", json=fork)
        assert code_of(asked) == (400, "invalid_request")


# -- routes -----------------------------------------------------------------------------------
async def test_stats_are_what_the_kernel_counts_of_the_vmm(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    source = await running(engine)
    stats = (await client.get("/instances/source/stats")).json()
    assert (stats["instance_id"], stats["instance_name"]) == (source.id, "source")
    assert (stats["allocated_vcpus"], stats["allocated_memory_bytes"]) == (1, source.memory_bytes)
    assert stats["cpu_seconds"] > 0
    assert stats["memory_vms_bytes"] > stats["memory_rss_bytes"] > 0
    assert stats["memory_utilization_ratio"] == pytest.approx(
        stats["memory_rss_bytes"] / source.memory_bytes, abs=1e-4
    )
    assert not {"network_rx_bytes", "network_tx_bytes"} & set(stats)  # nothing counts them
    await engine.stop(source.id)
    rest = (await client.get("/instances/source/stats")).json()
    assert (rest["cpu_seconds"], rest["memory_rss_bytes"], rest["network_rx_bytes"]) == (0, 0, 0)
    assert code_of(await client.get("/instances/none/stats")) == (404, "not_found")


async def test_stats_tell_what_a_tap_device_counts(
    client: httpx.AsyncClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await running(engine)
    counted = {engine.context.live[source.id].machine.process.pid: Traffic(received=3, sent=5)}
    monkeypatch.setattr(capacity, "device_traffic", lambda pid, device: counted[pid])
    stats = (await client.get("/instances/source/stats")).json()
    assert (stats["network_rx_bytes"], stats["network_tx_bytes"]) == (5, 3)  # the guest's view


async def test_an_image_is_given_another_name(client: httpx.AsyncClient, engine: Engine) -> None:
    path, wanted = "/images/stillframe%2Fbase/tag", {"target": "team/app:1.0"}
    assert code_of(await client.post(path, json=wanted)) == (404, "not_found")
    base = await engine.context.images.ensure("stillframe/base", tags={"a": "b"})
    tagged = await client.post(path, json=wanted)
    assert tagged.status_code == 201
    assert tagged.json()["name"] == "docker.io/team/app:1.0"
    assert (tagged.json()["digest"], tagged.json()["tags"]) == (base.digest, {"a": "b"})
    for bad in ("team/app@" + base.digest, "Not Good", "stillframe/base:other"):
        refused = await client.post(path, json={"target": bad})
        assert code_of(refused) == (400, "invalid_name")
    # Each name stands for the image by itself.
    assert (await client.delete("/images/stillframe%2Fbase")).status_code == 204
    made = await client.post("/instances", json={"name": "box", "image": "team/app:1.0"})
    assert made.status_code == 201, made.text


async def test_an_image_that_is_not_ready_gets_no_other_name(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    base = await engine.context.images.ensure("stillframe/base")
    engine.context.records.put(replace(base, status=ImageStatus.FAILED))
    refused = await client.post("/images/stillframe%2Fbase/tag", json={"target": "app:1"})
    assert code_of(refused) == (409, "conflict")


async def test_routes_that_are_not_carried_out_say_so() -> None:
    async with talking_to(DoubleEngine()) as client:
        for method, path, scope in absent.ABSENT:
            here = path.replace("{id}", "web").replace("{volume_id}", "data")
            answer = await client.request(method, here, json={})
            assert code_of(answer) == (501, "not_supported"), path
            assert answer.json()["message"] == f"{method} {path} is not supported by this server"
            stranger = bearer(permissions=["snapshot:read"])
            refused = await client.request(method, here, headers=stranger)
            assert code_of(refused) == (403, "Forbidden")
            assert refused.json()["message"] == f"missing required scope: {scope}"
        status = (await client.get("/instances/web/auto-standby/status")).json()
        assert (status["supported"], status["status"]) == (False, "unsupported")
        gone = await client.get("/instances/none/auto-standby/status")
        assert code_of(gone) == (404, "not_found")
        assert (await client.get("/nowhere")).status_code == 404


async def test_the_document_has_the_contracts_names_too() -> None:
    async with talking_to(DoubleEngine()) as client:
        document = (await client.get("/openapi.json")).json()
        for path in ("/spec.json", "/spec.yaml"):
            answer = await client.get(path, headers={"Authorization": ""})
            assert answer.json() == document
        page = await client.get("/swagger", follow_redirects=True)
        assert page.status_code == 200
        assert "swagger" in page.text


async def test_resources_say_what_is_enforced(client: httpx.AsyncClient, engine: Engine) -> None:
    there_is = (await client.get("/resources")).json()["memory"]["capacity"]
    for number in range(2):
        body = {
            "name": f"big-{number}",
            "image": "stillframe/base",
            "size": str(there_is * 9 // 10),
        }
        assert (await client.post("/instances", json=body)).status_code == 201
    told = (await client.get("/resources")).json()
    assert told["memory"]["allocated"] > told["memory"]["capacity"]
    enforced = {kind: told[kind]["enforced"] for kind in ("cpu", "memory", "disk", "network")}
    assert enforced == {"cpu": False, "memory": False, "disk": True, "network": False}


# -- commands ---------------------------------------------------------------------------------
class CutOff(DoubleSession):
    """A command whose guest goes away while it runs."""

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        yield 1, b"so far"
        raise GuestFailure("the guest agent's stream ended")


class NoSuchCommand(DoubleSession):
    """A command that the guest could not start."""

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        raise GuestFailure("no such file", code="exec_failed", errno="ENOENT")
        yield 1, b""


class ExecDouble(DoubleEngine):
    kind: type[DoubleSession] = CutOff

    async def exec(self, instance_id: str, request: Any) -> DoubleSession:
        return self.kind()


@pytest.fixture
def exec_double() -> ExecDouble:
    return ExecDouble()


@pytest.fixture
def url(exec_double: ExecDouble) -> Iterator[str]:
    with served(app_over(exec_double)) as url:
        yield url


def test_a_command_that_is_cut_off_has_no_exit_code(url: str, exec_double: ExecDouble) -> None:
    address = url.replace("http", "ws") + "/instances/web/exec"
    with connect(address, additional_headers=bearer()) as socket:
        socket.send(json.dumps({"command": ["sleep", "100"]}))
        assert socket.recv(10) == b"so far"
        with pytest.raises(ConnectionClosedError) as closed:
            socket.recv(10)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (
        1011,
        "the guest agent's stream ended",
    )
    exec_double.kind = NoSuchCommand
    with connect(address, additional_headers=bearer()) as socket:
        socket.send(json.dumps({"command": ["nope"]}))
        assert socket.recv(10) == b"Error: no such file\r\n"
        assert socket.recv(10) == '{"exitCode":127}'
