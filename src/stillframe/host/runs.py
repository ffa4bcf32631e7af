"""Sets of pages as sorted runs, in flat arrays: a guest may have a hundred thousand of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from operator import sub


class Runs:
    """Disjoint, ascending, page-aligned stretches of a memory image, in bytes. Immutable.

    ``starts`` and ``ends`` are parallel arrays of unsigned 64-bit offsets.
    """

    __slots__ = ("ends", "starts")

    def __init__(self, starts: array[int] | None = None, ends: array[int] | None = None) -> None:
        self.starts = array("Q") if starts is None else starts
        self.ends = array("Q") if ends is None else ends

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Runs:
        """Runs from ascending ``(start, end)`` pairs; those that touch are joined."""
        runs = cls()
        for start, end in pairs:
            if runs.ends and runs.ends[-1] == start:
                runs.ends[-1] = end
            else:
                runs.starts.append(start)
                runs.ends.append(end)
        return runs

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The runs as ``(start, end)``."""
        return zip(self.starts, self.ends, strict=True)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same pages."""
        return isinstance(other, Runs) and (self.starts, self.ends) == (other.starts, other.ends)

    __hash__ = None  # type: ignore[assignment]  # the arrays can change while a set is built

    def __repr__(self) -> str:
        return f"Runs({list(self)!r})"

    @property
    def lengths(self) -> array[int]:
        """Bytes of each run."""
        return array("Q", map(sub, self.ends, self.starts))

    @property
    def total(self) -> int:
        """Bytes of all runs."""
        return sum(self.ends) - sum(self.starts)

    def pieces(self, limit: int) -> Iterator[Runs]:
        """The same pages in parts of at most ``limit`` bytes, a multiple of the page size."""
        part, room = Runs(), limit
        for start, end in self:
            position = start
            while position < end:
                step = min(end - position, room)
                part.starts.append(position)
                part.ends.append(position + step)
                position, room = position + step, room - step
                if not room:
                    yield part
                    part, room = Runs(), limit
        if part:
            yield part
