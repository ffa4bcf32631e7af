"""Who may do what: JWT bearer tokens and one scope per route.

A route says ``openapi_extra=needs("instance:read")`` on a router whose ``route_class`` is
``ScopedRoute``; a WebSocket says ``dependencies=[Depends(RequiredScope("instance:write"))]``. A
route without a scope does not come into being. The check runs before the body is read.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import jwt
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import HTTPConnection

from stillframe.api.border import UPLOAD_PATHS
from stillframe.api.repeats import Repeats
from stillframe.model.errors import Forbidden, InvalidRequest, Unauthorized
from stillframe.model.scopes import SCOPES

_DRY_RUN = "dry_run"
_SCOPE_KEY = "x-required-scope"
# Fixed here and never taken from the token's header (RFC 8725), each with the shortest secret it
# may be used with (RFC 7518, section 3.2).
_ALGORITHMS = {"HS256": 32, "HS384": 48, "HS512": 64}
_LEEWAY_SECONDS = 30
_REGISTRY_CLAIMS = ("repos", "scope", "build_id")


class Authenticator:
    """Verifies tokens with the server's secret of at least 32 bytes."""

    def __init__(self, secret: bytes) -> None:
        """Raises InvalidRequest when the secret is too short for HMAC-SHA256."""
        if len(secret) < 32:
            raise InvalidRequest("the JWT secret is shorter than 32 bytes")
        self._secret = secret
        self._algorithms = [name for name, least in _ALGORITHMS.items() if len(secret) >= least]

    def claims(self, header: str | None) -> Mapping[str, Any]:
        """The verified claims of an Authorization header. Raises Unauthorized.

        A token must expire; one made for the registry is refused.
        """
        if not header:
            raise Unauthorized("authorization header required")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip() or " " in token.strip():
            raise Unauthorized("invalid authorization header format")
        try:
            claims: dict[str, Any] = jwt.decode(
                token.strip(),
                self._secret,
                algorithms=self._algorithms,
                options={"require": ["exp"]},
                leeway=_LEEWAY_SECONDS,
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
            raise Unauthorized("invalid token") from error
        if any(name in claims for name in _REGISTRY_CLAIMS):
            raise Unauthorized("invalid token type")
        if str(claims.get("sub", "")).startswith("builder-"):
            raise Unauthorized("invalid token type")
        return claims

    def authorise(self, header: str | None, scope: str) -> None:
        """Raises Unauthorized or Forbidden unless the header's token grants ``scope``."""
        claims = self.claims(header)
        if "permissions" not in claims:
            return
        permissions = claims["permissions"]
        if not isinstance(permissions, list):
            raise Unauthorized("invalid token")
        if scope not in permissions and "*" not in permissions:
            raise Forbidden(f"missing required scope: {scope}")


def needs(scope: str | None) -> dict[str, Any]:
    """The declaration of a route's scope for ``openapi_extra``; None makes it public."""
    if scope is None:
        return {_SCOPE_KEY: None, "security": []}
    if scope not in SCOPES:
        raise InvalidRequest(f"unknown scope {scope!r}")
    return {_SCOPE_KEY: scope, "security": [{"bearerAuth": []}]}


def required_scope(route: APIRoute) -> str | None:
    """The scope a route declares. Raises InvalidRequest when it declares none at all."""
    extra = route.openapi_extra or {}
    if _SCOPE_KEY not in extra:
        raise InvalidRequest(f"route {route.path} declares no scope")
    scope: str | None = extra[_SCOPE_KEY]
    return scope


class ScopedRoute(APIRoute):
    """A route that checks its scope before anything else, the body included.

    Behind the check, a request that a client repeats is carried out once (``repeats.py``).
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind the check."""
        scope = required_scope(self)
        handler = super().get_route_handler()
        previews = any(field.alias == _DRY_RUN for field in self.dependant.query_params)
        if scope is None:
            return handler
        reads_by_itself = self.path in UPLOAD_PATHS  # more than may be held in memory

        async def guarded(request: Request) -> Response:
            authorise(request, scope)
            if not previews:
                refuse_dry_run(request)
            if reads_by_itself or request.method in ("GET", "HEAD"):
                return await handler(request)
            repeats: Repeats = request.app.state.repeats
            return await repeats.answer(request, handler)

        return guarded


class RequiredScope:
    """The check as a dependency, for WebSockets: it answers before the upgrade."""

    def __init__(self, scope: str) -> None:
        self.scope = str(needs(scope)[_SCOPE_KEY])

    async def __call__(self, connection: HTTPConnection) -> None:
        """Raises Unauthorized, Forbidden, and InvalidRequest for a dry run."""
        authorise(connection, self.scope)
        refuse_dry_run(connection)


def refuse_dry_run(connection: HTTPConnection) -> None:
    """Raises InvalidRequest for ``dry_run`` where there is none: it would be done in earnest."""
    if _DRY_RUN in connection.query_params:
        raise InvalidRequest(
            "dry_run is not offered here; nothing was done",
            hint="ask again without it, if it is to be done",
            parameter=_DRY_RUN,
        )


def grants(connection: HTTPConnection, scope: str) -> bool:
    """Whether a request's token has ``scope`` too, beside that of the route."""
    try:
        authorise(connection, scope)
    except Forbidden:
        return False
    return True


def authorise(connection: HTTPConnection, scope: str) -> None:
    """Check a request's token for ``scope``. Raises Unauthorized or Forbidden."""
    authenticator: Authenticator = connection.app.state.authenticator
    authenticator.authorise(connection.headers.get("authorization"), scope)
