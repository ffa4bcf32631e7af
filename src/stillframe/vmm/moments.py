"""Since when a VMM has noted what is written to guest memory, and where that memory lies now.

A VMM that writes guest memory itself (``Machine.writes_memory``) notes which pages were written
since it last did, and writes those. That difference belongs on the image of that very moment: laid
over any other it makes an image that looks whole and is not. So the moment is an object of its own,
compared by identity, which knows the file that is its image, and no longer knows one when that
file is gone or another has its name.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from stillframe.host.runs import Runs

Identity = tuple[int, int, int]  # device, inode, time of the last change (ns): inodes are reused


class Moment:
    """A moment of a VM, from which on its VMM notes what is written to guest memory."""

    def __init__(self, image: Path | None = None) -> None:
        """``image`` is guest memory as it is at this moment, if that is in a file already."""
        self._image = image
        self._identity = _identity(image)

    def is_kept_in(self, image: Path) -> None:
        """``image``, complete and never to be written again, is what guest memory was then.

        It is so once: a moment that has an image keeps it.
        """
        if self._identity is None:
            self._image, self._identity = image, _identity(image)

    def has_moved_to(self, image: Path) -> None:
        """The image has this name now, or this one too."""
        self._image = image

    @property
    def image(self) -> Path | None:
        """Where the memory of this moment lies; None if nowhere (any more)."""
        there = self._identity is not None and _identity(self._image) == self._identity
        return self._image if there else None


@dataclass(slots=True)
class MemoryDifference:
    """Pages that a VMM has written to a file beside: ``runs`` of ``fd``, each at its own place.

    The file may have no name any more. ``close`` gives its space back; it may be called twice.
    """

    fd: int
    runs: Runs
    _closed: bool = field(default=False, repr=False)

    def close(self) -> None:
        """Close the file."""
        if not self._closed:
            self._closed = True
            os.close(self.fd)


def _identity(image: Path | None) -> Identity | None:
    if image is None:
        return None
    with contextlib.suppress(OSError):
        status = image.stat(follow_symlinks=False)
        return status.st_dev, status.st_ino, status.st_mtime_ns
    return None
