"""What may be imported: OCI layouts, their tars, docker archives and plain root file systems."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from stillframe.images import tarread
from stillframe.images.disk import build_root_disk
from stillframe.images.layers import MergedLayers
from stillframe.images.layout import LayeredImage, open_source
from stillframe.model.errors import InvalidRequest, NotFound
from support.registry import OCI, layer, write_layout

CONFIG = {
    "Entrypoint": ["/init"], "Cmd": ["serve"], "Env": ["A=1=2"], "WorkingDir": "/srv",
    "User": "7",
}  # fmt: skip


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An OCI layout of two layers; the upper one replaces a file of the lower."""
    lower = layer(("etc/name", b"lower"), ("etc/only", b"below"))
    write_layout(tmp_path / "layout", [lower, layer(("etc/name", b"upper"))], CONFIG)
    return tmp_path / "layout"


def packed(directory: Path, target: Path, mode: str = "w") -> Path:
    """A tar of a directory's content, as ``tar -C`` makes it."""
    with tarfile.open(target, mode) as archive:  # type: ignore[call-overload]
        archive.add(directory, arcname=".")
    return target


def opened(source: Path, tmp_path: Path) -> LayeredImage:
    """The image at ``source``, unpacked where nothing else is."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return open_source(source, scratch)


def content(image: LayeredImage, name: str, tmp_path: Path) -> str:
    """A file of the root disk built from the image, read by the squashfs tools themselves."""
    disk = tmp_path / "root.squashfs"
    disk.unlink(missing_ok=True)
    merged = MergedLayers(image.blobs)
    build_root_disk(merged.write, disk, root_mode=merged.root_mode)
    done = subprocess.run(
        ["unsquashfs", "-cat", str(disk), name], capture_output=True, check=True, timeout=60
    )
    return done.stdout.decode()


def check(image: LayeredImage, tmp_path: Path) -> None:
    """The image is that of the fixture ``layout``, whatever it was carried in."""
    config = image.config
    assert (config.entrypoint, config.cmd, config.user) == (("/init",), ("serve",), "7")
    assert (config.env, config.working_dir) == ({"A": "1=2"}, "/srv")
    assert content(image, "etc/name", tmp_path) == "upper"
    assert content(image, "etc/only", tmp_path) == "below"


def test_a_layout_directory(layout: Path, tmp_path: Path) -> None:
    check(opened(layout, tmp_path), tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_of_a_layout_keeps_its_digest(layout: Path, tmp_path: Path, mode: str) -> None:
    image = opened(packed(layout, tmp_path / "layout.tar", mode), tmp_path)
    index = json.loads((layout / "index.json").read_text())
    assert image.digest == index["manifests"][0]["digest"]
    check(image, tmp_path)


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
def test_a_docker_archive_whose_manifest_comes_last(layout: Path, tmp_path: Path) -> None:
    archive = tmp_path / "docker.tar"
    subprocess.run(
        ["skopeo", "copy", "-q", "--insecure-policy", "--tmpdir", str(tmp_path),
         f"oci:{layout}:latest", f"docker-archive:{archive}:some/name:1"],
        check=True, timeout=60,
    )  # fmt: skip
    with tarfile.open(archive) as opened_archive:
        assert opened_archive.getnames()[0] != "manifest.json"
    check(opened(archive, tmp_path), tmp_path)


def test_a_root_file_system_has_no_config(tmp_path: Path) -> None:
    source = tmp_path / "root.tar"
    source.write_bytes(layer(("bin/sh", b"a shell"), ("etc/manifest.json", b"not ours")))
    image = opened(source, tmp_path)
    assert (image.config.cmd, image.config.entrypoint, image.digest) == ((), (), None)
    assert content(image, "bin/sh", tmp_path) == "a shell"


def test_a_root_file_system_with_a_name_like_a_digest(tmp_path: Path) -> None:
    source = tmp_path / "root.tar"
    source.write_bytes(layer(("0" * 64, b"mine"), ("etc/name", b"plain")))
    assert content(opened(source, tmp_path), "etc/name", tmp_path) == "plain"


def test_a_changed_blob_is_refused(layout: Path, tmp_path: Path) -> None:
    blobs = sorted((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    for blob in blobs:
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
    with pytest.raises(InvalidRequest, match="does not have that digest"):
        opened(packed(layout, tmp_path / "layout.tar"), tmp_path)


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_s23_a_blob_of_another_size_is_refused(layout: Path, tmp_path: Path, size: int) -> None:
    (digest,) = (m["digest"] for m in json.loads((layout / "index.json").read_text())["manifests"])
    manifest = layout / "blobs" / "sha256" / digest.removeprefix("sha256:")
    document = json.loads(manifest.read_text())
    document["layers"][0]["size"] = size
    data = json.dumps(document).encode()
    digits = hashlib.sha256(data).hexdigest()
    (manifest.parent / digits).write_bytes(data)
    kind = f"{OCI}.manifest.v1+json"
    index = {"manifests": [{"mediaType": kind, "digest": f"sha256:{digits}", "size": len(data)}]}
    (layout / "index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidRequest, match=f"is not {size} bytes long"):
        opened(packed(layout, tmp_path / "layout.tar"), tmp_path)


def sparse(name: str, size: int) -> tarfile.TarInfo:
    """A file of ``size`` zeros that takes no room in the tar (GNU sparse format 0.1)."""
    info = tarfile.TarInfo(name)
    info.pax_headers = {
        "GNU.sparse.size": str(size), "GNU.sparse.numblocks": "1",
        "GNU.sparse.map": f"{size},0", "GNU.sparse.name": name,
    }  # fmt: skip
    return info


def test_s22_an_archive_of_a_layout_cannot_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarread, "RATIO_FREE", 1 << 20)
    source = tmp_path / "bomb.tar"
    names = [f"blobs/sha256/{letter * 64}" for letter in "abcd"]
    bomb = layer(("oci-layout", b"{}"), *(sparse(name, 900_000) for name in names))
    source.write_bytes(bomb)
    with pytest.raises(InvalidRequest, match="too many bytes"):
        opened(source, tmp_path)
    written = sum(p.stat().st_size for p in (tmp_path / "scratch").rglob("*") if p.is_file())
    assert written < 4 * 900_000


def test_s22_an_archive_of_very_many_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillframe.images.layout.MAX_ENTRIES", 50)
    source = tmp_path / "many.tar"
    source.write_bytes(layer(*((f"blobs/{n}", b"") for n in range(60))))
    with pytest.raises(InvalidRequest, match="more than 50 entries"):
        opened(source, tmp_path)


def test_a_layout_that_lacks_a_blob_is_refused(layout: Path, tmp_path: Path) -> None:
    shutil.rmtree(layout / "blobs" / "sha256")
    with pytest.raises(InvalidRequest, match="lacks blob"):
        opened(layout, tmp_path)


def test_an_image_for_another_machine_is_refused(layout: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(NotFound) as caught:
        open_source(layout, scratch, platform="linux/arm64")
    assert caught.value.code == "platform_not_available"
