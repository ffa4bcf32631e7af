"""What a real guest is given: its image's config, its sizes, commands and files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypeman import Hypeman
from hypeman.lib.cp import cp_from_instance, cp_to_instance
from hypeman.lib.exec import exec as exec_in_guest

from support.registry import Registry, available, running_registry, write_layout
from support.server import run_in, wait_running
from support.userland import layers

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SMALL: dict[str, Any] = {"size": "256MB", "overlay_size": "1GB", "vcpus": 1}
# Tells its pid and stays until it is asked to end.
WORKLOAD = 'echo $$ > /tmp/pid; trap "exit 5" TERM; while :; do sleep 1000 & wait $!; done'


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if not available:
        pytest.skip("needs docker-registry and skopeo")
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def pull(client: Hypeman, registry: Registry, layout: Path, name: str, **config: Any) -> str:
    """Build, push and pull an image; its reference."""
    write_layout(layout, layers(), {"Entrypoint": ["/bin/sh", "-c", WORKLOAD, "app"], **config})
    target = registry.push(layout, name)
    assert client.images.create(name=target).name == target
    deadline = time.monotonic() + 60
    while (image := client.images.get(target)).status not in {"ready", "failed"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert image.status == "ready", image.error
    return target


def workload(client: Hypeman, instance_id: str, what: str) -> list[str]:
    """A NUL-separated file of the workload's /proc directory."""
    wait = "until [ -s /tmp/pid ]; do sleep 0.05; done; "
    command = f"{wait}tr '\\0' '\\n' < /proc/$(cat /tmp/pid)/{what}"
    return run_in(client, instance_id, "sh", "-c", command).splitlines()


def identity(client: Hypeman, instance_id: str) -> dict[str, list[str]]:
    """The users and groups of the workload, from its status."""
    lines = (line.split() for line in workload(client, instance_id, "status"))
    return {words[0]: words[1:] for words in lines if words[0] in {"Uid:", "Gid:", "Groups:"}}


def logged(client: Hypeman, instance_id: str) -> list[str]:
    """The lines of the console so far."""
    lines: Any = client.instances.logs(instance_id, tail=1000)
    return [str(line).rstrip("\r") for line in lines]


def test_the_config_of_an_image_is_honoured(
    client: Hypeman, registry: Registry, tmp_path: Path, name: str
) -> None:
    image = pull(
        client, registry, tmp_path / "oci", "team/app:1", Cmd=["of", "image"], User="app",
        Env=["PATH=/bin", "KEPT=a=b", "CHANGED=image"], WorkingDir="/srv",
    )  # fmt: skip
    made = client.instances.create(
        name=name, image=image, env={"CHANGED": "instance", "ADDED": "two words"},
        cmd=["of the", "instance"], **SMALL,
    )  # fmt: skip
    wait_running(client, made.id)
    arguments = workload(client, made.id, "cmdline")
    assert arguments == ["/bin/sh", "-c", WORKLOAD, "app", "of the", "instance"]
    assert sorted(workload(client, made.id, "environ")) == [
        "ADDED=two words", "CHANGED=instance", "HOME=/home/app", "KEPT=a=b", "PATH=/bin",
    ]  # fmt: skip
    ids = identity(client, made.id)
    assert (ids["Uid:"], ids["Gid:"]) == (["1500"] * 4, ["1600"] * 4)
    assert set(ids["Groups:"]) == {"1600", "1700"}
    cwd = run_in(client, made.id, "sh", "-c", "readlink /proc/$(cat /tmp/pid)/cwd; pwd; id -u")
    assert cwd.split() == ["/srv", "/srv", "0"]

    listed = run_in(client, made.id, "sh", "-c", "cd /srv; stat -c '%n %u:%g %a %h %F' . *")
    assert listed.splitlines() == [
        ". 1500:1600 750 3 directory",
        "changed 1500:1600 444 1 regular file",
        "data 1234:2345 640 2 regular file",
        "link 7:8 777 1 symbolic link",
        "null 3:4 666 1 character special file",
        "pipe 5:6 600 1 fifo",
        "same 1234:2345 640 2 regular file",
        "setid 1:2 6755 1 regular file",
        "tree 0:0 755 2 directory",
    ]
    read = (
        "cat changed data same link; ls -A tree; stat -c %a /tmp; readlink link; echo lost > null"
    )
    assert run_in(client, made.id, "sh", "-c", read).split() == [
        "newlowerlowerlowernew", "1777", "data",
    ]  # fmt: skip


def test_a_numeric_user_in_a_missing_directory_runs_the_default_command(
    client: Hypeman, registry: Registry, tmp_path: Path, name: str
) -> None:
    image = pull(
        client, registry, tmp_path / "oci", "team/app:2", Cmd=["of", "image"], User="4321:8765",
        WorkingDir="/made/for/it",
    )  # fmt: skip
    made = client.instances.create(name=name, image=image, **SMALL)
    wait_running(client, made.id)
    assert workload(client, made.id, "cmdline")[3:] == ["app", "of", "image"]
    ids = identity(client, made.id)
    assert (ids["Uid:"], ids["Gid:"]) == (["4321"] * 4, ["8765"] * 4)
    look = "readlink /proc/$(cat /tmp/pid)/cwd; stat -c '%u %a' /made/for/it"
    assert run_in(client, made.id, "sh", "-c", look).split() == ["/made/for/it", "0", "755"]


def test_a_user_whom_the_image_does_not_know_is_named_as_the_cause(
    client: Hypeman, registry: Registry, tmp_path: Path, name: str
) -> None:
    image = pull(client, registry, tmp_path / "oci", "team/app:3", User="unknown")
    made = client.instances.create(name=name, image=image, **SMALL)
    assert client.instances.wait(made.id, state="Stopped", api_timeout="2m").state == "Stopped"
    ended = client.instances.get(made.id)
    assert (ended.exit_code, ended.exit_message) == (126, "cannot start: Invalid argument (user)")


def test_the_end_of_a_workload_is_told(client: Hypeman, name: str) -> None:
    script = "echo first; echo second >&2; exit 7"
    made = client.instances.create(
        name=name, image="stillframe/base", cmd=["sh", "-c", script], **SMALL
    )
    assert client.instances.wait(made.id, state="Stopped", api_timeout="2m").state == "Stopped"
    ended = client.instances.get(made.id)
    assert (ended.exit_code, ended.exit_message or "") == (7, "")
    lines = logged(client, made.id)
    assert lines.index("first") < lines.index("second")

    client.instances.start(made.id, cmd=["sh", "-c", "kill -9 $$"])
    assert client.instances.wait(made.id, state="Stopped", api_timeout="2m").state == "Stopped"
    ended = client.instances.get(made.id)
    assert (ended.exit_code, ended.exit_message) == (137, "killed by signal 9")

    client.instances.start(made.id, cmd=["/no/such/program"])
    assert client.instances.wait(made.id, state="Stopped", api_timeout="2m").state == "Stopped"
    ended = client.instances.get(made.id)
    assert ended.exit_code == 127
    assert "No such file" in (ended.exit_message or "")


def test_a_stopped_workload_and_its_next_command(client: Hypeman, name: str) -> None:
    made = client.instances.create(
        name=name, image="stillframe/base", cmd=["sh", "-c", WORKLOAD, "one"], **SMALL
    )
    wait_running(client, made.id)
    assert workload(client, made.id, "cmdline")[3:] == ["one"]
    stopped = client.instances.stop(made.id)
    assert (stopped.state, stopped.exit_code) == ("Stopped", 5)
    second: dict[str, Any] = {"cmd": ["sh", "-c", f"rm /tmp/pid; {WORKLOAD}", "two"]}
    for overrides in (second, {}):
        again = client.instances.start(made.id, **overrides)
        assert again.exit_code is None
        wait_running(client, made.id)
        run_in(client, made.id, "sh", "-c", "until [ -s /tmp/pid ]; do sleep 0.05; done")
        assert workload(client, made.id, "cmdline")[3:] == ["two"]
        assert client.instances.stop(made.id).exit_code == 5


def test_commands_in_a_guest_of_the_sizes_asked_for(client: Hypeman, name: str) -> None:
    made = client.instances.create(
        name=name, image="stillframe/base", size="384MB", overlay_size="3GB", vcpus=3
    )
    wait_running(client, made.id)
    seen = run_in(client, made.id, "sh", "-c", "nproc; free -m | grep Mem; df -m / | tail -n 1")
    processors, memory, disk = (line.split() for line in seen.splitlines())
    assert processors == ["3"]
    assert 300 < int(memory[1]) <= 384
    assert 2800 < int(disk[1]) <= 3072

    script = 'echo "$GREETING in $PWD"; exit 42'
    done = exec_in_guest(
        client, made.id, ["sh", "-c", script], env={"GREETING": "hi  there"}, cwd="/var/log"
    )
    assert (done.output, done.exit_code) == (b"hi  there in /var/log\n", 42)
    assert exec_in_guest(client, made.id, ["/no/such/program"]).exit_code == 127
    assert exec_in_guest(client, made.id, ["sh", "-c", "kill -9 $$"]).exit_code == 137
    late = exec_in_guest(client, made.id, ["sh", "-c", "echo begun; sleep 60"], timeout=1)
    assert (late.output, late.exit_code) == (b"begun\n", 124)

    done = exec_in_guest(
        client, made.id, ["sh", "-c", "head -c 1048576 | wc -c"], stdin=bytes(1024 * 1024)
    )
    assert (done.output.split(), done.exit_code) == ([b"1048576"], 0)
    terminal = exec_in_guest(
        client, made.id, ["sh", "-c", "stty size; test -t 0; echo $?"], tty=True, rows=33, cols=99
    )
    assert (terminal.output, terminal.exit_code) == (b"33 99\r\n0\r\n", 0)


def test_a_tree_goes_in_and_comes_out(client: Hypeman, running: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "big").write_bytes(bytes(range(256)) * 8192)
    (source / "a" / "b" / "script").write_text("#!/bin/sh\necho ran\n")
    (source / "a" / "b" / "script").chmod(0o750)
    (source / "empty").touch(0o600)
    (source / "none").mkdir(0o700)
    cp_to_instance(client, running, source, "/opt/tree")
    assert run_in(client, running, "/opt/tree/a/b/script") == "ran\n"
    run_in(client, running, "sh", "-c", "cd /opt/tree; ln -s a/big link; chown 5:6 empty")

    told = client.instances.stat(running, path="/opt/tree/a/big")
    assert (told.exists, told.is_file, told.size) == (True, True, 256 * 8192)
    assert client.instances.stat(running, path="/opt/tree/none").is_dir
    link = client.instances.stat(running, path="/opt/tree/link")
    assert (link.is_symlink, link.link_target) == (True, "a/big")
    assert client.instances.stat(running, path="/opt/tree/link", follow_links=True).is_file
    assert not client.instances.stat(running, path="/opt/tree/absent").exists

    cp_from_instance(client, running, "/opt/tree", tmp_path / "back")
    back = tmp_path / "back"
    found = {str(p.relative_to(back)): p.lstat().st_mode & 0o777 for p in back.rglob("*")}
    assert {path: mode for path, mode in found.items() if path != "link"} == {
        str(p.relative_to(source)): p.stat().st_mode & 0o777 for p in source.rglob("*")
    }
    assert (back / "link").readlink() == Path("a/big")
    assert (back / "a/big").read_bytes() == (source / "a/big").read_bytes()
