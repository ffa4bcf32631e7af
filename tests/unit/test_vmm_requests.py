"""What Firecracker and Cloud Hypervisor are sent, held against their own API descriptions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from stillframe.model.errors import MissingComponent
from stillframe.model.values import Hypervisor
from stillframe.vmm.cloud_hypervisor import api as cloud
from stillframe.vmm.driver import MachineSpec
from stillframe.vmm.firecracker import api as fire
from stillframe.vmm.unix_http import Call
from stillframe.vmm.versions import KNOWN_BAD, refuse_known_bad

APIS = Path(__file__).resolve().parents[1] / "support" / "vmm_apis"
SPEC = MachineSpec(512 << 20, 2, "kvm", network=False)
FIRECRACKER = [
    fire.machine_config(SPEC),
    fire.boot_source("vmlinux", "initrd", "console=ttyS0"),
    fire.boot_source("vmlinux", None, "console=ttyS0"),
    fire.drive(0, "disk0.link", readonly=True),
    fire.drive(
        1, "disk1.link", readonly=False,
        bandwidth=fire.RateLimit(50 << 20, 1000), operations=fire.RateLimit(1000, 1000),
    ),
    fire.vsock("vsock.sock"),
    fire.entropy(),
    fire.network("tap7", download=fire.RateLimit.per_second(1 << 20), upload=None),
    fire.limit_drive(1, fire.RateLimit(50 << 20)),
    fire.limit_network(download=None, upload=fire.RateLimit(1 << 20)),
    fire.shape(),
    fire.start(),
    fire.power_button(),
    fire.pause(),
    fire.resume(),
    fire.describe(),
    fire.create_snapshot("state", "memory", diff=False),
    fire.create_snapshot("state", "memory", diff=True),
    fire.load_snapshot((1, 16, 1), "state", "memory", vsock_path="v", taps={"eth0": "tap7"}),
    fire.load_snapshot((1, 12, 0), "state", "memory", vsock_path="v"),
]  # fmt: skip
CONFIGURATIONS = [
    cloud.configuration(
        SPEC, arguments="quiet", disks=[("disk0.link", True), ("disk1.link", False)], initrd=True
    ),
    cloud.configuration(SPEC, arguments="", disks=[], initrd=False, tap="tap7", confined=True),
    cloud.configuration(
        SPEC, arguments="", disks=[], initrd=False, tap="tap7", mac="02:00:00:00:00:01"
    ),
    cloud.configuration(
        SPEC,
        arguments="",
        disks=[("disk0.link", True)],
        initrd=False,
        tap="tap7",
        disk_rate=50 << 20,
        network_rate=1 << 20,
    ),
]
CLOUD_HYPERVISOR = [
    *map(cloud.create, CONFIGURATIONS),
    cloud.boot(),
    cloud.pause(),
    cloud.resume(),
    cloud.power_button(),
    cloud.describe(),
    cloud.snapshot("saving.new"),
    cloud.restore("loading.new"),
]


def described(name: str) -> dict[str, Any]:
    requests: dict[str, Any] = json.loads((APIS / name).read_text())["requests"]
    return requests


def refusal(call: Call, requests: dict[str, Any]) -> str | None:
    """Why the description does not know the call; None if it does."""
    for key, schema in requests.items():
        method, path = key.split(" ")
        if call.method == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), call.path):
            if schema is None or call.body is None:
                return None if schema is None and call.body is None else f"{key}: body"
            errors = jsonschema_rs.validator_for(schema).iter_errors(dict(call.body))
            return "; ".join(str(error) for error in errors) or None
    return f"no such request: {call.method} {call.path}"


@pytest.mark.parametrize("call", FIRECRACKER, ids=lambda call: f"{call.method} {call.path}")
def test_firecracker_knows_every_request(call: Call) -> None:
    assert refusal(call, described("firecracker-1.16.1.json")) is None


@pytest.mark.parametrize("version", ["51.2", "53.0"])
@pytest.mark.parametrize("call", CLOUD_HYPERVISOR, ids=lambda call: f"{call.method} {call.path}")
def test_cloud_hypervisor_knows_every_request(call: Call, version: str) -> None:
    assert refusal(call, described(f"cloud-hypervisor-{version}.json")) is None


def test_a_misspelt_field_would_be_found() -> None:
    wrong = Call("PUT", "/vsock", {"guest_cid": 3, "uds": "v"})
    assert "uds" in str(refusal(wrong, described("firecracker-1.16.1.json")))
    assert refusal(Call("PUT", "/vsok"), described("firecracker-1.16.1.json")) is not None


def test_older_firecrackers_are_not_asked_for_what_they_lack() -> None:
    def body(version: fire.Version) -> dict[str, Any]:
        call = fire.load_snapshot(version, "s", "m", vsock_path="v", taps={"eth0": "tap7"})
        return dict(call.body or {})

    assert body((1, 12, 1)).keys() >= {"network_overrides", "enable_diff_snapshots"}
    assert not body((1, 12, 1)).keys() & {"vsock_override", "clock_realtime", "track_dirty_pages"}
    assert body((1, 16, 0)).keys() >= {"vsock_override", "clock_realtime", "track_dirty_pages"}
    for version in ((1, 12, 1), (1, 16, 0)):
        assert body(version)["mem_backend"]["backend_type"] == "File"
        assert body(version)["resume_vm"] is False


def test_a_restore_of_cloud_hypervisor_never_maps_memory_shared_nor_on_demand() -> None:
    assert set(cloud.restore("d").body or {}) == {"source_url", "prefault"}
    for config in CONFIGURATIONS:
        assert [zone["shared"] for zone in config["memory"]["zones"]] == [False]
        assert config["memory"].keys() == {"size", "zones"}
        assert {disk["image_type"] for disk in config["disks"]} <= {"Raw"}


@pytest.mark.parametrize(
    ("hypervisor", "version", "word"),
    [
        (Hypervisor.QEMU, (6, 1, 9), "6.2"),
        (Hypervisor.FIRECRACKER, (1, 11, 9), "network device"),
        (Hypervisor.FIRECRACKER, (1, 13, 0), "CVE-2026-5747"),
        (Hypervisor.FIRECRACKER, (1, 14, 3), "CVE-2026-5747"),
        (Hypervisor.FIRECRACKER, (1, 15, 0), "CVE-2026-5747"),
        (Hypervisor.CLOUD_HYPERVISOR, (50, 0), "CVE-2026-27211"),
        (Hypervisor.CLOUD_HYPERVISOR, (51, 1), "CVE-2026-45782"),
    ],
)
def test_versions_known_to_be_bad_are_refused(
    hypervisor: Hypervisor, version: tuple[int, ...], word: str
) -> None:
    with pytest.raises(MissingComponent) as refused:
        refuse_known_bad(hypervisor, version)
    assert word in f"{refused.value.message} {refused.value.hint}"


def test_the_version_that_is_recommended_is_taken() -> None:
    for hypervisor, entries in KNOWN_BAD.items():
        newest = max(bad.before for bad in entries)
        with pytest.raises(MissingComponent) as refused:
            refuse_known_bad(hypervisor, (0, 1))
        assert refused.value.hint == f"install {'.'.join(map(str, newest))} or newer"
        refuse_known_bad(hypervisor, newest)


@pytest.mark.parametrize("version", [(1, 12, 0), (1, 12, 1), (1, 14, 4), (1, 15, 1), (1, 16, 1)])
def test_a_hole_that_is_closed_in_two_series_bars_neither(version: tuple[int, ...]) -> None:
    refuse_known_bad(Hypervisor.FIRECRACKER, version)
