"""Reading the bytes of a payload file, however they are stored. Readers serve several threads."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from stillframe.host.files import data_extents, open_regular, read_exactly


class Reader(ABC):
    """The content of one payload file: ``name`` on disk, ``size`` of the content in bytes."""

    name: str
    size: int

    @abstractmethod
    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges ``(start, end)`` that may hold something else than zeros, ascending.

        Raises OSError.
        """

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset``. Raises OSError, DamagedData."""

    def check_holes(self, start: int, end: int) -> None:  # noqa: B027 - a hole has no bytes
        """Check what is stored for the parts that ``data`` leaves out. Raises as ``read``."""

    def close(self) -> None:  # noqa: B027 - what lies in memory needs no closing
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class FileReader(Reader):
    """A sparse file as it lies on disk. Never opens a link. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._fd = open_regular(path)
        self.name, self.size = path.name, os.fstat(self._fd).st_size

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges that are no holes."""
        return data_extents(self._fd, min(end, self.size), start)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. Raises OSError, also when the file has become shorter."""
        return read_exactly(self._fd, length, offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class BytesReader(Reader):
    """Content that lies in memory."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name, self.size, self._content = name, len(content), content

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """All of it, as one range."""
        if start < min(end, self.size):
            yield start, min(end, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes."""
        return self._content[offset : offset + length]
