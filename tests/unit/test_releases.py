"""``stillframe setup``: pinned releases from a local server that behaves and misbehaves."""

from __future__ import annotations

import hashlib
import io
import random
import re
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stillframe.cli.main import app
from stillframe.host import releases
from stillframe.host.releases import RELEASES, Release, install, is_installed, release_for
from stillframe.model.errors import DamagedData, HostFailure, NotSupported

PROGRAM = random.Random(1).randbytes(100_000)  # which does not compress


def archive(member: str = "release/firecracker") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in ((member, PROGRAM), ("../../evil", b"evil")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()


class Mirror:
    """A web server with one file. ``breaks_off`` bytes are sent of it, the first time."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.breaks_off: int | None = None
        self.ranges: list[str | None] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.ranges.append(self.headers["range"])
                first = int(re.findall(r"\d+", self.headers["range"] or "0")[0])
                if self.path != "/file":
                    self.send_error(404)
                elif first >= len(mirror.content):
                    self.send_error(416)
                else:
                    self.send_response(206 if first else 200)
                    self.send_header("content-length", str(len(mirror.content) - first))
                    self.end_headers()
                    end, mirror.breaks_off = mirror.breaks_off, None
                    self.wfile.write(mirror.content[first:end])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/file"

    def release(self, member: str | None = "release/firecracker") -> Release:
        digest = hashlib.sha256(self.content).hexdigest()
        return Release("firecracker", "9.9.9", self.url, digest, member)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    made = Mirror(archive())
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_release_is_installed_whole(mirror: Mirror, tmp_path: Path) -> None:
    directory = tmp_path / "deep/programs"
    assert not is_installed(mirror.release(), directory)
    came: list[int] = []
    program = install(mirror.release(), directory, progress=came.append)
    assert program.read_bytes() == PROGRAM
    assert program.stat().st_mode & 0o777 == 0o755
    assert sum(came) == len(mirror.content)
    assert is_installed(mirror.release(), directory)
    assert names(directory) == {"firecracker", ".firecracker.sha256"}
    assert not (tmp_path / "evil").exists()


def test_a_program_that_is_no_archive_is_installed_as_it_is(mirror: Mirror, tmp_path: Path) -> None:
    mirror.content = PROGRAM
    assert install(mirror.release(member=None), tmp_path).read_bytes() == PROGRAM


def test_a_download_that_broke_off_goes_on(mirror: Mirror, tmp_path: Path) -> None:
    mirror.breaks_off = 5000
    with pytest.raises(HostFailure, match="cannot be downloaded") as failure:
        install(mirror.release(), tmp_path)
    assert "--from" in str(failure.value.hint)
    assert not (tmp_path / "firecracker").exists()
    install(mirror.release(), tmp_path)
    assert mirror.ranges == [None, "bytes=5000-"]
    assert (tmp_path / "firecracker").read_bytes() == PROGRAM


def test_what_is_whole_already_is_not_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / ".firecracker-9.9.9.part").write_bytes(mirror.content)
    install(mirror.release(), tmp_path)
    assert mirror.ranges == [f"bytes={len(mirror.content)}-"]


def test_another_checksum_is_refused_and_the_old_program_stays(
    mirror: Mirror, tmp_path: Path
) -> None:
    old = mirror.release()
    install(old, tmp_path)
    wanted = mirror.release()
    mirror.content = mirror.content[:-1] + b"!"
    with pytest.raises(DamagedData, match=wanted.sha256):
        install(wanted, tmp_path)
    assert (tmp_path / "firecracker").read_bytes() == PROGRAM
    assert names(tmp_path) == {
        "firecracker",
        ".firecracker.sha256",
    }  # and no bad part to go on with
    given = tmp_path / "given"
    given.write_bytes(b"not it")
    with pytest.raises(DamagedData):
        install(wanted, tmp_path, str(given))
    assert given.exists()


def test_an_archive_without_the_program_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(DamagedData, match="is not in"):
        install(mirror.release(member="release/other"), tmp_path)
    assert not (tmp_path / "firecracker").exists()


def test_a_server_that_has_it_not_is_named(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(HostFailure, match="answers 404"):
        install(mirror.release(), tmp_path, mirror.url + "s")


def test_the_command_installs_where_the_server_looks(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "release_for", lambda program, machine: mirror.release())
    command = ["--data-dir", str(tmp_path / "data"), "setup", "firecracker"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "data/programs/firecracker").read_bytes() == PROGRAM
    assert "checksum as published" in done.output
    again = CliRunner().invoke(app, command)
    assert "is installed" in again.output
    assert len(mirror.ranges) == 1


def test_every_pinned_release_is_complete() -> None:
    for (program, machine), release in RELEASES.items():
        assert release_for(program, machine) is release
        assert release.program == program
        assert re.fullmatch("[0-9a-f]{64}", release.sha256)
        assert release.url.startswith("https://github.com/")
        assert f"/v{release.version}/" in release.url
    assert len({release.sha256 for release in RELEASES.values()}) == len(RELEASES)
    with pytest.raises(NotSupported):
        release_for("firecracker", "riscv64")
