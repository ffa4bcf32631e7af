"""Images, capabilities, tokens, and the OpenAPI document held against the server."""

from __future__ import annotations

import io
import tarfile
from typing import Any, cast

import httpx
import pytest
import schemathesis
from hypeman import AuthenticationError, Hypeman, PermissionDeniedError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stillframe.model.values import CONTRACT_HYPERVISORS
from support.contract import HYPERVISOR, IMAGE, Maker, Refused, mint
from support.server import Server


def test_health_needs_no_token(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_capabilities_name_what_runs_here(sdk: Hypeman) -> None:
    found = sdk.capabilities.get()
    runtime = next(r for r in found.runtimes if r.name == HYPERVISOR)
    assert runtime.available
    assert {"snapshots", "standby", "fork"} <= set(runtime.features)
    assert [r.name for r in found.runtimes] == sorted(r.name for r in found.runtimes)
    assert {r.name for r in found.runtimes} >= set(CONTRACT_HYPERVISORS)
    assert (found.default_runtime.name, found.default_runtime.available) == (HYPERVISOR, True)


def test_a_token_of_another_server_is_refused(server: Server) -> None:
    with (
        Hypeman(api_key="x.y.z", base_url=server.url) as stranger,
        pytest.raises(AuthenticationError) as refused,
    ):
        stranger.instances.list()
    body: Any = refused.value.body
    assert body == {"code": "Unauthorized", "message": "invalid token"}


def test_a_token_may_do_what_its_scopes_say(server: Server) -> None:
    reader = Hypeman(api_key=mint(server, permissions=["image:read"]), base_url=server.url)
    with reader:
        reader.images.list()
        with pytest.raises(PermissionDeniedError) as refused:
            reader.instances.list()
    body: Any = refused.value.body
    assert body["message"] == "missing required scope: instance:read"


def test_an_image_is_known_by_its_name(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    made = make()
    image = sdk.images.get(IMAGE)
    assert image.status == "ready"
    assert image.digest.startswith("sha256:")
    assert image.name in [known.name for known in sdk.images.list()]
    refused(404, "not_found", sdk.images.get, "docker.io/library/nothing:none")
    error = refused(409, "conflict", sdk.images.delete, IMAGE)
    assert made.name in error.response.text


def test_an_image_is_asked_for(sdk: Hypeman, refused: Refused) -> None:
    image = sdk.images.create(name=IMAGE, tags={})
    assert image.status in ("pending", "pulling", "converting", "ready")
    refused(400, "invalid_name", sdk.images.create, name="Not A Reference")
    refused(400, "invalid_platform", sdk.images.create, name=IMAGE, platform="dos/8086")


def test_an_uploaded_tar_becomes_an_image(server: Server, sdk: Hypeman) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("etc/motd")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))
    answer = httpx.post(
        f"{server.url}/images/import",
        params={"name": "local/tiny:1"},
        content=archive.getvalue(),
        headers={"Authorization": f"Bearer {mint(server)}"},
        timeout=60,
    )
    assert answer.status_code == 201, answer.text
    assert sdk.images.get("local/tiny:1").status == "ready"
    sdk.images.delete("local/tiny:1")
    assert not list(server.data_dir.glob("upload-*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_server_keeps_its_own_document(server: Server) -> None:
    """Generated requests never cause a failure, and answers match the document's schemas."""
    headers = {"Authorization": f"Bearer {mint(server)}"}
    document = httpx.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    # What reaches out to registries or boots VMs is left to the scenarios.
    safe = schema.exclude(method="POST", path=["/instances", "/images", "/images/import"])
    operations = [cast(Any, result).ok() for result in safe.get_all_operations()]
    cases = st.one_of(*(operation.as_strategy() for operation in operations))
    seen = set()

    @settings(
        max_examples=100,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def answers_match(case: schemathesis.Case[Any]) -> None:
        answer = case.call(base_url=server.url, headers=headers, timeout=30)
        assert answer.status_code < 500 or answer.status_code == 501, answer.text
        if answer.status_code != 204:
            case.operation.validate_response(answer)
        seen.add((case.method, case.operation.path))

    answers_match()
    assert len(seen) > 10
