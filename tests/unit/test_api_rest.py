"""The REST routes: shapes, codes and translations, over an engine that only remembers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from stillframe.model.errors import (
    InvalidState,
    NameConflict,
    RateLimited,
    VmmFailure,
)
from stillframe.model.states import InstanceState
from stillframe.model.values import DeviceLimits, Hypervisor, SnapshotKind
from stillframe.vmm.driver import DriverProbe
from support.api_double import PRIVATE, DoubleEngine, app_over, bearer, instance, snapshot

INJECT = {"header": "Authorization", "format": "Bearer ${value}"}


@pytest.fixture
def engine() -> DoubleEngine:
    return DoubleEngine()


@pytest.fixture
def client(engine: DoubleEngine, tmp_path: Path) -> Iterator[TestClient]:
    app = app_over(engine, upload_dir=tmp_path)
    with TestClient(app, headers=bearer()) as client:
        yield client


def test_an_instance_has_the_contracts_fields(client: TestClient) -> None:
    body = client.get("/instances/web").json()
    assert body["size"] == "1.0 GB"
    assert body["overlay_size"] == "10.0 GB"
    assert body["created_at"] == "2026-01-02T03:04:05Z"
    assert body["network"] == {"enabled": True, "name": "default"}
    assert body["current_phase"] == "running"
    assert body["expires_at"] is None
    assert "state_error" not in body


def test_create_passes_every_option_on(client: TestClient, engine: DoubleEngine) -> None:
    answer = client.post(
        "/instances",
        json={
            "name": "box",
            "image": "alpine",
            "size": "512MB",
            "overlay_size": "2GB",
            "vcpus": 3,
            "hypervisor": "qemu",
            "env": {"A": "1"},
            "tags": {"team": "x"},
            "cmd": ["sh"],
            "network": {"enabled": False, "bandwidth_upload": "8Mbps"},
            "disk_io_bps": "100MB/s",
            "snapshot_policy": {"compression": {"enabled": True, "algorithm": "LZ4"}},
            "skip_kernel_headers": True,
            "ttl": "0s",
            "future_option": 1,
        },
    )
    assert answer.status_code == 201, answer.text
    assert answer.json()["state"] == "Initializing"
    (request,), _ = engine.last("create")
    assert (request.memory_bytes, request.overlay_bytes, request.vcpus) == (2**29, 2**31, 3)
    assert request.hypervisor is Hypervisor.QEMU
    assert request.network_enabled is False
    assert request.limits == DeviceLimits(disk=100 << 20, upload=1_000_000)
    assert request.snapshot_policy.compression.level == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": None}, "Bad Request"),
        ({"vcpus": "2"}, "Bad Request"),
        ({"hypervisor": "xen"}, "Bad Request"),
        ({"env": {"A=B": "1"}}, "Bad Request"),
        ({"cmd": ["a\0b"]}, "Bad Request"),
        ({"name": "Not-Good"}, "invalid_request"),
        ({"tags": {"a{": "1"}}, "invalid_request"),
        ({"size": "much"}, "invalid_size"),
        ({"overlay_size": "much"}, "invalid_overlay_size"),
        ({"hotplug_size": "much"}, "invalid_hotplug_size"),
        ({"disk_io_bps": "much"}, "invalid_disk_io_bps"),
        ({"network": {"bandwidth_download": "1MBps"}}, "invalid_bandwidth_download"),
        ({"network": {"bandwidth_upload": "much"}}, "invalid_bandwidth_upload"),
        ({"platform": "windows/amd64"}, "invalid_platform"),
        ({"ttl": "soon"}, "invalid_ttl"),
        ({"auto_standby": {"enabled": True}}, "invalid_auto_standby"),
        ({"health_check": {"type": "http"}}, "invalid_health_check"),
        ({"restart_policy": {"backoff": "-1s"}}, "invalid_restart_policy"),
        (
            {"snapshot_policy": {"compression": {"enabled": True, "level": 20}}},
            "invalid_snapshot_policy",
        ),
    ],
)
def test_a_bad_option_is_refused_with_its_code(
    client: TestClient, engine: DoubleEngine, change: dict[str, Any], code: str
) -> None:
    answer = client.post("/instances", json={"name": "box", "image": "alpine", **change})
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert not [call for call in engine.calls if call[0] == "create"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("volumes", [{"volume_id": "v", "mount_path": "/m"}]),
        ("devices", ["gpu0"]),
        ("gpu", {"profile": "p"}),
        ("health_check", {"type": "tcp", "tcp": {"port": 80}}),
        ("restart_policy", {"policy": "always"}),
        ("auto_standby", {"enabled": True, "idle_timeout": "5m"}),
        ("credentials", {"K": {"source": {"env": "E"}, "inject": [{"as": INJECT}]}}),
        ("hotplug_size", "1GB"),
        ("network.egress", {"enabled": True}),
        ("skip_guest_agent", True),
    ],
)
def test_an_option_for_later_is_refused_by_name(
    client: TestClient, field: str, value: object
) -> None:
    outer, _, inner = field.partition(".")
    options = {outer: {inner: value} if inner else value}
    answer = client.post("/instances", json={"name": "box", "image": "alpine", **options})
    assert (answer.status_code, answer.json()["code"]) == (501, "not_supported")
    assert {"code": "field", "message": field} in answer.json()["details"]
    assert answer.headers["x-should-retry"] == "false"


def test_a_duplicate_name_is_400_on_create_and_409_elsewhere(
    client: TestClient, engine: DoubleEngine
) -> None:
    engine.failures = {
        name: NameConflict("name web is taken", hint="choose another", name="web")
        for name in ("create", "fork", "fork_snapshot", "snapshot")
    }
    engine.snapshots = [snapshot(engine.instances[0])]
    answers = [
        client.post("/instances", json={"name": "web", "image": "a"}),
        client.post("/instances/web/fork", json={"name": "web"}),
        client.post(f"/snapshots/{engine.snapshots[0].id}/fork", json={"name": "web"}),
        client.post("/instances/web/snapshots", json={"kind": "Standby", "name": "web"}),
    ]
    assert [(a.status_code, a.json()["code"]) for a in answers] == [
        (400, "name_conflict"),
        (409, "name_conflict"),
        (409, "conflict"),
        (409, "conflict"),
    ]
    hint = {"code": "hint", "message": "choose another"}
    assert all(hint in answer.json()["details"] for answer in answers)


def test_a_wrong_state_keeps_each_operations_code(client: TestClient, engine: DoubleEngine) -> None:
    wrong = {"stop", "snapshot", "restore_snapshot"}
    engine.failures = {name: InvalidState("not now", state="Paused") for name in wrong}
    engine.snapshots = [snapshot(engine.instances[0])]
    stop = client.post("/instances/web/stop")
    capture = client.post("/instances/web/snapshots", json={"kind": "Stopped"})
    back = client.post(f"/instances/web/snapshots/{engine.snapshots[0].id}/restore", json={})
    assert [a.status_code for a in (stop, capture, back)] == [409, 409, 409]
    assert [a.json()["code"] for a in (stop, capture, back)] == [
        "invalid_state",
        "conflict",
        "invalid_state",
    ]
    assert stop.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("sent", [{}, {"content": b""}, {"json": {}}])
def test_optional_bodies_may_be_absent_or_empty(
    client: TestClient, engine: DoubleEngine, sent: dict[str, Any]
) -> None:
    headers = {"Content-Type": "application/json"}
    for verb in ("start", "stop", "standby", "restore"):
        assert client.post(f"/instances/web/{verb}", headers=headers, **sent).status_code == 200
    assert engine.last("start")[1] == {"entrypoint": None, "cmd": None}


def test_standby_options_are_checked(client: TestClient, engine: DoubleEngine) -> None:
    body = {"compression": {"enabled": True}, "compression_delay": "90s"}
    assert client.post("/instances/web/standby", json=body).status_code == 200
    options = engine.last("standby")[1]
    assert options["compression_delay"] == timedelta(seconds=90)
    assert options["compression"].level == 1
    for bad, code in (
        ({"compression": {"enabled": True, "level": 20}}, "invalid_snapshot_compression"),
        ({"compression": {"enabled": True, "algorithm": "zip"}}, "invalid_snapshot_compression"),
        ({"compression_delay": "-1s"}, "invalid_compression_delay"),
        ({"compression": {}}, "Bad Request"),
    ):
        answer = client.post("/instances/web/standby", json=bad)
        assert (answer.status_code, answer.json()["code"]) == (400, code)


def test_wait_caps_and_checks_its_timeout(client: TestClient, engine: DoubleEngine) -> None:
    answer = client.get("/instances/web/wait", params={"state": "Stopped", "timeout": "1h"})
    assert answer.json() == {"state": "Stopped", "timed_out": False}
    assert engine.last("wait")[1]["timeout"] == timedelta(minutes=5)
    client.get("/instances/web/wait", params={"state": "Stopped"})
    assert engine.last("wait")[1]["timeout"] == timedelta(seconds=60)
    for params, code in (
        ({"state": "Unknown"}, "invalid_state"),
        ({"state": "Stopped", "timeout": "0s"}, "invalid_timeout"),
        ({"state": "Stopped", "timeout": "x"}, "invalid_timeout"),
        ({"state": "Gone"}, "Bad Request"),
        ({}, "Bad Request"),
    ):
        answer = client.get("/instances/web/wait", params=params)
        assert (answer.status_code, answer.json()["code"]) == (400, code)


def test_lists_pass_their_filters_on(client: TestClient, engine: DoubleEngine) -> None:
    assert client.get("/instances?state=Running&tags%5Bteam%5D=a%20b&tags[x]=").status_code == 200
    assert engine.last("list_instances")[1] == {
        "state": InstanceState.RUNNING,
        "tags": {"team": "a b", "x": ""},
    }
    client.get("/snapshots?kind=Stopped&name=n&source_instance_id=i")
    assert engine.last("list_snapshots")[1] == {
        "source_instance_id": "i",
        "kind": SnapshotKind.STOPPED,
        "name": "n",
        "tags": None,
    }
    assert client.get("/instances?state=Nope").json()["code"] == "Bad Request"
    assert client.get("/images?tags=team").status_code == 400


def test_a_snapshot_has_the_contracts_fields_and_ours(client: TestClient) -> None:
    answer = client.post("/instances/web/snapshots", json={"kind": "Standby", "name": "one"})
    assert answer.status_code == 201
    body = answer.json()
    assert body["compression_state"] == "none"
    assert (body["size_bytes"], body["stored_bytes"], body["pause_ms"]) == (4096, 1024, 12.5)
    refused = client.post(
        "/instances/web/snapshots", json={"kind": "Stopped", "compression": {"enabled": True}}
    )
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
    assert client.get(f"/snapshots/{body['id']}").json() == body
    assert client.delete(f"/snapshots/{body['id']}").status_code == 204
    assert client.get("/snapshots/one").json() == {
        "code": "not_found",
        "message": "resource not found",
    }


def test_image_names_are_one_percent_encoded_segment(
    client: TestClient, engine: DoubleEngine
) -> None:
    answer = client.get("/images/docker.io%2Flibrary%2Falpine%3Alatest")
    assert answer.json()["status"] == "ready"
    assert client.delete("/images/docker.io%2Flibrary%2Falpine%3Alatest").status_code == 204
    assert engine.last("delete_image")[0] == ("docker.io/library/alpine:latest",)
    assert client.post("/images", json={"name": "alpine", "tags": {"a": "b"}}).status_code == 202
    assert client.post("/images", json={"name": ""}).json()["code"] == "Bad Request"


def test_an_encoded_slash_cannot_name_another_route(
    client: TestClient, engine: DoubleEngine
) -> None:
    assert client.post("/instances/web%2Fstop").status_code == 404
    assert not engine.calls


def test_an_import_is_streamed_to_a_file_that_goes_again(
    client: TestClient, engine: DoubleEngine, tmp_path: Path
) -> None:
    content = b"t" * (9 * 1024 * 1024)
    answer = client.post("/images/import?name=mine:1&tags[a]=b", content=content)
    assert answer.status_code == 201, answer.text
    (name, path, stored), options = engine.last("import_image")
    assert (name, stored == content, options) == ("mine:1", True, {"tags": {"a": "b"}})
    assert path.is_relative_to(tmp_path)
    assert not list(tmp_path.iterdir())
    assert client.post("/images/import", content=b"t").json()["code"] == "Bad Request"


def test_bodies_are_bounded_and_bad_json_is_a_bad_request(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    large = b" " * (8 * 1024 * 1024 + 1)
    assert client.post("/instances", content=large, headers=headers).status_code == 413
    chunks = iter([large[: len(large) // 2 + 1]] * 2)
    assert client.post("/instances", content=chunks, headers=headers).status_code == 413
    for bad in (b"{", b"[" * 200_000, b'"\xff"', b"[]", b"null", b"{}"):
        answer = client.post("/instances", content=bad, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "Bad Request"), bad[:10]


def test_a_failure_of_the_host_tells_no_paths(client: TestClient, engine: DoubleEngine) -> None:
    engine.failures["stop"] = VmmFailure(
        f"cannot open {PRIVATE}/instances/x", file=PRIVATE / "x", pid=7
    )
    answer = client.post("/instances/web/stop")
    assert (answer.status_code, answer.json()["code"]) == (500, "hypervisor_error")
    assert str(PRIVATE) not in answer.text
    assert [d["code"] for d in answer.json()["details"]] == ["pid", "reference"]


def test_the_unforeseen_is_a_500_with_a_reference(client: TestClient, engine: DoubleEngine) -> None:
    engine.failures["stop"] = ZeroDivisionError(f"in {PRIVATE}")
    answer = client.post("/instances/web/stop")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "ZeroDivision" not in answer.text
    assert answer.json()["details"][0]["code"] == "reference"


def test_too_much_at_once_may_be_retried(client: TestClient, engine: DoubleEngine) -> None:
    engine.failures["create"] = RateLimited("too many creations")
    answer = client.post("/instances", json={"name": "box", "image": "alpine"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert "x-should-retry" not in answer.headers


def test_stat_needs_a_running_instance(client: TestClient, engine: DoubleEngine) -> None:
    engine.files["/etc/x"] = b"abc"
    assert client.get("/instances/web/stat?path=/etc/x").json()["size"] == 3
    assert client.get("/instances/web/stat?path=/none").json() == {"exists": False}
    assert client.get("/instances/web/stat").json()["code"] == "Bad Request"
    engine.instances = [instance(state=InstanceState.STANDBY)]
    answer = client.get("/instances/web/stat?path=/etc/x")
    assert answer.json()["message"] == "instance must be running (current state: Standby)"


def test_capabilities_are_what_the_drivers_found(client: TestClient, engine: DoubleEngine) -> None:
    engine.probes = [
        DriverProbe(Hypervisor.QEMU, available=True, version="7.2", features=("standby", "fork")),
        DriverProbe(
            Hypervisor.FIRECRACKER, available=False, reason=f"no binary in {PRIVATE}", hint="get it"
        ),
    ]
    body = client.get("/capabilities").json()
    assert [runtime["name"] for runtime in body["runtimes"]] == ["firecracker", "qemu"]
    assert body["runtimes"][0]["reason"] == "no binary in <data>"
    assert body["default_runtime"] == {"name": "qemu", "available": True}
    assert body["server"] == {"version": "9.9", "api_version": "0.3.0"}
    assert "snapshots" not in body["features"]


def test_delete_is_graceful_unless_told_otherwise(client: TestClient, engine: DoubleEngine) -> None:
    assert client.delete("/instances/web").status_code == 204
    assert engine.last("delete")[1] == {"graceful": True}
    client.delete("/instances/web?graceful_shutdown=false")
    assert engine.last("delete")[1] == {"graceful": False}


def test_the_document_names_the_error_body_and_no_422(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], (method, path)
    assert "HTTPValidationError" not in json.dumps(document)
