"""The file tree that each Firecracker lives in, tried with a shell in its place."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stillframe.host.files import open_regular
from stillframe.host.orphans import kill_orphans, processes_naming
from stillframe.host.process import Process, spawn
from stillframe.host.watch import file_changes
from stillframe.vmm.firecracker.isolation import Scratch, Seen, SharedDirectory, confined

BUSYBOX = shutil.which("busybox")
needs_busybox = pytest.mark.skipif(BUSYBOX is None, reason="needs busybox (make setup)")


def confine(home: Path, script: str, seen: list[Seen]) -> list[str]:
    """A command that runs a shell script in a file tree of its own."""
    assert BUSYBOX is not None
    shared = SharedDirectory(home)
    shared.make()
    command = confined(BUSYBOX, [], shared.path, seen, console=home / "console")
    # busybox tells by its name what it is to be.
    return [*command[: command.index("--") + 2], f"{home}/sh", "-c", script]


def confined_process(home: Path, script: str, seen: list[Seen]) -> Process:
    return spawn(confine(home, script, seen), output=home / "log")


def run_confined(home: Path, script: str, seen: list[Seen]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(confine(home, script, seen), capture_output=True, check=False, timeout=60)


@needs_busybox
def test_it_sees_its_own_files_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("memory")
    (tmp_path / "disk").write_text("before")
    script = """
        read word < /memory; echo "memory: $word"
        for path in /*; do echo "root: $path"; done
        ls=/proc; [ -e $ls ] && echo seen; [ -e /etc ] && echo seen
        echo after > /disk0; echo changed > /memory; echo state > /run/state
    """
    seen = [Seen("/memory", tmp_path / "image"), Seen("/disk0", tmp_path / "disk", readonly=False)]
    done = run_confined(tmp_path, script, seen)
    told = (tmp_path / "console").read_text().splitlines()
    assert told[0] == "memory: memory"
    names = {line.removeprefix("root: ") for line in told if line.startswith("root: ")}
    assert names <= {*("/vmm", "/dev", "/run", "/scratch", "/memory", "/disk0"),
                     *("/usr", "/lib", "/lib64")}  # fmt: skip
    assert "seen" not in told
    assert b"Read-only file system" in done.stderr
    assert (tmp_path / "image").read_text() == "memory"
    assert (tmp_path / "disk").read_text() == "after\n"
    assert (tmp_path / "jail/state").read_text() == "state\n"


@needs_busybox
@pytest.mark.parametrize("trick", [False, True])
async def test_its_memory_is_seen_from_outside_and_no_link_is_followed(
    tmp_path: Path, trick: bool
) -> None:
    links = "rm -r /scratch; ln -s /etc /scratch;" if trick else ""
    script = f"echo mine > /scratch/state; {links} echo ready; while :; do :; done"
    tools = [Seen(f"/bin/{name}", Path(str(BUSYBOX))) for name in ("rm", "ln")]
    process = confined_process(tmp_path, script, tools)
    try:
        async with asyncio.timeout(60):
            await _until(tmp_path / "console", "ready")
        if trick:
            with pytest.raises(OSError, match="Not a directory"):
                Scratch.open(process.identity.pid)
        else:
            directory = Scratch.open(process.identity.pid)
            state = open_regular("state", dir_fd=directory)
            assert os.pread(state, 9, 0) == b"mine\n"
            os.close(state)
            os.close(directory)
            inside = Path(f"/proc/{process.identity.pid}/mountinfo").read_text()
            assert "huge=" not in inside  # by single pages: see jail.py
    finally:
        await process.kill()


@needs_busybox
async def test_it_gives_up_every_power(tmp_path: Path) -> None:
    process = confined_process(tmp_path, "echo ready; while :; do :; done", [])
    try:
        async with asyncio.timeout(60):
            await _until(tmp_path / "console", "ready")
        status = Path(f"/proc/{process.identity.pid}/status").read_text().splitlines()
        facts = dict(line.split(":\t", 1) for line in status if ":\t" in line)
        assert [facts[name] for name in ("CapPrm", "CapEff", "CapBnd")] == ["0" * 16] * 3
        assert facts["NoNewPrivs"] == "1"
        # Found by its VM's directory, as every VMM must be.
        assert processes_naming(tmp_path) == [process.identity.pid]
        assert kill_orphans(tmp_path, ()) == [process.identity.pid]
    finally:
        await process.kill()
    assert not any(line.split()[4].startswith(str(tmp_path)) for line in mounts())


def mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


async def _until(path: Path, word: str) -> None:
    path.touch()
    async with file_changes(path) as changed:
        while word not in path.read_text():
            await changed.wait()
            changed.clear()


@needs_busybox
def test_what_is_missing_is_said_in_a_line(tmp_path: Path) -> None:
    done = run_confined(tmp_path, "echo no", [Seen("/memory", tmp_path / "nowhere")])
    assert done.returncode == 1
    assert done.stderr.decode().startswith("no private file tree: mount ")
    assert len(done.stderr.splitlines()) == 1


@needs_busybox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_gets_one_too(tmp_path: Path) -> None:
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    python = next(
        (path for path in (sys.executable, "/usr/bin/python3") if _may_run(become, path)), None
    )
    if python is None:
        pytest.skip("an ordinary user may run no Python here")
    home = Path(subprocess.check_output([*become, "mktemp", "-d", "-p", "/tmp"], text=True).strip())
    try:
        home.chmod(0o755)
        (home / "image").write_text("memory")
        command = confine(home, "echo $(id -u); read w < /memory; echo $w", [
            Seen("/memory", home / "image"), Seen("/bin/id", Path(str(BUSYBOX)))
        ])  # fmt: skip
        launcher = home / "launch.py"
        shutil.copy(command[3], launcher)
        for path in (home / "jail", home / "jail/log", launcher):
            os.chown(path, 65534, 65534)
        (home / "console").touch()
        os.chown(home / "console", 65534, 65534)
        done = subprocess.run(
            [*become, python, "-I", "-S", launcher, *command[4:]],
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        if b"Operation not permitted" in done.stderr:
            pytest.skip("this host gives ordinary users no namespaces")
        assert done.returncode == 0, done.stderr
        assert (home / "console").read_text().splitlines()[-1] == "memory"
    finally:
        shutil.rmtree(home)


def _may_run(become: list[str], python: str) -> bool:
    return (
        subprocess.run([*become, python, "-c", ""], check=False, capture_output=True).returncode
        == 0
    )
