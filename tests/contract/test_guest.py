"""Into the guest through the official SDK: exec, cp, stat, logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypeman import Hypeman
from hypeman.lib.cp import CopyProtocolError, cp_from_instance, cp_to_instance
from hypeman.lib.exec import exec as sdk_exec
from websockets.exceptions import InvalidStatus

from support.contract import Maker, Refused, mint
from support.server import Server


def test_a_command_runs_with_its_surroundings(sdk: Hypeman, make: Maker) -> None:
    made = make()
    result = sdk_exec(
        sdk, made.id, ["sh", "-c", 'echo "$GREETING"; pwd; exit 3'], env={"GREETING": "hi"}, cwd="/"
    )
    assert (result.output, result.exit_code) == (b"hi\n/\n", 3)
    assert sdk_exec(sdk, made.id, ["head", "-c", "4"], stdin=b"abcdef").output == b"abcd"
    assert sdk_exec(sdk, made.id, ["/no/such/program"]).exit_code == 127
    assert sdk_exec(sdk, made.id, ["sleep", "60"], timeout=1).exit_code == 124


def test_exec_is_refused_before_the_upgrade(sdk: Hypeman, make: Maker) -> None:
    made = make()
    sdk.instances.stop(made.id)
    with pytest.raises(InvalidStatus) as refused:
        sdk_exec(sdk, made.id, ["true"])
    assert refused.value.response.status_code == 409
    body = json.loads(refused.value.response.body)
    assert body["code"] == "invalid_state"
    assert body["message"] == "instance must be running (current state: Stopped)"


def test_files_go_in_and_come_out_again(sdk: Hypeman, make: Maker, tmp_path: Path) -> None:
    made = make()
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    (source / "big.bin").write_bytes(bytes(range(256)) * 2000)
    (source / "sub/empty").touch(0o600)
    cp_to_instance(sdk, made.id, source, "/tmp/contract")
    cp_from_instance(sdk, made.id, "/tmp/contract", tmp_path / "out")
    assert (tmp_path / "out/big.bin").read_bytes() == bytes(range(256)) * 2000
    assert (tmp_path / "out/sub/empty").stat().st_mode & 0o777 == 0o600

    info = sdk.instances.stat(made.id, path="/tmp/contract/big.bin")
    assert (info.exists, info.is_file, info.size) == (True, True, 512_000)
    assert sdk.instances.stat(made.id, path="/tmp/contract").is_dir
    assert not sdk.instances.stat(made.id, path="/tmp/contract/none").exists
    with pytest.raises(CopyProtocolError):
        cp_from_instance(sdk, made.id, "/tmp/contract/none", tmp_path / "none")


def test_stat_wants_an_absolute_path(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    refused(400, "invalid_request", sdk.instances.stat, make().id, path="relative")


def test_logs_are_lines(sdk: Hypeman, make: Maker, refused: Refused) -> None:
    made = make()
    log: Any = sdk.instances.logs(made.id, source="hypeman", tail=50)
    lines = list(log)
    assert any("created" in line for line in lines), lines
    assert len(list(sdk.instances.logs(made.id, source="hypeman", tail=1))) == 1
    source: Any = "kernel"
    refused(400, "Bad Request", sdk.instances.logs, made.id, source=source)


def test_a_token_for_reading_cannot_enter_the_guest(server: Server, make: Maker) -> None:
    made = make()
    reader = Hypeman(api_key=mint(server, permissions=["instance:read"]), base_url=server.url)
    with reader, pytest.raises(InvalidStatus) as refused:
        sdk_exec(reader, made.id, ["true"])
    assert refused.value.response.status_code == 403
