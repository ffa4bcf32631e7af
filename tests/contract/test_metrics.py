"""The measurements, as Prometheus reads them from a real server."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stillframe.api.server import bind, bind_metrics
from stillframe.model.errors import Conflict, InvalidRequest
from support.contract import HYPERVISOR, mint
from support.server import Server, running_server


def names(text: str) -> set[str]:
    """The names of all metrics in a scrape."""
    return {family.name for family in text_string_to_metric_families(text)}


def test_the_api_gives_its_metrics_to_those_who_may_read_resources(server: Server) -> None:
    url = f"{server.url}/metrics"
    assert httpx.get(url).status_code == 401
    reader = {"Authorization": f"Bearer {mint(server, permissions=['resource:read'])}"}
    answer = httpx.get(url, headers=reader)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert {"stillframe_instances", "stillframe_snapshots"} <= names(answer.text)


def has(host: str) -> bool:
    """Whether this machine can listen on an address."""
    try:
        bind(f"{host}:0").close()
    except Conflict:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", pytest.param("[::1]", marks=pytest.mark.skipif(not has("[::1]"), reason="IPv4"))],
)
def test_a_listener_of_their_own_needs_no_token(tmp_path: Path, host: str) -> None:
    environment = {
        "STILLFRAME_DEFAULT_HYPERVISOR": HYPERVISOR,
        "STILLFRAME_METRICS_LISTEN": f"{host}:0",
    }
    with running_server(tmp_path / "data", environment=environment) as running:
        url = json.loads((running.data_dir / "server.json").read_text())["metrics_url"]
        answer = httpx.get(url)
        assert answer.status_code == 200
        assert "stillframe_instances" in names(answer.text)
        base = url.removesuffix("/metrics")
        assert base != running.url
        for path in ("/health", "/instances", "/openapi.json"):
            assert httpx.get(base + path).status_code == 404
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_server_says_why_it_will_not_open_them_to_the_network(server: Server) -> None:
    done = server.cli(
        "serve", "--data-dir", f"{server.data_dir}-b", "--metrics-listen", "0.0.0.0:0"
    )
    assert done.returncode == 1
    assert "metrics_listen asks for no token, so 0.0.0.0:0 must be a loopback" in done.stderr


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "127.8.8.8:0", ":0"])
def test_loopback_addresses_will_do(listen: str) -> None:
    with bind_metrics(listen) as listener:
        assert listener.getsockname()[0].startswith("127.")


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "nowhere", "127.0.0.1:99999"])
def test_other_addresses_will_not(listen: str) -> None:
    with pytest.raises(InvalidRequest):
        bind_metrics(listen)


def test_a_taken_address_names_its_setting() -> None:
    with bind("127.0.0.1:0") as other, pytest.raises(Conflict) as caught:
        bind_metrics(f"127.0.0.1:{other.getsockname()[1]}")
    assert caught.value.hint is not None
    assert "STILLFRAME_METRICS_LISTEN" in caught.value.hint
