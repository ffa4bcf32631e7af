"""Forks over HTTP: one, many at once, warm ones; and the metrics. The engine only remembers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from stillframe.api.border import MetricsListener
from stillframe.engine.interface import ForkRequest, WarmStatus
from stillframe.model.errors import (
    Conflict,
    InvalidRequest,
    NameConflict,
    RateLimited,
    StillframeError,
    StorageFull,
    VmmFailure,
)
from stillframe.model.states import InstanceState
from stillframe.model.values import Hypervisor
from support.api_double import PRIVATE, DoubleEngine, app_over, bearer, instance, snapshot

SNAPSHOT = "s" * 24
FORK, FORKS, WARM = (f"/snapshots/{SNAPSHOT}/{last}" for last in ("fork", "forks", "warm"))


@pytest.fixture
def engine() -> DoubleEngine:
    return DoubleEngine(snapshots=[snapshot(instance())])


@pytest.fixture
def client(engine: DoubleEngine) -> Iterator[TestClient]:
    with TestClient(app_over(engine), headers=bearer()) as client:
        yield client


def taken(name: str) -> NameConflict:
    return NameConflict(f"an instance named {name!r} already exists", hint="choose another name")


# -- one fork ---------------------------------------------------------------------------------
def test_one_fork_with_the_contracts_fields_and_ours(
    client: TestClient, engine: DoubleEngine
) -> None:
    answer = client.post(FORK, json={"name": "a"})
    assert (answer.status_code, answer.json()["name"]) == (201, "a")
    assert engine.last("fork_snapshot")[0] == (SNAPSHOT, ForkRequest("a"))
    options = {"tags": {"team": "x"}, "env": {"KEY": "value"}, "target_state": "Standby"}
    assert client.post(FORK, json={"name": "b", **options}).json()["state"] == "Standby"
    assert engine.last("fork_snapshot")[0][1] == ForkRequest(
        "b", InstanceState.STANDBY, tags={"team": "x"}, env={"KEY": "value"}
    )
    client.post(FORK, json={"name": "c", "tags": {}})
    assert engine.last("fork_snapshot")[0][1].tags == {}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": "Not-Good"}, "invalid_request"),
        ({"tags": {"a{": "1"}}, "invalid_request"),
        ({"env": {"A=B": "1"}}, "Bad Request"),
        ({"env": {"A": "1\0"}}, "Bad Request"),
        ({"target_state": "Paused"}, "Bad Request"),
    ],
)
def test_one_fork_with_bad_options_is_refused(
    client: TestClient, engine: DoubleEngine, change: dict[str, Any], code: str
) -> None:
    answer = client.post(FORK, json={"name": "a", **change})
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert engine.calls == []


# -- many forks -------------------------------------------------------------------------------
def requests_of(engine: DoubleEngine) -> list[ForkRequest]:
    requests: list[ForkRequest] = engine.last("fork_many")[0][1]
    return requests


def test_many_forks_are_numbered_from_one(client: TestClient, engine: DoubleEngine) -> None:
    answer = client.post(FORKS, json={"count": 3, "name_prefix": "web"})
    body = answer.json()
    assert answer.status_code == 201
    assert (body["succeeded"], body["failed"]) == (3, 0)
    assert [outcome["name"] for outcome in body["outcomes"]] == ["web-1", "web-2", "web-3"]
    assert requests_of(engine) == [ForkRequest(f"web-{number}") for number in (1, 2, 3)]


def test_an_instance_among_outcomes_is_as_it_is_elsewhere(
    client: TestClient, engine: DoubleEngine
) -> None:
    (outcome,) = client.post(FORKS, json={"count": 1, "name_prefix": "w"}).json()["outcomes"]
    engine.instances = [instance("w-1")]
    assert set(outcome) == {"name", "instance"}
    assert outcome["instance"] == client.get("/instances/w-1").json()
    assert outcome["instance"]["expires_at"] is None


def test_an_override_changes_the_fork_of_its_place(
    client: TestClient, engine: DoubleEngine
) -> None:
    body = {
        "count": 3,
        "name_prefix": "web",
        "target_state": "Stopped",
        "target_hypervisor": "qemu",
        "tags": {"team": "x", "role": "worker"},
        "env": {"A": "1"},
        "overrides": [
            {},
            {"name": "chief", "target_state": "Running", "tags": {"role": "chief"},
             "env": {"B": "2"}},
        ],
    }  # fmt: skip
    assert client.post(FORKS, json=body).status_code == 201
    stopped, qemu = InstanceState.STOPPED, Hypervisor.QEMU
    common = {"team": "x", "role": "worker"}
    assert requests_of(engine) == [
        ForkRequest("web-1", stopped, qemu, common, {"A": "1"}),
        ForkRequest(
            "chief", InstanceState.RUNNING, qemu, {"team": "x", "role": "chief"},
            {"A": "1", "B": "2"},
        ),
        ForkRequest("web-3", stopped, qemu, common, {"A": "1"}),
    ]  # fmt: skip


def test_names_may_all_come_from_overrides(client: TestClient, engine: DoubleEngine) -> None:
    body = {"count": 2, "overrides": [{"name": "a"}, {"name": "b"}]}
    assert client.post(FORKS, json=body).status_code == 201
    assert requests_of(engine) == [ForkRequest("a"), ForkRequest("b")]


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ({}, "Bad Request", "count"),
        ({"count": 0}, "Bad Request", "count"),
        ({"count": 1001}, "Bad Request", "count"),
        ({"count": "3"}, "Bad Request", "count"),
        ({"count": 2.0}, "Bad Request", "count"),
        ({"count": 1, "overrides": [{"name": 7}]}, "Bad Request", "overrides.0.name"),
        ({"count": 1, "overrides": [None]}, "Bad Request", "overrides.0"),
        ({"count": 1, "overrides": [{"name": "a", "target_state": "Paused"}]}, "Bad Request",
         "target_state"),
        ({"count": 1, "name_prefix": "a", "env": {"": "1"}}, "Bad Request", "env"),
        ({"count": 2}, "invalid_request", "fork 1 has no name"),
        ({"count": 2, "overrides": [{"name": "a"}]}, "invalid_request", "fork 2 has no name"),
        ({"count": 1, "name_prefix": ""}, "invalid_request", "invalid name '-1'"),
        ({"count": 1, "name_prefix": "Web"}, "invalid_request", "invalid name 'Web-1'"),
        ({"count": 10, "name_prefix": "a" * 61}, "invalid_request", "aaa-10'"),
        ({"count": 1, "overrides": [{"name": "a"}, {"name": "b"}]}, "invalid_request",
         "2 overrides for 1 forks"),
        ({"count": 2, "overrides": [{"name": "a"}, {"name": "a"}]}, "invalid_request", "'a'"),
        ({"count": 2, "name_prefix": "w", "overrides": [{"name": "w-2"}]}, "invalid_request",
         "'w-2'"),
        ({"count": 1, "name_prefix": "a", "tags": {"b{": ""}}, "invalid_request", "invalid tag"),
        ({"count": 1, "overrides": [{"name": "a", "tags": {str(n): "" for n in range(51)}}]},
         "invalid_request", "51 tags"),
    ],
)  # fmt: skip
def test_a_bad_wish_for_many_is_refused_before_anything_is_made(
    client: TestClient, engine: DoubleEngine, body: dict[str, Any], code: str, text: str
) -> None:
    answer = client.post(FORKS, json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert text in answer.json()["message"]
    assert engine.calls == []


def test_the_good_ones_stay_when_some_fail(client: TestClient, engine: DoubleEngine) -> None:
    engine.failed_forks["web-2"] = taken("web-2")
    answer = client.post(FORKS, json={"count": 3, "name_prefix": "web"})
    body = answer.json()
    assert answer.status_code == 201
    assert (body["succeeded"], body["failed"]) == (2, 1)
    assert ["instance" in outcome for outcome in body["outcomes"]] == [True, False, True]
    assert body["outcomes"][1] == {
        "name": "web-2",
        "error": {
            "code": "conflict",
            "message": "an instance named 'web-2' already exists",
            "details": [{"code": "hint", "message": "choose another name"}],
        },
    }


def test_none_made_is_the_first_error_with_a_detail_for_each(
    client: TestClient, engine: DoubleEngine
) -> None:
    engine.failed_forks = {"web-1": taken("web-1"), "web-2": StorageFull("no space is left")}
    answer = client.post(FORKS, json={"count": 2, "name_prefix": "web"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
    body = answer.json()
    first, second = body.pop("details")
    assert body == {
        "code": "conflict",
        "message": "no fork was made: an instance named 'web-1' already exists",
    }
    assert first == {
        "code": "conflict",
        "message": "web-1: an instance named 'web-1' already exists (hint: choose another name)",
    }
    assert second["code"] == "storage_full"
    assert second["message"].startswith("web-2: no space is left (reference: ")


def test_failures_of_the_host_are_logged_under_the_reference_they_name(
    client: TestClient, engine: DoubleEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failed_forks["w-1"] = VmmFailure(f"cannot open {PRIVATE}/x")
    with caplog.at_level(logging.ERROR, "stillframe.api"):
        some = client.post(FORKS, json={"count": 2, "name_prefix": "w"})
        none = client.post(FORKS, json={"count": 1, "name_prefix": "w"})
    error = some.json()["outcomes"][0]["error"]
    assert (error["code"], error["message"]) == ("hypervisor_error", "cannot open <data>/x")
    assert str(PRIVATE) not in some.text + none.text
    assert (none.status_code, none.headers["x-should-retry"]) == (500, "false")
    references = [record.getMessage().split()[0] for record in caplog.records]
    assert references[0] == error["details"][0]["message"]
    assert f"(reference: {references[1]})" in none.json()["details"][0]["message"]
    assert len(references) == 2


def test_none_made_for_want_of_a_moment_may_be_tried_again(
    client: TestClient, engine: DoubleEngine
) -> None:
    engine.failed_forks["w-1"] = RateLimited("too many at once")
    answer = client.post(FORKS, json={"count": 1, "name_prefix": "w"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Conflict("the snapshot is being deleted"), 409, "conflict"),
        (InvalidRequest("target_state may be Running"), 400, "invalid_request"),
    ],
)
def test_what_concerns_all_forks_is_one_error(
    client: TestClient, engine: DoubleEngine, error: StillframeError, status: int, code: str
) -> None:
    engine.failures["fork_many"] = error
    answer = client.post(FORKS, json={"count": 2, "name_prefix": "w"})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["x-should-retry"] == "false"


# -- warm forks -------------------------------------------------------------------------------
def test_warm_forks_are_set_and_shown(client: TestClient, engine: DoubleEngine) -> None:
    engine.warm = WarmStatus(target=1, ready=1, memory_bytes=4096)
    answer = client.put(WARM, json={"count": 3})
    assert answer.status_code == 200
    assert engine.last("set_warm")[0] == (SNAPSHOT, 3)
    expected = {"target": 3, "ready": 1, "filling": 2, "memory_bytes": 4096}
    assert answer.json() == client.get(WARM).json() == expected
    assert client.put(WARM, json={"count": 0}).json()["target"] == 0


def test_the_limit_of_warm_forks_is_told_without_paths(
    client: TestClient, engine: DoubleEngine
) -> None:
    engine.warm = WarmStatus(target=2, ready=1, limited_by=f"no room in {PRIVATE}")
    assert client.get(WARM).json()["limited_by"] == "no room in <data>"


@pytest.mark.parametrize("body", [{}, {"count": -1}, {"count": 1001}, {"count": True}])
def test_a_bad_number_of_warm_forks_is_refused(
    client: TestClient, engine: DoubleEngine, body: dict[str, Any]
) -> None:
    answer = client.put(WARM, json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "Bad Request")
    assert engine.calls == []


def test_a_stopped_snapshot_cannot_be_kept_warm(client: TestClient, engine: DoubleEngine) -> None:
    engine.failures["set_warm"] = InvalidRequest("a Stopped snapshot has no memory to load")
    answer = client.put(WARM, json={"count": 1})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


# -- who may, and which ---------------------------------------------------------------------
REQUESTS = [
    ("POST", "fork", {"name": "a"}, "snapshot:write"),
    ("POST", "forks", {"count": 1, "name_prefix": "a"}, "snapshot:write"),
    ("PUT", "warm", {"count": 1}, "snapshot:write"),
    ("GET", "warm", None, "snapshot:read"),
]


@pytest.mark.parametrize(("method", "last", "body", "scope"), REQUESTS)
def test_forks_need_a_token_of_their_scope(
    engine: DoubleEngine, method: str, last: str, body: dict[str, Any] | None, scope: str
) -> None:
    path = f"/snapshots/{SNAPSHOT}/{last}"
    other = "snapshot:read" if scope == "snapshot:write" else "snapshot:write"
    with TestClient(app_over(engine)) as client:
        assert client.request(method, path, json=body).status_code == 401
        refused = client.request(method, path, json=body, headers=bearer(permissions=[other]))
        assert (refused.status_code, refused.json()["message"]) == (
            403, f"missing required scope: {scope}"
        )  # fmt: skip
        assert engine.calls == []
        granted = client.request(method, path, json=body, headers=bearer(permissions=[scope]))
        assert granted.is_success


@pytest.mark.parametrize(("method", "last", "body", "_scope"), REQUESTS)
def test_forks_of_an_unknown_snapshot_are_not_found(
    client: TestClient, method: str, last: str, body: dict[str, Any] | None, _scope: str
) -> None:
    answer = client.request(method, f"/snapshots/{'x' * 24}/{last}", json=body)
    assert answer.status_code == 404
    assert answer.json() == {"code": "not_found", "message": "resource not found"}


# -- metrics ----------------------------------------------------------------------------------
def test_metrics_are_text_for_those_who_may_read_resources(
    client: TestClient, engine: DoubleEngine
) -> None:
    answer = client.get("/metrics", headers=bearer(permissions=["resource:read"]))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.content == engine.metrics()
    other = client.get("/metrics", headers=bearer(permissions=["instance:read"]))
    assert (other.status_code, other.json()["code"]) == (403, "Forbidden")


def test_the_metrics_listener_answers_metrics_without_a_token_and_nothing_else(
    engine: DoubleEngine,
) -> None:
    app = MetricsListener(app_over(engine), engine, ("127.0.0.1", 9464))
    with TestClient(app, base_url="http://127.0.0.1:9464") as there:
        answer = there.get("/metrics")
        assert (answer.status_code, answer.content) == (200, engine.metrics())
        assert there.head("/metrics").content == b""
        engine.calls.clear()
        for method, path in (
            ("GET", "/instances"), ("GET", "/health"), ("POST", "/metrics"),
            ("GET", "/metrics/"), ("GET", "/openapi.json"),
        ):  # fmt: skip
            refused = there.request(method, path, headers=bearer())
            assert (refused.status_code, refused.json()["code"]) == (404, "not_found"), path
    assert engine.calls == []
    for elsewhere in ("http://127.0.0.1:4973", "http://[::1]:9464"):
        with TestClient(app, base_url=elsewhere) as api:
            claimed = api.get("/metrics", headers={"Host": "127.0.0.1:9464"})
            assert claimed.status_code == 401
            assert api.get("/health").status_code == 200
