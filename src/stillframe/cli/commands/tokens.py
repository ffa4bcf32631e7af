"""Tokens: HS256 JWTs as the contract wants them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from stillframe.model.errors import NotFound


def mint_token(
    secret: bytes,
    *,
    subject: str,
    lifetime: timedelta,
    permissions: Sequence[str] | None = None,
) -> str:
    """A signed token; ``permissions`` None means full access."""
    import jwt

    now = int(time.time())
    claims: dict[str, object] = {
        "sub": subject,
        "iat": now,
        "exp": now + int(lifetime.total_seconds()),
    }
    if permissions is not None:
        claims["permissions"] = list(permissions)
    return jwt.encode(claims, secret, algorithm="HS256")


def read_secret(data_dir: Path) -> bytes:
    """The server's signing key, for its own user on its own machine. Raises NotFound."""
    path = data_dir / "jwt-secret"
    try:
        return path.read_bytes().strip()
    except FileNotFoundError as error:
        raise NotFound(
            f"no server has run on {data_dir}",
            hint="start `stillframe serve` first, or name a server with STILLFRAME_URL and its "
            "token with STILLFRAME_TOKEN",
        ) from error
    except OSError as error:
        raise NotFound(
            f"cannot read the server's secret {path}: {error.strerror}",
            hint="start `stillframe serve` first, run this as the server's user, "
            "or set STILLFRAME_TOKEN",
        ) from error
