"""``stillframe serve`` and ``stillframe token``: the commands of the server's own machine.

``serve`` is the one place where this room reaches past ``model``: it starts the server in its own
process instead of speaking HTTP to it (an exception named in the house test).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillframe.cli.client import Client
from stillframe.cli.commands.tokens import mint_token, read_secret
from stillframe.cli.settings import Settings, load_settings
from stillframe.model.units import parse_duration


def serve(
    context: typer.Context,
    listen: Annotated[str | None, typer.Option("--listen", help="HOST:PORT; port 0: any.")] = None,
    metrics_listen: Annotated[
        str | None, typer.Option("--metrics-listen", help="HOST:PORT for /metrics alone, no token.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A TOML file.")] = None,
    hypervisor: Annotated[str | None, typer.Option("--hypervisor", help="The default one.")] = None,
    accelerator: Annotated[
        str | None, typer.Option("--accelerator", help="auto, kvm, tcg.")
    ] = None,
    log_format: Annotated[str | None, typer.Option("--log-format", help="plain or json.")] = None,
    log_level: Annotated[str | None, typer.Option("--log-level")] = None,
) -> None:
    """Run the server until SIGTERM; instances outlive it."""
    client: Client = context.obj
    settings = load_settings(
        config=config or client.config,
        flags={
            "listen": listen,
            "metrics_listen": metrics_listen,
            "data_dir": data_dir or client.data_dir,
            "default_hypervisor": hypervisor,
            "accelerator": accelerator,
            "log_format": log_format,
            "log_level": log_level,
        },
    )
    _run_server(settings)


def token(
    context: typer.Context,
    subject: Annotated[str, typer.Option("--subject", help="Who it is for.")] = "user",
    lifetime: Annotated[str, typer.Option("--lifetime", help="For example 12h.")] = "24h",
    permission: Annotated[
        list[str] | None, typer.Option("--permission", "-p", help="Scope; default: full access.")
    ] = None,
) -> None:
    """Print a token signed with the local server's secret."""
    client: Client = context.obj
    secret = read_secret(client.settings.data_dir)
    print(
        mint_token(
            secret, subject=subject, lifetime=parse_duration(lifetime), permissions=permission
        )
    )


def _run_server(settings: Settings) -> None:
    from stillframe.api.server import ServerOptions, run
    from stillframe.engine.settings import EngineSettings

    run(
        EngineSettings(
            data_dir=settings.data_dir,
            kernel_dir=settings.kernel_dir,
            agent_binary=settings.agent_binary,
            tracker_library=settings.tracker_library,
            default_hypervisor=settings.default_hypervisor,
            qemu_binary=settings.qemu_binary,
            firecracker_binary=settings.firecracker_binary,
            cloud_hypervisor_binary=settings.cloud_hypervisor_binary,
            programs_dir=settings.programs_dir,
            accelerator=settings.accelerator,
            max_vcpus=settings.max_vcpus,
            max_memory_bytes=settings.max_memory_bytes,
            max_overlay_bytes=settings.max_overlay_bytes,
            default_memory_bytes=settings.default_memory_bytes,
            default_vcpus=settings.default_vcpus,
            default_overlay_bytes=settings.default_overlay_bytes,
            default_compression=settings.default_compression,
            max_concurrent_starts=settings.max_concurrent_starts,
            warm_memory_bytes=settings.warm_memory_bytes,
            capture_buffer_bytes=settings.capture_buffer_bytes,
            max_snapshots=settings.max_snapshots,
            max_snapshot_bytes=settings.max_snapshot_bytes,
            min_free_bytes=settings.min_free_bytes,
            max_archive_bytes=settings.max_archive_bytes,
            max_log_bytes=settings.max_log_bytes,
        ),
        ServerOptions(
            listen=settings.listen,
            metrics_listen=settings.metrics_listen,
            log_format=settings.log_format,
            log_level=settings.log_level,
        ),
    )
