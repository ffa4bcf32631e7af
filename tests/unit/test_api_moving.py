"""Verification, export and import by HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from starlette.testclient import TestClient

from stillframe.api.app import create_app
from stillframe.engine.engine import Engine
from stillframe.engine.interface import EngineInterface
from stillframe.model.errors import Conflict
from stillframe.model.values import SnapshotKind
from stillframe.model.verification import Depth
from support.api_double import PRIVATE, SECRET, DoubleEngine, app_over, bearer, instance, snapshot
from support.engine import running
from support.payloads import flip

MADE = snapshot(instance(), name="ready")
PATH = f"/snapshots/{MADE.id}"


@pytest.fixture
def double() -> DoubleEngine:
    return DoubleEngine(snapshots=[MADE])


@pytest.fixture
def client(double: DoubleEngine) -> TestClient:
    return TestClient(app_over(double), headers=bearer())


def test_a_verification_tells_what_and_where(client: TestClient, double: DoubleEngine) -> None:
    answer = client.post(f"{PATH}/verify", json={"depth": "sample"})
    assert answer.status_code == 200
    assert answer.json() == {
        "snapshot_id": MADE.id, "depth": "sample", "intact": False, "checked_bytes": 1000,
        "total_bytes": 2000, "seconds": 0.5, "bytes_per_second": 2000.0, "damaged_bytes": 4096,
        "damage": [
            {"file": "memory", "offset": 65536, "length": 4096,
             "reason": "memory does not match its digest"}
        ],
        "unchecked": ["devices"],
    }  # fmt: skip
    assert double.last("verify_snapshot") == ((MADE.id, Depth.SAMPLE), {})
    assert client.post(f"{PATH}/verify", json={}).json()["depth"] == "full"
    assert client.post(f"{PATH}/verify", json={"depth": "deep"}).status_code == 400
    assert client.post("/snapshots/none/verify", json={}).status_code == 404


def test_a_verdict_has_reasons(client: TestClient) -> None:
    answer = client.get(f"{PATH}/compatibility")
    assert answer.json() == {
        "snapshot_id": MADE.id, "fork": False, "reasons": ["its memory was captured elsewhere"],
    }  # fmt: skip
    assert client.get("/snapshots/none/compatibility").status_code == 404


def test_an_export_is_a_download_that_can_go_on(client: TestClient, double: DoubleEngine) -> None:
    answer = client.get(f"{PATH}/export", params={"image": "true"})
    assert (answer.status_code, answer.content) == (200, b"one two three")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == f'attachment; filename="{MADE.id}.stillframe"'
    assert double.last("export_snapshot") == ((MADE.id,), {"image": True, "offset": 0, "tag": None})
    assert double.archives[-1].closed
    tag = answer.headers["etag"]
    client.get(f"{PATH}/export", params={"offset": 7}, headers={"If-Match": tag})
    wanted = {"image": False, "offset": 7, "tag": double.archives[-1].tag}
    assert double.last("export_snapshot") == ((MADE.id,), wanted)
    client.get(f"{PATH}/export", headers={"If-Match": "*"})  # any: that names none
    assert double.last("export_snapshot") == ((MADE.id,), {**wanted, "offset": 0, "tag": None})
    assert client.get(f"{PATH}/export", params={"offset": -1}).status_code == 400
    double.failures["export_snapshot"] = Conflict("another one by now")
    assert client.get(f"{PATH}/export").status_code == 409


def test_an_import_takes_any_number_of_bytes(client: TestClient, double: DoubleEngine) -> None:
    body = bytes(9 * 1024 * 1024)  # more than other requests may send
    query = {"name": "copy", "allow_foreign": "true"}
    answer = client.post("/snapshots/import", params=query, content=body)
    assert (answer.status_code, answer.json()["name"]) == (201, "copy")
    options: dict[str, Any] = {"name": "copy", "allow_foreign": True, "add_image": True}
    options |= {"upload": None, "offset": 0}
    assert double.last("import_snapshot") == ((body,), options)
    client.post("/snapshots/import", params={"upload": "u" * 24, "offset": 7}, content=b"x")
    assert double.last("import_snapshot")[1]["offset"] == 7
    status = client.get(f"/snapshots/import/{'u' * 24}")
    assert status.json() == {"upload": "u" * 24, "offset": 1000}


def test_each_route_wants_its_scope(client: TestClient, double: DoubleEngine) -> None:
    reader = bearer(permissions=["snapshot:read"])
    writer = bearer(permissions=["snapshot:write"])
    for headers, status in ((reader, 200), (writer, 403)):
        assert client.get(f"{PATH}/export", headers=headers).status_code == status
        assert client.get(f"{PATH}/compatibility", headers=headers).status_code == status
        assert client.post(f"{PATH}/verify", json={}, headers=headers).status_code == status
    assert client.post("/snapshots/import", content=b"x", headers=reader).status_code == 403
    assert client.post("/snapshots/import", content=b"x", headers=writer).status_code == 201
    # An image that comes along is another right.
    assert double.last("import_snapshot")[1]["add_image"] is False
    both = bearer(permissions=["snapshot:write", "image:write"])
    client.post("/snapshots/import", content=b"x", headers=both)
    assert double.last("import_snapshot")[1]["add_image"] is True


# -- the real engine ------------------------------------------------------------------------------
@pytest.fixture
async def http(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(
        cast(EngineInterface, engine), jwt_secret=SECRET, version="9.9", private_paths=[PRIVATE]
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://server", headers=bearer()
    ) as client:
        yield client


async def test_out_and_in_again(engine: Engine, http: httpx.AsyncClient) -> None:
    source = await engine.stop((await running(engine)).id)
    made = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED, name="ready")
    path = f"/snapshots/{made.id}"
    answer = await http.get(f"{path}/export")
    for known, status in ({}, 400), ({"If-Match": "*"}, 400), ({"If-Match": '"x"'}, 409):
        assert (await http.get(f"{path}/export?offset=1", headers=known)).status_code == status
    known = {"If-Match": answer.headers["etag"]}
    rest = await http.get(f"{path}/export?offset=9", headers=known)
    assert rest.content == answer.content[9:]
    taken = await http.post("/snapshots/import", params={"name": "copy"}, content=answer.content)
    assert taken.status_code == 201
    copy: dict[str, Any] = taken.json()
    assert copy["id"] != made.id
    assert (copy["name"], copy["source_instance_id"]) == ("copy", source.id)
    assert (await http.get(f"/snapshots/{copy['id']}")).json() == copy
    assert (await http.get(f"/snapshots/{copy['id']}/compatibility")).json()["fork"] is True
    for data, code in (
        (answer.content[:-1], "damaged_archive"),
        (answer.content[:300] + b"?" + answer.content[301:], "damaged_archive"),
        (b"x" * 100, "invalid_request"),
    ):
        refused = await http.post("/snapshots/import?name=third", content=data)
        assert (refused.status_code, refused.json()["code"]) == (400, code)
    assert (await http.post("/snapshots/import", content=answer.content)).status_code == 409
    bad = await http.post("/snapshots/import?name=Not+Good", content=answer.content)
    assert bad.status_code == 400
    assert len((await http.get("/snapshots")).json()) == 2


async def test_a_damaged_one_says_so_wherever_it_appears(
    engine: Engine, http: httpx.AsyncClient
) -> None:
    source = await engine.stop((await running(engine)).id)
    made = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED)
    path = f"/snapshots/{made.id}"
    assert "damaged" not in (await http.get(path)).json()
    overlay = engine.context.data.snapshot(made.id).overlay
    flip(overlay, 8 * (overlay.stat().st_size - 1))
    found = (await http.post(f"{path}/verify", json={})).json()
    assert found["intact"] is False
    assert found["damage"][0]["file"] == "overlay.raw"
    (listed,) = (await http.get("/snapshots")).json()
    assert listed["damaged"].startswith("overlay.raw: ")
    for answer in (
        await http.get(f"{path}/export"),
        await http.post(f"{path}/fork", json={"name": "fork"}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (500, "damaged")
        assert "overlay.raw" in answer.json()["message"]
