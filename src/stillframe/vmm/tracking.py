"""Having the kernel track writes to guest memory: a library preloaded into the VMM.

See ``tracker/tracker.c``. Without it everything works, with longer pauses.
"""

from __future__ import annotations

from pathlib import Path


def tracking_environment(library: Path | None, memory_image: Path) -> dict[str, str]:
    """Environment variables for a VMM that will map ``memory_image``; empty without a library.

    Raises OSError when the image is not there.
    """
    if library is None or not library.exists():
        return {}
    status = memory_image.stat()
    return {
        "LD_PRELOAD": str(library),
        "STILLFRAME_MEMORY": f"{status.st_dev}:{status.st_ino}",
    }
