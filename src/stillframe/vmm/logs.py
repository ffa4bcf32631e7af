"""What VMMs and guests have written last: why a start failed, why a guest ended."""

from __future__ import annotations

import os
from pathlib import Path

from stillframe.host.files import open_regular
from stillframe.model.errors import VmmFailure

EXIT_MARK = b"STILLFRAME-EXIT nonce="  # the agent's last word on the console, before it halts
_TAIL = 65536  # bytes of a log that are read
_WORDS = 2048  # bytes of it that an error may quote from
_LINES = 3


def explained(error: VmmFailure, *logs: Path, once_more: bool = False) -> VmmFailure:
    """The same failure with the VMM's last words, from the first of ``logs`` that has any.

    With ``once_more`` it is ``silent`` in its facts when there are none, and the VMM has not
    refused anything either: the engine then starts it once more.
    """
    words, silent = "", once_more and not error.facts.get("refused")
    for log in logs:
        lines = log_end(log)[-_WORDS:].decode(errors="replace").strip().splitlines()[-_LINES:]
        if lines:
            words, silent = f" ({' / '.join(lines)})", False
            break
    told = VmmFailure(f"{error.message}{words}", code=error.code, hint=error.hint)
    told.facts.update(error.facts)
    if silent:
        told.facts["silent"] = True
    return told


def log_size(log: Path) -> int:
    """Bytes in a log; none if it is not there."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def log_end(log: Path, start: int = 0) -> bytes:
    """The last of what a log holds from ``start`` on; nothing if there is none.

    A VMM could put anything in the place of its log: only a regular file is read.
    """
    try:
        with open(open_regular(log), "rb") as file:  # noqa: PTH123 - a descriptor
            size = os.fstat(file.fileno()).st_size
            start = start if start <= size else 0  # it has been emptied meanwhile
            file.seek(max(start, size - _TAIL))
            return file.read()
    except OSError:
        return b""
