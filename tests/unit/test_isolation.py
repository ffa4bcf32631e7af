"""A VMM's network of its own, with a script of a few lines in the VMM's place."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillframe.host.capacity import device_traffic
from stillframe.model.errors import MissingComponent
from stillframe.vmm.isolation import command
from stillframe.vmm.isolation.command import TAP, apart, check_launch, find_uplink
from support.uplinks import Watch, children, hindrance, marked

pytestmark = pytest.mark.timeout(120)
needs_network = pytest.mark.skipif(hindrance() is not None, reason=str(hindrance()))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
# Asks who has 10.0.2.2, as a guest of the usual address would, by the device of the VMM.
ASKS = """
import fcntl, os, select, struct, sys
device = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x5002))
mac, here, there = bytes.fromhex("525400123456"), bytes([10, 0, 2, 15]), bytes([10, 0, 2, 2])
question = struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + mac + here + bytes(6) + there
while True:
    # A bridge notices a moment later that the device was opened, so ask again, as kernels do.
    os.write(device, bytes(10) + b"\\xff" * 6 + mac + b"\\x08\\x06" + question)
    if not select.select([device], [], [], 0.1)[0]:
        continue
    frame = os.read(device, 65536)[10:]  # behind the header of virtio_net
    assert frame[12:14] == b"\\x08\\x06", f"this host sent of its own: {frame.hex()}"
    if frame[20:22] == b"\\0\\2" and frame[28:32] == there:
        break
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
print(frame[22:28].hex(":"), status["CapBnd"].strip(), status["NoNewPrivs"].strip(), flush=True)
sys.stdin.read()
"""
QUESTION_BYTES = 14 + 28  # an Ethernet header and an ARP packet (RFC 826)
GATEWAY = "52:55:0a:00:02:02"  # libslirp's address for 10.0.2.2
NO_POWER = "0" * 16
ARGUMENTS = ["-c", ASKS, TAP]


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process, killed at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def asking() -> list[str]:
    return apart(sys.executable, "asks", ARGUMENTS, uplink=find_uplink())


def line_of(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    line = process.stdout.readline().split()
    assert line, process.stderr.read() if process.stderr else ""
    return line


def namespace(pid: int | str, kind: str = "net") -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@needs_network
def test_two_have_the_same_network_and_neither_has_the_others() -> None:
    with started(asking()) as one, started(asking()) as two:
        assert line_of(one) == line_of(two) == [GATEWAY, NO_POWER, "1"]
        spaces = {namespace(pid) for pid in ("self", one.pid, two.pid)}
        assert len(spaces) == 3
        uplinks = [children(process.pid) for process in (one, two)]
        assert [len(found) for found in uplinks] == [1, 1]
        # It serves from our network, sees no file of ours, and can do nothing but that.
        [[pid], _] = uplinks
        assert namespace(pid) == namespace("self")
        assert names_in(Path(f"/proc/{pid}/root")) == {"etc", "run"}
        assert "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()


@needs_network
def test_what_a_guest_sends_and_gets_is_counted_in_its_own_network() -> None:
    with started(asking()) as quiet, started(asking()) as process:
        line_of(quiet)
        line_of(process)
        traffic = device_traffic(process.pid, TAP)
        assert traffic is not None
        questions, odd = divmod(traffic.received, QUESTION_BYTES)
        assert (questions >= 1, odd) == (True, 0)
        assert traffic.sent >= QUESTION_BYTES  # the answer has the same fields
        assert device_traffic(os.getpid(), TAP) is None
        pid = process.pid
    assert device_traffic(pid, TAP) is None


@needs_network
def test_the_network_goes_with_its_vmm_however_that_ends() -> None:
    with started(asking()) as killed, started(asking()) as other:
        line_of(killed)
        line_of(other)
        watch = Watch(children(killed.pid))
        killed.send_signal(signal.SIGKILL)
        watch.wait_all()
        assert len(children(other.pid)) == 1
        watch = Watch(children(other.pid))
        assert other.stdin is not None
        other.stdin.close()  # it ends by itself
        assert other.wait(60) == 0
        watch.wait_all()


@needs_network
def test_whoever_is_killed_when_nothing_is_left(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace (make setup)")
    words = apart("true", "true", [], uplink=find_uplink())
    trace = tmp_path / "trace"
    done = subprocess.run([strace, "-o", trace, *words], capture_output=True, check=False)
    if b"ptrace" in done.stderr:
        pytest.skip("this host traces no processes")
    assert done.returncode == 0, done.stderr
    moments: list[tuple[str, int]] = []  # system calls from the fork on, by name and number
    seen: dict[str, int] = {}
    for name in re.findall(r"^(\w+)\(", trace.read_text(), re.MULTILINE):
        seen[name] = seen.get(name, 0) + 1
        if moments or name in ("clone", "clone3", "fork", "vfork"):
            moments.append((name, seen[name]))
        if name == "execve" and seen[name] > 1:
            break
    assert ("unshare", 1) in moments, moments
    moments = [moment for moment in moments[1:] if moment[0] != "prctl"]  # a run of equal ones
    ends = []
    for name, number in moments[:: len(moments) // 10]:
        mark = f"mark-{uuid.uuid4().hex}"
        inject = ["-o", "/dev/null", "-e", f"inject={name}:signal=KILL:when={number}"]
        done = subprocess.run(
            [strace, *inject, *words],
            env={**os.environ, "MARK": mark}, capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        ends.append(done.returncode)  # of strace, which ends as what it traces did
        Watch(marked(mark)).wait_all()
    assert set(ends) == {-signal.SIGKILL}, ends


@needs_network
def test_what_slirp4netns_says_when_it_cannot_start_is_said(tmp_path: Path) -> None:
    fails = tmp_path / "slirp4netns"
    fails.write_text("#!/bin/sh\necho 'sent tapfd=5' >&2\necho no room here >&2\nexit 1\n")
    fails.chmod(0o755)
    for uplink, said in ((fails, "no room here"), (tmp_path / "none", "No such file")):
        words = apart("true", "true", [], uplink=str(uplink))
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert done.stderr.startswith("no private network: slirp4netns: ")
        assert said in done.stderr
        assert "tapfd" not in done.stderr
        assert len(done.stderr.splitlines()) == 1
        (tmp_path / "log").write_text("of an earlier start\n" + done.stderr)
        check_launch(tmp_path / "log", len("of an earlier start\n" + done.stderr))
        with pytest.raises(MissingComponent, match=said) as refused:
            check_launch(tmp_path / "log", 0)
        assert "network off" in str(refused.value.hint)


def test_what_a_network_takes_is_told_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_TUN", tmp_path / "tun")
    with pytest.raises(MissingComponent, match="tun does not exist") as refused:
        find_uplink()
    assert "modprobe tun" in str(refused.value.hint)
    (tmp_path / "tun").touch()
    with pytest.raises(MissingComponent, match="no-such-slirp is not installed") as refused:
        find_uplink("no-such-slirp")
    assert "apt-get install" in str(refused.value.hint)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MissingComponent, match="may not be opened"):
        find_uplink()


AS_A_USER = """
mknod "$1/tun" c 10 200 && chmod 666 "$1/tun" && mount --bind "$1/tun" /dev/net/tun || exit 1
shift
exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs "$@"
"""


@pytest.fixture
def user() -> Iterator[list[str]]:
    """The words by which an ordinary user runs Python, one who may open /dev/net/tun."""
    home = Path(tempfile.mkdtemp(prefix="sf-", dir="/tmp"))  # pytest's own are closed to others
    home.chmod(0o755)
    become = ["unshare", "-m", "sh", "-c", AS_A_USER, "sh", str(home)]
    again = "import fcntl, os, sys; os.execv(sys.argv[1], [sys.argv[1], '-c', ''])"
    try:
        for python in (sys.executable, "/usr/bin/python3"):
            done = subprocess.run(
                [*become, python, "-c", again, python],
                capture_output=True, check=False, timeout=60,
            )  # fmt: skip
            (home / "tun").unlink(missing_ok=True)
            if done.returncode == 0:
                yield [*become, python]
                return
        pytest.skip(f"an ordinary user may run no Python here: {done.stderr.decode().strip()}")
    finally:
        shutil.rmtree(home)


@needs_root
@needs_network
def test_an_ordinary_user_gets_a_network_too(user: list[str]) -> None:
    words = apart(user[-1], "asks", ARGUMENTS, uplink=find_uplink())
    launcher = Path(user[-2]) / "launch.py"
    shutil.copy(words[3], launcher)
    with started([*user, "-I", "-S", str(launcher), *words[4:]]) as process:
        assert process.stdout is not None
        told = process.stdout.readline().split()
        said = process.stderr.read() if process.stderr is not None and not told else ""
        if "unshare: Operation not permitted" in said:
            pytest.skip("this host gives ordinary users no namespaces")
        assert told == [GATEWAY, NO_POWER, "1"], said
        assert namespace(process.pid, "user") != namespace("self", "user")
        [uplink] = children(process.pid)
        assert Path(f"/proc/{uplink}").stat().st_uid == 65534
        assert names_in(Path(f"/proc/{uplink}/root")) == {"etc", "run"}
        watch = Watch([uplink])
    watch.wait_all()
