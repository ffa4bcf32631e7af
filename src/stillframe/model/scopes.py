"""What a token may grant: the contract's scopes."""

from __future__ import annotations

SCOPES = frozenset(
    f"{kind}:{right}"
    for kind in ("instance", "image", "volume", "snapshot", "build", "device", "ingress")
    for right in ("read", "write", "delete")
) | {"resource:read"}
