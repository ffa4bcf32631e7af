"""The ``stillframe`` command: all groups put together, and errors made one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import stillframe
from stillframe.cli.client import Client
from stillframe.cli.commands import (
    copy,
    exec,
    host,
    images,
    instances,
    moving,
    schedules,
    serve,
    setup,
    snapshots,
)
from stillframe.model.errors import StillframeError

app = typer.Typer(
    help="Snapshot and fork virtual machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# Everything after the positional arguments belongs to the guest: `exec vm ls -l` needs no `--`.
_PASS_ON = {"allow_interspersed_args": False}

app.command(context_settings=_PASS_ON)(instances.run)
app.command()(instances.ps)
app.command()(instances.inspect)
app.command()(instances.stats)
app.command()(instances.edit)
app.command("exec", context_settings=_PASS_ON)(exec.exec_)
app.command()(instances.logs)
app.command()(instances.stop)
app.command()(instances.start)
app.command()(instances.rm)
app.command()(instances.standby)
app.command()(instances.restore)
app.command()(instances.fork)
app.command()(instances.wait)
app.command()(copy.cp)
snapshots.app.command()(moving.verify)
snapshots.app.command()(moving.compatibility)
snapshots.app.command()(moving.export)
snapshots.app.command("import")(moving.import_)
app.add_typer(snapshots.app, name="snapshot")
app.add_typer(schedules.app, name="schedule")
app.add_typer(images.app, name="image")
app.command()(serve.token)
app.command()(serve.serve)
app.command()(host.doctor)
app.add_typer(setup.app, name="setup")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"stillframe {stillframe.__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    url: Annotated[str | None, typer.Option("--url", help="Server; else STILLFRAME_URL.")] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="Else STILLFRAME_TOKEN or HYPEMAN_API_KEY.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Of the local server, to find it.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A TOML file.")] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Snapshot and fork virtual machines."""
    client = Client(url=url, token=token, data_dir=data_dir, config=config)
    context.obj = client
    context.call_on_close(client.close)


def main() -> None:
    """Run the command line: exit 0, 1 with ``error: … (hint: …)``, 2 on wrong usage."""
    try:
        app()
    except StillframeError as error:
        hint = f" (hint: {error.hint})" if error.hint else ""
        print(f"error: {error.message}{hint}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output is gone; say nothing, also not at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
