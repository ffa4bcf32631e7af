"""Fixtures for every kind of test."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reflink_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system whose files can share blocks: XFS on a loop device, made and removed here."""
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("needs root and mkfs.xfs (make setup installs xfsprogs)")
    home = tmp_path_factory.mktemp("xfs")
    disk, mount = home / "disk", home / "mount"
    mount.mkdir()
    with disk.open("wb") as file:
        file.truncate(4 << 30)
    subprocess.run(
        ["mkfs.xfs", "-q", "-m", "reflink=1", str(disk)], check=True, capture_output=True
    )
    mounted = subprocess.run(
        ["mount", "-o", "loop", str(disk), str(mount)], check=False, capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"XFS cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=60)


@pytest.fixture
def reflink_dir(reflink_root: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on that file system, removed afterwards."""
    directory = reflink_root / request.node.name[:40].replace("[", "-").replace("]", "")
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def another_file_system(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than ``tmp_path``."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=shared, prefix="stillframe-") as directory:
        yield Path(directory)
