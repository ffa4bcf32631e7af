"""``stillframe setup``: install a hypervisor where the server looks for it.

Works on this machine itself, also when no server runs (an exception named in the house test).
"""

from __future__ import annotations

import platform
from typing import Annotated

import typer

from stillframe.cli import output
from stillframe.cli.client import Client
from stillframe.model.units import format_size

app = typer.Typer(help="Install a hypervisor for the server on this machine.", no_args_is_help=True)
From = Annotated[
    str | None,
    typer.Option("--from", help="Another URL, or a file that was downloaded already."),
]


@app.command("firecracker")
def firecracker(context: typer.Context, source: From = None) -> None:
    """Install the pinned official release of Firecracker."""
    _install(context.obj, "firecracker", source)


@app.command("cloud-hypervisor")
def cloud_hypervisor(context: typer.Context, source: From = None) -> None:
    """Install the pinned official release of Cloud Hypervisor."""
    _install(context.obj, "cloud-hypervisor", source)


def _install(client: Client, program: str, source: str | None) -> None:
    from stillframe.host.releases import install, is_installed, release_for

    release = release_for(program, platform.machine())
    directory = client.settings.programs_dir
    if is_installed(release, directory):
        print(f"{program} {release.version} is installed: {directory / program}")
        return
    print(f"getting {program} {release.version} from {source or release.url}")
    with output.progress(program) as advance:
        path = install(release, directory, source, advance)
    size = format_size(path.stat().st_size)
    print(f"installed {path} ({size}, checksum as published); restart a running server to use it")
