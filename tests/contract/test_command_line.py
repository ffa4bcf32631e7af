"""The command line as people use it, against a real server with the fake hypervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypeman import Hypeman

from stillframe.model.values import CONTRACT_HYPERVISORS
from support.contract import HYPERVISOR, Maker
from support.registry import layer, write_layout
from support.server import Server

Cli = Callable[..., str]
Names = Callable[[], str]
SMALL = ("-m", "128MB", "--overlay", "64MB", "-c", "1")


@pytest.fixture
def cli(server: Server) -> Cli:
    """Run a command that must succeed; what it printed."""

    def cli(*arguments: str, input: str | None = None) -> str:
        done = server.cli(*arguments, input=input)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    return cli


@pytest.fixture
def fails(server: Server) -> Cli:
    """Run a command that must fail with exit code 1 and one line on stderr: that line."""

    def fails(*arguments: str) -> str:
        done = server.cli(*arguments)
        assert done.returncode == 1, (arguments, done.stdout, done.stderr)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return fails


def states(answer: str) -> list[tuple[str, str]]:
    """Names and states of a JSON array of instances."""
    return [(instance["name"], instance["state"]) for instance in json.loads(answer)]


def first_row(table: str) -> dict[str, str]:
    """The first row of a plain table, by heading."""
    heading, row, *_ = table.splitlines()
    return dict(zip(heading.split(), row.split(), strict=False))


def test_the_life_of_an_instance(cli: Cli, make: Maker, fresh_name: Names) -> None:
    name, other = fresh_name(), make().name
    made = first_row(cli("run", "-n", name, *SMALL, "stillframe/base", "sleep", "infinity"))
    assert (made["NAME"], made["STATE"]) == (name, "Running")
    assert json.loads(cli("inspect", made["ID"][:12], "--json"))["name"] == name
    assert states(cli("standby", name, other, "--json")) == [(name, "Standby"), (other, "Standby")]
    assert states(cli("ps", "--json", "--state", "Standby")) == [
        (other, "Standby"), (name, "Standby"),
    ]  # fmt: skip
    assert states(cli("restore", name, "--json")) == [(name, "Running")]
    assert cli("wait", name) == "Running\n"
    assert states(cli("stop", name, "--json")) == [(name, "Stopped")]
    cli("start", name)
    assert json.loads(cli("wait", name, "--json"))["state"] == "Running"
    assert cli("rm", "--force", name) == f"{name}\n"
    assert cli("ps", "-q").split() == [json.loads(cli("inspect", other, "--json"))["id"]]


def test_exec_passes_on_stdin_surroundings_and_the_exit_code(
    server: Server, cli: Cli, make: Maker
) -> None:
    name = make().name
    assert cli("exec", "-i", name, "cat", input="one\ntwo\n") == "one\ntwo\n"
    assert cli("exec", "-i", name, "cat", input="") == ""
    assert cli("exec", name, "cat", input="not asked for") == ""
    assert cli("exec", "-e", "A=x y", "-w", "/tmp", name, "sh", "-c", "echo $A; pwd") == (
        "x y\n/tmp\n"
    )
    assert cli("exec", "-t", name, "tty").split() == ["/dev/pts/0"]
    assert server.cli("exec", name, "exit", "7").returncode == 7
    assert server.cli("exec", "--timeout", "1", name, "sleep", "60").returncode == 124
    missing = server.cli("exec", name, "/no/such/program")
    assert (missing.returncode, missing.stdout[:6]) == (127, "Error:")


def test_much_stdin_arrives_whole(cli: Cli, make: Maker) -> None:
    text = "".join(f"{number}\n" for number in range(100_000))
    assert cli("exec", "-i", make().name, "cat", input=text) == text


def test_errors_are_a_line_with_a_hint(fails: Cli, cli: Cli, make: Maker) -> None:
    name = make().name
    for command in (("inspect", "none"), ("exec", "none", "true"), ("logs", "none"),
                    ("cp", "none:/x", ".")):  # fmt: skip
        assert fails(*command) == "no instance 'none' (hint: `stillframe ps` lists them)", command
    assert fails("snapshot", "get", "none").startswith("no snapshot 'none' (hint: ")
    assert fails("image", "rm", "none").startswith("no image 'none' (hint: ")
    assert f"an instance named '{name}' already exists (hint: " in fails(
        "run", "-n", name, *SMALL, "stillframe/base"
    )
    assert "(hint: write for example 512MB" in fails("run", "-m", "5QB", "stillframe/base")
    assert "(hint: `stillframe token` prints one" in fails("--token", "x", "ps")
    late = fails("wait", name, "--state", "Stopped", "--timeout", "1s")
    assert late.startswith(f"{name} is Running after 1s, not Stopped (hint: ")
    cli("stop", name)
    assert fails("exec", name, "true").startswith("instance must be running")


def test_wrong_usage_exits_with_two(server: Server) -> None:
    for arguments in (("bogus",), ("rm",), ("cp", "a", "b"), ("ps", "--state", "Nowhere")):
        done = server.cli(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Usage: " in done.stderr


def test_of_several_things_each_is_tried_and_what_failed_is_told(
    server: Server, make: Maker
) -> None:
    first, last = make().name, make().name
    done = server.cli("stop", first, "nobody-here", last, "--json")
    assert done.returncode == 1
    assert states(done.stdout) == [(first, "Stopped"), (last, "Stopped")]
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nobody-here: ")
    gone = server.cli("rm", "nobody-here", last)
    assert (gone.returncode, gone.stdout) == (1, f"{last}\n")


def test_an_ambiguous_prefix_names_the_candidates(sdk: Hypeman, fails: Cli, make: Maker) -> None:
    made = make()
    sdk.instances.stop(made.id)
    by_letter = {made.id[0]: made.id}
    for number in range(40):  # More than there are letters and digits: two must share one.
        fork = sdk.instances.fork(made.id, name=f"prefix-{number}", target_state="Stopped")
        if (twin := by_letter.setdefault(fork.id[0], fork.id)) != fork.id:
            break
    line = fails("inspect", fork.id[0])
    assert line.startswith("multiple resources match, use full ID (hint: say which: ")
    assert fork.id in line
    assert twin in line


def test_snapshots_by_name_and_prefix(cli: Cli, fails: Cli, make: Maker) -> None:
    name = make().name
    cli("exec", name, "set", "word", "captured")
    made = json.loads(cli("snapshot", "create", name, "-n", "ready", "--json"))
    assert (made["kind"], made["name"], made["source_instance_name"]) == ("Standby", "ready", name)
    cli("exec", name, "set", "word", "changed")

    forks = json.loads(cli("snapshot", "fork", "ready", f"{name}-a", f"{name}-b", "--json"))
    assert [fork["name"] for fork in forks] == [f"{name}-a", f"{name}-b"]
    assert cli("exec", f"{name}-b", "get", "word") == "captured\n"
    assert first_row(cli("snapshot", "list", "--instance", name))["ID"] == made["id"]
    assert json.loads(cli("snapshot", "get", made["id"][:12], "--json"))["id"] == made["id"]

    assert "must be Standby or Stopped" in fails("snapshot", "restore", "ready")
    cli("standby", name)
    assert first_row(cli("snapshot", "restore", "ready", "--state", "Running"))["NAME"] == name
    assert cli("exec", name, "get", "word") == "captured\n"

    second = json.loads(cli("snapshot", "create", f"{name}-a", "-n", "ready", "--json"))
    ambiguous = fails("snapshot", "rm", "ready")
    assert ambiguous.startswith("'ready' matches 2 snapshots (hint: say which: ")
    assert made["id"] in ambiguous
    cli("snapshot", "rm", made["id"][:12], second["id"])
    assert cli("snapshot", "list", "--json") == "[]\n"


def test_a_fork_of_a_running_instance_for_each_name(cli: Cli, make: Maker) -> None:
    name = make().name
    cli("exec", name, "set", "word", "inherited")
    forks = states(cli("fork", name, f"{name}-a", f"{name}-b", "--json"))
    assert forks == [(f"{name}-a", "Running"), (f"{name}-b", "Running")]
    assert cli("exec", f"{name}-b", "get", "word") == "inherited\n"
    assert states(cli("fork", name, f"{name}-c", "--state", "Stopped", "--json")) == [
        (f"{name}-c", "Stopped")
    ]
    assert json.loads(cli("inspect", name, "--json"))["state"] == "Running"


def test_files_go_in_and_come_out(cli: Cli, fails: Cli, make: Maker, tmp_path: Path) -> None:
    name = make().name
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_bytes(bytes(range(256)) * 500)
    (tree / "run").touch(0o750)
    cli("cp", str(tree), f"{name}:/srv/")
    cli("cp", f"{name}:/srv/tree", str(tmp_path / "back"))
    assert (tmp_path / "back/sub/file").read_bytes() == bytes(range(256)) * 500
    assert (tmp_path / "back/run").stat().st_mode & 0o777 == 0o750
    cli("cp", f"{name}:/srv/tree/sub/file", str(tmp_path))
    assert (tmp_path / "file").stat().st_size == 128_000
    fails("cp", f"{name}:/srv/none", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    assert "no such file" in fails("cp", str(tmp_path / "none"), f"{name}:/")


def test_logs_are_followed_until_interrupted(server: Server, cli: Cli, make: Maker) -> None:
    name = make().name
    printed = cli("logs", name).splitlines()
    assert printed
    lines = cli("logs", name, "--json").splitlines()
    assert [json.loads(line)["line"] for line in lines] == printed
    follower = subprocess.Popen(
        [sys.executable, "-m", "stillframe.cli.main", "logs", "-f", name],
        env={**server.environment, "STILLFRAME_URL": server.url},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with follower:
        try:
            assert follower.stdout is not None
            assert follower.stdout.readline().rstrip("\n") == printed[0]
            follower.send_signal(signal.SIGINT)
            assert follower.wait(30) == 130
        finally:
            follower.kill()


def test_images_are_imported_listed_and_removed(
    cli: Cli, fails: Cli, fresh_name: Names, tmp_path: Path
) -> None:
    config = {"Cmd": ["sleep", "infinity"], "Env": ["FROM=image"]}
    digest = write_layout(tmp_path / "layout", [layer(("etc/name", b"mine"))], config)
    with tarfile.open(tmp_path / "layout.tar", "w") as archive:
        archive.add(tmp_path / "layout", arcname=".")
    for source in ("layout", "layout.tar"):
        name = f"local/{fresh_name()}"
        imported: dict[str, Any] = json.loads(
            cli("image", "import", name, str(tmp_path / source), "--json")
        )
        assert (imported["status"], imported["digest"]) == ("ready", digest)
        assert (imported["cmd"], imported["env"]) == (config["Cmd"], {"FROM": "image"})
        assert imported["name"] in cli("image", "list", "-q").split()
        if source == "layout":
            vm = fresh_name()
            cli("run", "-n", vm, *SMALL, name)
            assert "in use" in fails("image", "rm", name)
            if HYPERVISOR == "fake":
                assert cli("exec", vm, "sh", "-c", "echo $FROM") == "image\n"
            cli("rm", "--force", vm)
        cli("image", "rm", name)
        assert imported["name"] not in cli("image", "list", "-q").split()
    (tmp_path / "plain").mkdir()
    assert "(hint: make a tar of it: tar -C " in fails(
        "image", "import", "local/plain", str(tmp_path / "plain")
    )


def test_the_built_in_image_needs_no_registry(cli: Cli, fails: Cli) -> None:
    assert json.loads(cli("image", "pull", "stillframe/base", "--json"))["status"] == "ready"
    assert "cannot be reached" in fails("image", "pull", "127.0.0.1:1/nothing")
    cli("image", "rm", "127.0.0.1:1/nothing")


def test_tokens_and_the_doctor(server: Server, cli: Cli, fails: Cli) -> None:
    reader = cli("token", "-p", "instance:read").strip()
    assert cli("--token", reader, "ps", "--json") == "[]\n"
    assert "instance:write" in fails("--token", reader, "run", "stillframe/base")
    findings = {f["what"]: f["level"] for f in json.loads(server.cli("doctor", "--json").stdout)}
    assert findings["server"] == "ok"
    assert set(findings.values()) <= {"ok", "warn", "fail"}
    # Their programs, and what their networks take.
    assert findings.keys() >= {"firecracker", "cloud-hypervisor", "slirp4netns"}
    assert findings.keys() >= {f"hypervisor {name.value}" for name in CONTRACT_HYPERVISORS}


def test_the_doctor_finds_what_setup_installed_and_tells_how_when_no_server_runs(
    tmp_path: Path,
) -> None:
    programs = tmp_path / "data/programs"
    programs.mkdir(parents=True)
    (programs / "firecracker-of-ours").write_text("#!/bin/sh\n")
    (programs / "firecracker-of-ours").chmod(0o755)
    environment = {
        **os.environ, "STILLFRAME_DATA_DIR": str(tmp_path / "data"),
        "STILLFRAME_LISTEN": "127.0.0.1:1",
        "STILLFRAME_FIRECRACKER_BINARY": "firecracker-of-ours",
        "STILLFRAME_CLOUD_HYPERVISOR_BINARY": "cloud-hypervisor-of-ours",
        "PATH": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", "stillframe.cli.main", "doctor", "--json"]
    answer = subprocess.run(command, check=False, env=environment, capture_output=True, timeout=60)
    findings = {finding["what"]: finding for finding in json.loads(answer.stdout)}
    assert findings["firecracker"]["level"] == "ok"
    assert findings["firecracker"]["found"] == str(programs / "firecracker-of-ours")
    assert findings["cloud-hypervisor"]["level"] == "warn"
    assert findings["cloud-hypervisor"]["fix"] == "stillframe setup cloud-hypervisor"
    assert findings["slirp4netns"]["level"] == "warn"
    assert findings["slirp4netns"]["fix"] == "apt-get install slirp4netns"
    assert findings["server"]["level"] == "warn"
    assert findings.keys() >= {f"hypervisor {name.value}" for name in CONTRACT_HYPERVISORS}
    # Its program is there, and is none that runs a VM.
    assert findings["hypervisor firecracker"]["level"] == "warn"
    assert findings["hypervisor qemu"]["fix"] == "apt-get install qemu-system-x86"
