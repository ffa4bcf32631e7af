"""Health, capabilities, resources, and the measurements."""

from __future__ import annotations

import platform

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from stillframe.api.auth import ScopedRoute, needs
from stillframe.api.border import METRICS_TYPE, Engine
from stillframe.api.errors import blot, private_texts, problems
from stillframe.api.schemas.system import (
    Capabilities,
    DefaultRuntime,
    Health,
    HostInfo,
    ImagesInfo,
    NetworkInfo,
    Resources,
    Runtime,
    ServerInfo,
)

router = APIRouter(route_class=ScopedRoute, tags=["system"])

CONTRACT_VERSION = "0.3.0"
# The contract also calls builds, volumes and ingress always present; we name what works.
_FEATURES = ("exec", "images", "instances", "logs")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@router.get("/health", response_model=Health, openapi_extra=needs(None))
async def health() -> JSONResponse:
    """Say that the server answers. Needs no token."""
    return Health().response()


@router.get(
    "/capabilities",
    response_model=Capabilities,
    responses=problems(),
    openapi_extra=needs("resource:read"),
)
async def capabilities(request: Request, engine: Engine) -> JSONResponse:
    """Say what this server and its hypervisors can do on this host."""
    private = private_texts(request)
    runtimes = [
        Runtime(
            name=probe.hypervisor.value,
            available=probe.available,
            features=sorted(probe.features),
            version=probe.version or None,
            accelerator=probe.accelerator or None,
            reason=blot(probe.reason, private) if probe.reason else None,
            hint=blot(probe.hint, private) if probe.hint else None,
        )
        for probe in await engine.probe_drivers()
    ]
    runtimes.sort(key=lambda runtime: runtime.name)
    options = request.app.state.options
    arch = _ARCHITECTURES.get(platform.machine(), platform.machine())
    return Capabilities(
        server=ServerInfo(version=options.version, api_version=CONTRACT_VERSION),
        host=HostInfo(os=platform.system().lower(), arch=arch),
        default_runtime=_default(runtimes, options.default_hypervisor),
        runtimes=runtimes,
        network=NetworkInfo(model="nat", guest_to_guest=False),
        images=ImagesInfo(default_platform=f"linux/{arch}", platforms=[f"linux/{arch}"]),
        features=list(_FEATURES),
    ).response()


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=problems(),
    openapi_extra=needs("resource:read"),
)
async def metrics(engine: Engine) -> PlainTextResponse:
    """All measurements in Prometheus' text format."""
    return PlainTextResponse(engine.metrics(), media_type=METRICS_TYPE)


@router.get(
    "/resources",
    response_model=Resources,
    responses=problems(),
    openapi_extra=needs("resource:read"),
)
async def resources(engine: Engine) -> JSONResponse:
    """Say what the host has, and what instances and snapshots take of it."""
    return Resources.of(await engine.resources()).response()


def _default(runtimes: list[Runtime], wanted: str | None) -> DefaultRuntime:
    available = [runtime.name for runtime in runtimes if runtime.available]
    name = wanted or next(iter(available), "qemu")
    return DefaultRuntime(name=name, available=name in available)
