"""Official releases of hypervisors: pinned by SHA-256, downloaded whole, installed atomically.

The checksums are those that the projects publish beside their releases
(``firecracker-vVERSION-ARCH.tgz.sha256.txt``; the digests on Cloud Hypervisor's release page).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx2

from stillframe.host.files import storage_errors
from stillframe.model.errors import DamagedData, HostFailure, NotSupported

_TIMEOUT = httpx2.Timeout(60, connect=15)
_BLOCK = 1 << 20  # bytes
_FIRECRACKER = "https://github.com/firecracker-microvm/firecracker/releases/download/v1.16.1"
_CLOUD_HYPERVISOR = "https://github.com/cloud-hypervisor/cloud-hypervisor/releases/download/v53.0"


@dataclass(frozen=True, slots=True)
class Release:
    """One file to download. ``member`` is the program's path in it if it is a tar archive."""

    program: str
    version: str
    url: str
    sha256: str
    member: str | None = None


# By program and machine (uname -m).
RELEASES: dict[tuple[str, str], Release] = {
    ("firecracker", "x86_64"): Release(
        "firecracker",
        "1.16.1",
        f"{_FIRECRACKER}/firecracker-v1.16.1-x86_64.tgz",
        "382a02a869e4d6d5cb14c40577f9545e8458021ea8b0b2d3fc10ec14d9c242e6",
        "release-v1.16.1-x86_64/firecracker-v1.16.1-x86_64",
    ),
    ("firecracker", "aarch64"): Release(
        "firecracker",
        "1.16.1",
        f"{_FIRECRACKER}/firecracker-v1.16.1-aarch64.tgz",
        "8d0e69f6d6f9a1724551f607f18504052c16c1828ee3d4d7b6e6c73380871e0e",
        "release-v1.16.1-aarch64/firecracker-v1.16.1-aarch64",
    ),
    ("cloud-hypervisor", "x86_64"): Release(
        "cloud-hypervisor",
        "53.0",
        f"{_CLOUD_HYPERVISOR}/cloud-hypervisor-static",
        "448af3d4e59b22c2987f7df94c213ad40fb53a10d437e42b5ee6c4fce7c29ecc",
    ),
    ("cloud-hypervisor", "aarch64"): Release(
        "cloud-hypervisor",
        "53.0",
        f"{_CLOUD_HYPERVISOR}/cloud-hypervisor-static-aarch64",
        "f192b510eea1c710cbc439d716bb0573c223fc463dbe3e6523788a2b7ef62850",
    ),
}


def release_for(program: str, machine: str) -> Release:
    """The pinned release of ``program`` for this kind of machine. Raises NotSupported."""
    try:
        return RELEASES[program, machine]
    except KeyError:
        known = ", ".join(sorted({name for name, _ in RELEASES}))
        raise NotSupported(
            f"there is no release of {program} for {machine}", hint=f"there is one of {known}"
        ) from None


def is_installed(release: Release, directory: Path) -> bool:
    """Whether this very release is in ``directory``."""
    try:
        return (directory / release.program).is_file() and (
            _note(release, directory).read_text() == release.sha256
        )
    except OSError:
        return False


def install(
    release: Release,
    directory: Path,
    source: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Put the release's program into ``directory``; its path.

    ``source`` is another URL or a file to take it from: what it holds must be the same.
    ``progress`` is told how many bytes came. A download that broke off is gone on with by the
    next one. Raises DamagedData when the checksum is another, HostFailure, StorageFull.
    """
    with storage_errors(f"install {release.program}"):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        where = source or release.url
        if "://" in where:
            archive = directory / f".{release.program}-{release.version}.part"
            _download(where, archive, progress)
        else:
            archive = Path(where)
        found = _digest(archive)
        if found != release.sha256:
            if "://" in where:
                archive.unlink()
            raise DamagedData(
                f"{where} is not {release.program} {release.version}: its SHA-256 is {found}, "
                f"published was {release.sha256}",
                hint="nothing was installed; try again, or get the file elsewhere",
            )
        program = directory / release.program
        _note(release, directory).unlink(missing_ok=True)
        _place(release, archive, program)
        _note(release, directory).write_text(release.sha256)
        if "://" in where:
            archive.unlink()
    return program


def _note(release: Release, directory: Path) -> Path:
    """The file that says which release lies there."""
    return directory / f".{release.program}.sha256"


def _download(url: str, part: Path, progress: Callable[[int], None]) -> None:
    """Fetch ``url`` into ``part``, from where an earlier attempt broke off."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        with (
            httpx2.Client(timeout=_TIMEOUT, follow_redirects=True) as client,
            client.stream("GET", url, headers=headers) as answer,
        ):
            if answer.status_code == 416:  # there is no more: it was whole already
                return
            if answer.status_code not in (200, 206):
                raise HostFailure(
                    f"{url} answers {answer.status_code}",
                    hint="download it elsewhere and name the file with --from",
                )
            if answer.status_code == 200:
                done = 0
            with part.open("ab" if done else "wb") as file:
                for block in answer.iter_raw():
                    file.write(block)
                    progress(len(block))
    except httpx2.HTTPError as error:
        raise HostFailure(
            f"{url} cannot be downloaded: {error or type(error).__name__}",
            hint="run it again to go on, or download it elsewhere and name the file with --from",
        ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(release: Release, archive: Path, program: Path) -> None:
    """Write the program beside its place, durably, and rename it there."""
    beside = program.with_name(f".{program.name}.new")
    with ExitStack() as undo:
        undo.callback(beside.unlink, missing_ok=True)
        with _program_in(release, archive) as content, beside.open("wb") as file:
            shutil.copyfileobj(content, file, _BLOCK)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o755)
        beside.rename(program)
    descriptor = os.open(program.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _program_in(release: Release, archive: Path) -> IO[bytes]:
    """The program's bytes: the file itself, or one member of it. No path of it is ever used."""
    if release.member is None:
        return archive.open("rb")
    try:
        # The member's file keeps the archive open.
        content = tarfile.open(archive, "r:gz").extractfile(release.member)  # noqa: SIM115
    except (tarfile.TarError, KeyError) as error:
        raise DamagedData(f"{release.member} is not in {archive.name}") from error
    if content is None:
        raise DamagedData(f"{release.member} is no file")
    return content
