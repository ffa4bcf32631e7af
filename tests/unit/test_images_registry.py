"""Registries that mean no good: what they send is bounded, and believed in nothing (S23, S24)."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stillframe.images.reference import parse_reference
from stillframe.images.registry import RegistryClient
from stillframe.model.errors import InvalidRequest
from support.registry import OCI, layer

PLATFORM = "linux/amd64"


class Hostile:
    """A registry that answers a path with what ``answers`` has for it; ``sent`` counts bytes.

    With ``token`` it wants one first, from a token server that answers so.
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[str, bytes]] = {}
        self.token: Callable[[], Iterator[bytes]] | None = None
        self.token_headers: dict[str, str] = {}
        self.sent = 0
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/token" and hostile.token is not None:
                    self.give_token(hostile.token())
                elif hostile.token is not None:
                    self.send_response(401)
                    realm = f'Bearer realm="http://{hostile.address}/token"'
                    self.send_header("www-authenticate", realm)
                    self.end_headers()
                else:
                    kind, data = hostile.answers[path.rpartition("/")[2]]
                    self.send_response(200)
                    self.send_header("content-type", kind)
                    self.end_headers()
                    self.wfile.write(data)

            def give_token(self, body: Iterator[bytes]) -> None:
                self.send_response(200)
                for name, value in hostile.token_headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for piece in body:
                        self.wfile.write(piece)
                        hostile.sent += len(piece)
                except OSError:  # the client has hung up
                    pass

            def log_message(self, format: str, *args: object) -> None:
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"

    def put(self, data: bytes, kind: str) -> dict[str, Any]:
        """Offer a blob; the descriptor that tells the truth about it."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.answers[digest] = ("application/octet-stream", data)
        return {"mediaType": f"{OCI}.{kind}", "digest": digest, "size": len(data)}

    def offer(self, found: dict[str, Any], **changes: Any) -> None:
        """Offer an image of one layer, whose manifest is changed by ``changes``."""
        diff_id = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
        config = {
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        }  # fmt: skip
        kind = f"{OCI}.manifest.v1+json"
        manifest = {
            "schemaVersion": 2, "mediaType": kind, "layers": [found],
            "config": self.put(json.dumps(config).encode(), "config.v1+json"), **changes,
        }  # fmt: skip
        self.answers["1"] = (kind, json.dumps(manifest).encode())

    async def pull(self, directory: Path) -> None:
        """Pull the image into the new ``directory``."""
        directory.mkdir()
        async with RegistryClient(parse_reference(f"{self.address}/team/app:1")) as client:
            await client.pull(PLATFORM, directory)


DATA = layer(("a", b"content" * 100))


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    hostile = Hostile()
    thread = threading.Thread(target=hostile.server.serve_forever)
    thread.start()
    yield hostile
    hostile.server.shutdown()
    thread.join()
    hostile.server.server_close()


@pytest.fixture
def found(hostile: Hostile) -> dict[str, Any]:
    """The descriptor of the one good layer."""
    return hostile.put(gzip.compress(DATA, mtime=0), "layer.v1.tar+gzip")


async def test_what_tells_the_truth_is_taken(
    hostile: Hostile, found: dict[str, Any], tmp_path: Path
) -> None:
    hostile.offer(found)
    await hostile.pull(tmp_path / "blobs")
    assert (tmp_path / "blobs" / found["digest"].removeprefix("sha256:")).is_file()


async def test_a_token_without_end_is_left_off(hostile: Hostile, tmp_path: Path) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1024):
            yield bytes(1 << 20)

    hostile.token = endless
    with pytest.raises(InvalidRequest, match="token is too large"):
        await hostile.pull(tmp_path / "blobs")
    hostile.server.shutdown()
    assert hostile.sent < 100 << 20  # the limit, and what fits into the sockets


async def test_a_token_is_not_expanded(hostile: Hostile, tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(64 << 20))
    hostile.token, hostile.token_headers = lambda: iter([bomb]), {"content-encoding": "gzip"}
    with pytest.raises(InvalidRequest, match="not JSON"):
        await hostile.pull(tmp_path / "blobs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 1}, "is longer than 1 bytes"),
        ({"size": 1 << 20}, "is not 1048576 bytes long"),
        ({"size": 1 << 40}, "is too large"),
        ({"size": -1}, "malformed descriptor"),
        ({"mediaType": f"{OCI}.layer.nondistributable.v1.tar"}, "are not supported"),
        ({"mediaType": "text/html"}, "are not supported"),
        ({"digest": "sha512:" + "0" * 128}, "malformed descriptor"),
    ],
)
async def test_s23_a_layer_that_is_not_what_its_descriptor_says_is_refused(
    hostile: Hostile,
    found: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    hostile.offer(found | changes)
    with pytest.raises(InvalidRequest, match=message):
        await hostile.pull(tmp_path / "blobs")


async def test_s23_a_layer_with_other_bytes_is_refused(
    hostile: Hostile, found: dict[str, Any], tmp_path: Path
) -> None:
    hostile.offer(found)
    kind, data = hostile.answers[found["digest"]]
    hostile.answers[found["digest"]] = (kind, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InvalidRequest, match="does not have that digest"):
        await hostile.pull(tmp_path / "blobs")


@pytest.mark.parametrize("kind", ["application/vnd.docker.distribution.manifest.v1+json", 7])
async def test_s23_a_manifest_of_another_type_is_refused(
    hostile: Hostile, found: dict[str, Any], tmp_path: Path, kind: object
) -> None:
    hostile.offer(found, mediaType=kind)
    with pytest.raises(InvalidRequest, match="are not supported"):
        await hostile.pull(tmp_path / "blobs")
