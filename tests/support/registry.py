"""A real docker-registry on the loopback, and OCI layouts built by code to put into it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

OCI = "application/vnd.oci.image"
available = bool(shutil.which("docker-registry") and shutil.which("skopeo"))


def layer(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    """A tar of files given as (name, content) or of ready entries without content."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return output.getvalue()


def write_layout(root: Path, layers: Sequence[bytes], config: dict[str, Any] | None = None) -> str:
    """An OCI layout directory with one linux/amd64 image; its manifest digest."""
    blobs = root / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"{OCI}.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    diff_ids = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]
    packed = [put(gzip.compress(data, mtime=0), "layer.v1.tar+gzip") for data in layers]
    document = {
        "architecture": "amd64", "os": "linux", "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": put(json.dumps(document).encode(), "config.v1+json"),
        "layers": packed,
    }
    found = put(json.dumps(manifest).encode(), "manifest.v1+json")
    found["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [found]}))
    return str(found["digest"])


@dataclass(frozen=True, slots=True)
class Registry:
    """A running registry: ``address`` is host:port, ``storage`` its directory."""

    address: str
    storage: Path

    def push(self, layout: Path, name: str) -> str:
        """Copy a layout to ``name`` (repository:tag); the full reference."""
        target = f"{self.address}/{name}"
        subprocess.run(
            ["skopeo", "copy", "-q", "--insecure-policy", "--dest-tls-verify=false",
             f"oci:{layout}:latest", f"docker://{target}"],
            check=True, timeout=60,
        )  # fmt: skip
        return target

    def blob(self, digest: str) -> Path:
        """Where the registry keeps a blob."""
        digits = digest.removeprefix("sha256:")
        home = self.storage / "docker" / "registry" / "v2" / "blobs" / "sha256"
        return home / digits[:2] / digits / "data"


@contextlib.contextmanager
def running_registry(directory: Path) -> Iterator[Registry]:
    """Run docker-registry on a free loopback port with its storage in ``directory``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    storage = directory / "registry"
    config = directory / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{address}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{storage}'}}}}\n"
    )
    with (directory / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(config)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                with urlopen(f"http://{address}/v2/", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (directory / "registry.log").read_text()
                assert time.monotonic() < deadline, "the registry does not answer"
                time.sleep(0.05)
        yield Registry(address, storage)
    finally:
        process.kill()
        process.wait()
