"""What the contract scenarios share: the hypervisor, the image, a token, types of fixtures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
from hypeman import APIStatusError
from hypeman.types import Instance

from support.server import Server

IMAGE = os.environ.get("STILLFRAME_CONTRACT_IMAGE", "stillframe/base")
HYPERVISOR = os.environ.get("STILLFRAME_CONTRACT_HYPERVISOR", "fake")

Maker = Callable[..., Instance]
Refused = Callable[..., APIStatusError]


def mint(server: Server | Path, **claims: object) -> str:
    """A token signed with the own secret of a server, or of the one on that data directory."""
    data_dir = server if isinstance(server, Path) else server.data_dir
    secret = (data_dir / "jwt-secret").read_text().strip()
    now = int(time.time())
    return jwt.encode({"sub": "t", "iat": now, "exp": now + 3600, **claims}, secret)


def body_of(error: APIStatusError) -> Any:
    """The error body of a refusal."""
    return error.body
