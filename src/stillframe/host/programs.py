"""Finding programs: on PATH, by path, or where ``stillframe setup`` installs them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def find_program(name: str, installed: Path | None = None) -> str | None:
    """The program's absolute path; None when it is nowhere.

    A name with a slash is a path and nothing else. ``installed`` is looked into after PATH.
    """
    found = shutil.which(name)
    if found is None and installed is not None and os.sep not in name:
        found = shutil.which(name, path=str(installed))
    return None if found is None else str(Path(found).absolute())
