"""``stillframe serve`` and ``stillframe token``: the commands of the server's own machine.

``serve`` is the one place where this room reaches past ``model``: it starts the server in its own
process instead of speaking HTTP to it (an exception named in the house test).
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from stillframe.cli.client import Client
from stillframe.cli.commands.tokens import mint_token, read_secret
from stillframe.cli.settings import Settings, load_settings
from stillframe.model.errors import InvalidRequest
from stillframe.model.scopes import SCOPES
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
        list[str] | None,
        typer.Option(
            "--permission", "-p", help="A scope such as snapshot:read; default: full access."
        ),
    ] = None,
) -> None:
    """Print a token signed with the local server's secret."""
    client: Client = context.obj
    if unknown := sorted(set(permission or ()) - SCOPES):
        raise InvalidRequest(
            f"there is no scope {', '.join(unknown)}", hint=f"there are {', '.join(sorted(SCOPES))}"
        )
    secret = read_secret(client.settings.data_dir)
    print(
        mint_token(
            secret, subject=subject, lifetime=parse_duration(lifetime), permissions=permission
        )
    )


def _run_server(settings: Settings) -> None:
    from stillframe.api.server import ServerOptions, run
    from stillframe.engine.settings import EngineSettings

    # The engine's settings are those of ours that bear the same names.
    names = [field.name for field in fields(EngineSettings) if hasattr(settings, field.name)]
    run(
        EngineSettings(**{name: getattr(settings, name) for name in names}),
        ServerOptions(
            listen=settings.listen,
            metrics_listen=settings.metrics_listen,
            log_format=settings.log_format,
            log_level=settings.log_level,
        ),
    )
