"""Routes of the contract that this server does not carry out.

Each asks for the contract's scope like any other, and is then refused with 501 ``not_supported``: a
404 would say that there is no such instance, volume or build.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import APIRouter

from stillframe.api.auth import ScopedRoute, needs
from stillframe.api.errors import problems
from stillframe.model.errors import NotSupported

router = APIRouter(route_class=ScopedRoute, tags=["not supported"])

# Method, path and scope of each, as the contract has them.
ABSENT = (
    ("POST", "/instances/{id}/auto-standby/hold", "instance:write"),
    ("POST", "/instances/{id}/volumes/{volume_id}", "volume:write"),
    ("DELETE", "/instances/{id}/volumes/{volume_id}", "volume:write"),
    ("GET", "/pushes", "image:read"),
    ("POST", "/pushes", "image:write"),
    ("GET", "/pushes/{id}", "image:read"),
    ("GET", "/volumes", "volume:read"),
    ("POST", "/volumes", "volume:write"),
    ("POST", "/volumes/from-archive", "volume:write"),
    ("GET", "/volumes/{id}", "volume:read"),
    ("DELETE", "/volumes/{id}", "volume:delete"),
    ("GET", "/devices", "device:read"),
    ("POST", "/devices", "device:write"),
    ("GET", "/devices/available", "device:read"),
    ("GET", "/devices/{id}", "device:read"),
    ("DELETE", "/devices/{id}", "device:delete"),
    ("GET", "/ingresses", "ingress:read"),
    ("POST", "/ingresses", "ingress:write"),
    ("GET", "/ingresses/{id}", "ingress:read"),
    ("DELETE", "/ingresses/{id}", "ingress:delete"),
    ("GET", "/builds", "build:read"),
    ("POST", "/builds", "build:write"),
    ("GET", "/builds/{id}", "build:read"),
    ("DELETE", "/builds/{id}", "build:delete"),
    ("GET", "/builds/{id}/events", "build:read"),
    ("GET", "/builders", "build:read"),
    ("POST", "/builders", "build:write"),
    ("GET", "/builders/{id}", "build:read"),
    ("DELETE", "/builders/{id}", "build:delete"),
    ("POST", "/builders/{id}/prune", "build:write"),
    ("POST", "/resources/memory/reclaim", "resource:read"),
)


def _refusing(method: str, path: str) -> Callable[[], Coroutine[Any, Any, NoReturn]]:
    async def refuse() -> NoReturn:
        raise NotSupported(
            f"{method} {path} is not supported by this server",
            hint="/docs lists what is",
            route=f"{method} {path}",
        )

    return refuse


for _method, _path, _scope in ABSENT:
    router.add_api_route(
        _path,
        _refusing(_method, _path),
        methods=[_method],
        responses=problems(501),
        response_model=None,
        openapi_extra=needs(_scope),
        # The document is of what works.
        include_in_schema=False,
    )
