"""A real server with the fake hypervisor, and the official SDK as its client."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypeman import APIStatusError, Hypeman
from hypeman.types import Instance

from support.contract import HYPERVISOR, IMAGE, Maker, Refused, mint
from support.server import Server, eventually_empty, running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all scenarios; at the end nothing of it is left, whatever happened."""
    data_dir = tmp_path_factory.mktemp("contract") / "data"
    environment = {"STILLFRAME_DEFAULT_HYPERVISOR": HYPERVISOR}
    with running_server(data_dir, environment=environment) as running:
        yield running
    eventually_empty(running.vmm_pids)


@pytest.fixture
def sdk(server: Server) -> Iterator[Hypeman]:
    """The SDK with full access, and its own ways of retrying."""
    with Hypeman(api_key=mint(server), base_url=server.url) as sdk:
        yield sdk


_numbers = itertools.count(1)


@pytest.fixture
def fresh_name() -> Callable[[], str]:
    """Names that no other test uses."""
    return lambda: f"vm-{next(_numbers)}"


@pytest.fixture
def make(sdk: Hypeman, fresh_name: Callable[[], str]) -> Iterator[Maker]:
    """Boots instances up to Running; whatever exists at the end of the test is deleted."""

    def make(**options: Any) -> Instance:
        wanted: dict[str, Any] = {
            "name": fresh_name(),
            "image": IMAGE,
            "size": "128MB",
            "overlay_size": "64MB",
            "vcpus": 1,
            "cmd": ["sleep", "infinity"],
        }
        made = sdk.instances.create(**{**wanted, **options})
        reached = sdk.instances.wait(made.id, state="Running", api_timeout="60s")
        assert reached.state == "Running", reached
        return sdk.instances.get(made.id)

    yield make
    for left in sdk.instances.list():
        sdk.instances.delete(left.id, graceful_shutdown=False)
    for snapshot in sdk.snapshots.list():
        sdk.snapshots.delete(snapshot.id)


@pytest.fixture
def refused() -> Refused:
    """Call something that must be refused: ``refused(status, code, call, *arguments)``."""

    def refused(
        status: int, code: str, call: Callable[..., Any], *arguments: Any, **keywords: Any
    ) -> APIStatusError:
        with pytest.raises(APIStatusError) as caught:
            call(*arguments, **keywords)
        body: Any = caught.value.body
        assert (caught.value.status_code, body["code"]) == (status, code), body
        assert isinstance(body["message"], str)
        return caught.value

    return refused
