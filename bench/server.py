"""A real server on a directory of its own, which is gone afterwards with every VM it started."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.client import Client
from stillframe.host.files import create_sparse
from stillframe.host.orphans import kill_orphans, processes_naming

_READY = re.compile(rb"http://[\w.\[\]:]+")
_START_SECONDS = 60.0
_VOLUME_BYTES = 16 << 30  # of the XFS made for the rows that need shared blocks; sparse


class NoVolume(RuntimeError):
    """A file system cannot be made here; the message says why."""


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A temporary directory; processes that work on it are ended, and it is removed."""
    directory = Path(tempfile.mkdtemp(prefix="stillframe-bench-"))
    try:
        yield directory
    finally:
        kill_orphans(directory, ())
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def running_server(directory: Path) -> Iterator[Client]:
    """``stillframe serve`` with its data in ``directory``/data; a client of it.

    Whatever happens, its VMs and the server are ended.
    """
    data = directory / "data"
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((directory / "server.log").open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-m", "stillframe.cli.main", "serve", "--data-dir", str(data),
             "--listen", "127.0.0.1:0", "--log-level", "warning"],
            stdout=subprocess.PIPE, stderr=log, env=_environment(), start_new_session=True,
        )  # fmt: skip
        stack.callback(kill_orphans, data, ())
        stack.callback(_end, process)
        client = Client(_ready_url(process, directory / "server.log"), data)
        stack.callback(client.close)
        yield client


def _environment() -> dict[str, str]:
    """Ours without settings: they belong to another server than the one made here."""
    ours = ("STILLFRAME_", "HYPEMAN_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def _ready_url(process: subprocess.Popen[bytes], log: Path) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if selector.select(_START_SECONDS) else b""
    match = _READY.search(line)
    if match is None:
        raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
    return match[0].decode()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def vmm_pids(data: Path) -> set[int]:
    """The VMMs of a server: processes that name files of its data on their command line."""
    return set(processes_naming(data))


@contextlib.contextmanager
def xfs_volume(directory: Path) -> Iterator[Path]:
    """An XFS with shared blocks on a loop device, mounted below ``directory``; its root.

    Raises NoVolume when this user or machine cannot make one.
    """
    if os.geteuid() != 0:
        raise NoVolume("a loop device needs root")
    if shutil.which("mkfs.xfs") is None:
        raise NoVolume("mkfs.xfs is not installed (apt-get install xfsprogs)")
    image, root = directory / "xfs.img", directory / "xfs"
    with contextlib.ExitStack() as stack:
        stack.callback(image.unlink, missing_ok=True)
        create_sparse(image, _VOLUME_BYTES)
        root.mkdir()
        _volume_command("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
        # The loop device goes with its mount.
        _volume_command("mount", "-o", "loop,noatime", str(image), str(root))
        stack.callback(_unmount, root)
        yield root


def _volume_command(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoVolume(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")


def _unmount(root: Path) -> None:
    deadline = time.monotonic() + 10
    while kill_orphans(root, ()) and time.monotonic() < deadline:
        time.sleep(0.05)  # until they are gone: a dying process still holds the mount
    if subprocess.run(["umount", str(root)], capture_output=True, check=False).returncode != 0:
        # Somebody still looks at it; it goes when they are done.
        subprocess.run(["umount", "--lazy", str(root)], capture_output=True, check=False)
