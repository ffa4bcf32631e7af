"""The guests' root file system: busybox and the programs of bench/guest, as an image of the server.

The server imports it like any other tar of a root file system.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

from bench.client import Client
from stillframe.images.base import find_busybox, write_base_tar

NAME = "bench/guest"
PROGRAMS = ("ticks", "dirty")
_SOURCE = Path(__file__).resolve().parent / "guest"


def build_programs(directory: Path) -> dict[str, bytes]:
    """Compile the guest's programs; their binaries by name. Raises RuntimeError."""
    done = subprocess.run(
        ["make", "--silent", "--no-print-directory", "-C", str(_SOURCE), f"OUT={directory}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the guest's programs cannot be built: {done.stderr.strip()}")
    return {name: (directory / name).read_bytes() for name in PROGRAMS}


def root_tar(programs: dict[str, bytes]) -> bytes:
    """The built-in image's tree with ``programs`` in /usr/bin."""
    output = io.BytesIO()
    write_base_tar(output, find_busybox())
    # It ends with two empty blocks; what follows goes in their place.
    output.seek(-2 * tarfile.BLOCKSIZE, io.SEEK_END)
    with tarfile.open(fileobj=output, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, program in programs.items():
            info = tarfile.TarInfo(f"usr/bin/{name}")
            info.mode, info.size = 0o755, len(program)
            archive.addfile(info, io.BytesIO(program))
    return output.getvalue()


def import_image(client: Client, directory: Path) -> None:
    """Make the image on the server."""
    tar = root_tar(build_programs(directory / "guest"))
    client.request("POST", f"/images/import?name={NAME}", content=tar)
