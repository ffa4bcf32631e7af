"""Clones on APFS: clonefile(2)."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_NO_FOLLOW = 0x0001  # sys/clonefile.h: CLONE_NOFOLLOW
_CANNOT_CLONE = {errno.ENOTSUP, errno.EXDEV}


def clone_file(source: Path, destination: Path) -> bool:
    """Make the new file ``destination`` share all blocks of ``source``.

    False where the file system cannot; then there is no destination. Raises OSError, also for a
    destination that is there (EEXIST).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.clonefile(os.fsencode(source), os.fsencode(destination), _NO_FOLLOW) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_CLONE:
        return False
    raise OSError(code, os.strerror(code), str(destination))
