"""The FastAPI application: routes, errors, limits and the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import RedirectResponse

from stillframe.api import errors
from stillframe.api.auth import Authenticator
from stillframe.api.border import Border
from stillframe.api.repeats import Repeats
from stillframe.api.routes import (
    absent,
    copy,
    exec,
    forks,
    images,
    instances,
    logs,
    schedules,
    snapshots,
    system,
)
from stillframe.engine.interface import EngineInterface
from stillframe.model.values import Hypervisor

ROUTERS = (
    system.router,
    instances.router,
    logs.router,
    exec.router,
    copy.router,
    snapshots.router,
    forks.router,
    schedules.router,
    images.router,
    absent.router,
)


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """What the routes need beside the engine.

    ``default_hypervisor`` is named in the capabilities (None: the first available one);
    ``upload_dir`` receives archives while they are imported (None: the system's temporary
    directory); ``private_paths`` are blotted out of error messages; ``max_upload_bytes`` bounds
    one import.
    """

    version: str
    default_hypervisor: Hypervisor | None = None
    upload_dir: Path | None = None
    private_paths: Sequence[Path] = ()
    max_upload_bytes: int = 64 * 1024**3


class _Api(FastAPI):
    """FastAPI with the security scheme in its OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made once."""
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title,
                version=self.version,
                description=self.description,
                routes=self.routes,
            )
            document.setdefault("components", {})["securitySchemes"] = {
                "bearerAuth": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
            }
            self.openapi_schema = document
        return self.openapi_schema


def create_app(
    engine: EngineInterface,
    *,
    jwt_secret: bytes,
    version: str,
    default_hypervisor: Hypervisor | None = None,
    upload_dir: Path | None = None,
    private_paths: Sequence[Path] = (),
) -> FastAPI:
    """The whole API over an engine that the caller opens and closes.

    Raises InvalidRequest when ``jwt_secret`` is shorter than 32 bytes. The other arguments are
    those of ``ApiOptions``.
    """
    app = bare_app(version)
    app.state.engine = engine
    app.state.authenticator = Authenticator(jwt_secret)
    app.state.repeats = Repeats()
    app.state.options = ApiOptions(
        version=version,
        default_hypervisor=default_hypervisor,
        upload_dir=upload_dir,
        private_paths=tuple(private_paths),
    )
    app.state.private_texts = tuple(str(path) for path in private_paths)
    return app


def bare_app(version: str) -> FastAPI:
    """The API without what it is over: it knows its routes, and can answer for none."""
    app = _Api(
        title="Stillframe",
        version=version,
        description="Snapshot and fork virtual machines. Speaks the Hypeman HTTP API.",
        redirect_slashes=False,
        redoc_url=None,
    )
    errors.install(app)
    # The one added last is the outermost.
    app.add_middleware(Border)
    app.add_middleware(errors.Boundary)
    for router in ROUTERS:
        app.include_router(router)
    for path, answer in (("/spec.json", _document), ("/spec.yaml", _document), ("/swagger", _page)):
        app.add_route(path, answer)
    return app


async def _document(request: Request) -> Response:
    """The OpenAPI document by the contract's names. Any JSON is YAML too (YAML 1.2)."""
    kind = "application/yaml" if request.url.path.endswith(".yaml") else "application/json"
    return Response(json.dumps(request.app.openapi()), media_type=kind)


async def _page(request: Request) -> Response:
    """The page that shows the document, by the contract's name."""
    return RedirectResponse(f"{request.scope.get('root_path', '').rstrip('/')}/docs")
