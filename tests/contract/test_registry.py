"""Pulling from a real registry."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.images.library import ImageLibrary
from stillframe.model.errors import InvalidRequest, NotFound
from stillframe.model.values import Image, ImageStatus
from stillframe.store.records import Intent
from support.registry import Registry, available, layer, running_registry, write_layout

pytestmark = pytest.mark.skipif(not available, reason="needs docker-registry and skopeo")


class MemoryRecords:
    """Image records that vanish with the test."""

    def __init__(self) -> None:
        self.images: dict[str, Image] = {}
        self.intents: dict[str | None, Intent] = {}

    def put(self, image: Image, *, fulfils: str | None = None, can_wait: bool = False) -> None:
        self.fulfil(fulfils)
        self.images[image.name] = image

    def get(self, name: str) -> Image | None:
        return self.images.get(name)

    def list(self) -> list[Image]:
        return list(self.images.values())

    def delete(self, name: str, intent: Intent | None = None, *, can_wait: bool = False) -> None:
        del self.images[name]
        if intent is not None:
            self.intend(intent)

    def intend(self, intent: Intent) -> None:
        self.intents[intent.subject] = intent

    def fulfil(self, subject: str | None) -> None:
        self.intents.pop(subject, None)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running_registry(tmp_path) as running:
        yield running


def contents(disk: Path, name: str) -> str:
    done = subprocess.run(
        ["unsquashfs", "-cat", disk, name], capture_output=True, check=True, timeout=60
    )
    return done.stdout.decode()


async def test_pull_by_tag_and_digest_merges_layers(tmp_path: Path, registry: Registry) -> None:
    layers = [
        layer(("etc/a", b"old"), ("etc/gone", b"x")),
        layer(("etc/a", b"new"), ("etc/.wh.gone", b"")),
    ]
    digest = write_layout(tmp_path / "oci", layers, {"Cmd": ["/bin/a"], "Env": ["K=a=b"]})
    target = registry.push(tmp_path / "oci", "team/app:1")
    library = ImageLibrary(tmp_path / "images", MemoryRecords())
    pending = library.begin_pull(target)
    assert pending.status is ImageStatus.PENDING
    image = await library.ensure(target)
    assert (image.status, image.digest) == (ImageStatus.READY, digest)
    assert (image.config.cmd, image.config.env) == (("/bin/a",), {"K": "a=b"})
    disk = library.root_disk(image.digest)
    assert contents(disk, "etc/a") == "new"
    with pytest.raises(subprocess.CalledProcessError):
        contents(disk, "etc/gone")
    by_digest = await library.ensure(f"{registry.address}/team/app@{digest}")
    assert by_digest.digest == digest
    assert library.find(digest[7:20]).digest == digest
    await library.close()


async def test_a_missing_image_is_not_found(tmp_path: Path, registry: Registry) -> None:
    library = ImageLibrary(tmp_path / "images", MemoryRecords())
    with pytest.raises(NotFound):
        await library.ensure(f"{registry.address}/team/none:1")
    assert library.list()[0].status is ImageStatus.FAILED
    assert list((tmp_path / "images").iterdir()) == []


async def test_a_corrupted_blob_is_refused(tmp_path: Path, registry: Registry) -> None:
    write_layout(tmp_path / "oci", [layer(("a", b"content" * 100))])
    target = registry.push(tmp_path / "oci", "team/bad:1")
    index = json.loads((tmp_path / "oci" / "index.json").read_text())
    name = index["manifests"][0]["digest"].removeprefix("sha256:")
    manifest = json.loads((tmp_path / "oci" / "blobs" / "sha256" / name).read_text())
    stored = registry.blob(manifest["layers"][0]["digest"])
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    library = ImageLibrary(tmp_path / "images", MemoryRecords())
    with pytest.raises(InvalidRequest) as caught:
        await library.ensure(target)
    assert caught.value.code == "invalid_layer"
    assert list((tmp_path / "images").iterdir()) == []
