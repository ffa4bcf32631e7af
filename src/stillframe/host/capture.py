"""Copying a guest's memory into an image with the shortest possible pause.

``ahead`` and, last, ``again`` while the guest runs, ``still`` while it stands still, ``after`` when
it runs again. Where writes are tracked, ``ahead`` copies everything and then, round after round,
what was written meanwhile, so that ``still`` has only the last round's writes to read. Elsewhere
``still`` reads all private pages at memory speed, into a buffer made ready ahead, and ``after``
writes them.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from dataclasses import dataclass

from stillframe.host.image import WriteReport, copy_pages, write_pages
from stillframe.host.memory import PAGE, GuestMemory, make_buffer
from stillframe.host.runs import Runs

_RESERVE = 8 << 20  # bytes of buffer for writes that nobody foresaw
_SMALL = 4 << 20  # bytes that are read in about a millisecond: no further round is worth it
_FLUSHED = 16 << 20  # bytes after which a round is flushed to the device before the next
_ROUNDS = 6
_LEAST = 16 << 20  # bytes of buffer that a capture has whatever others use
# A round that has to copy more than this share of the last one does not gain on the guest.
_GAIN = 0.7


@dataclass(frozen=True, slots=True)
class Round:
    """One round of copying ahead: bytes copied, and the seconds that took."""

    length: int
    seconds: float


class BufferBudget:
    """Host memory (bytes) that all captures together may use as buffers. Used from any thread.

    Nobody ever waits for it: with less of it a capture copies more to its image instead.
    """

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._least = max(PAGE, min(_LEAST, limit))
        self._lock = threading.Lock()

    def take(self, wanted: int) -> int:
        """As many of ``wanted`` bytes as are free, in whole pages; a few even if none is."""
        with self._lock:
            taken = min(wanted, max(self._free, self._least)) // PAGE * PAGE
            self._free -= taken
            return taken

    def give_back(self, size: int) -> None:
        """Of what was taken, ``size`` bytes are used no more."""
        with self._lock:
            self._free += size


class MemoryCapture:
    """One capture of ``memory`` into the image open as ``fd``. Blocking; used from one thread.

    The image holds the guest's memory as it was when its writes were last asked for
    (``incremental``), or before the VMM first wrote to it. ``budget`` bounds the host memory used:
    what does not fit is copied to the image during the pause.
    All methods raise OSError, HostFailure, MissingComponent.
    """

    def __init__(
        self, memory: GuestMemory, fd: int, *, incremental: bool, budget: BufferBudget
    ) -> None:
        self.rounds: list[Round] = []
        self.changed: list[Runs] = []  # what the image got in each round, and in the end
        self._memory, self._fd = memory, fd
        self._incremental, self._budget = incremental, budget
        self._compare = incremental and not memory.tracked
        self._report = WriteReport()
        self._runs = Runs()
        self._buffer: mmap.mmap | None = None
        self._room = 0  # bytes of the budget, for the buffer

    def ahead(self) -> None:
        """While the guest runs: copy what can be copied, and make the buffer ready."""
        if self._memory.tracked:
            self._make_room(self._copy_rounds())
        else:
            self._expect_all()
        self._buffer = make_buffer(self._room)

    def _make_room(self, expected: int) -> None:
        """Take of the budget what that many bytes, or somewhat more, need."""
        wanted = expected + expected // 4 + _RESERVE
        self._room += self._budget.take(wanted)

    def _copy_rounds(self) -> int:
        """Copy until a round is small or does not gain; the bytes of the last one."""
        runs = self._memory.written_pages()  # from here on every write is noticed
        private = self._memory.private_pages()
        if not self._incremental:
            runs = private
        while True:
            self._copy(runs)
            last = runs.total
            gains = len(self.rounds) < 2 or last <= _GAIN * self.rounds[-2].length
            if last <= _SMALL or not gains or len(self.rounds) == _ROUNDS:
                return last
            if last > _FLUSHED:
                # Or the guest's own flush, as it is stopped, would queue behind all these bytes.
                os.fdatasync(self._fd)
            runs = self._memory.written_pages()

    def again(self) -> None:
        """Just before the pause: what was written since ``ahead``, unless it is always much."""
        if self._memory.tracked and self.rounds[-1].length <= _SMALL:
            self._copy(self._memory.written_pages())

    def _copy(self, runs: Runs) -> None:
        began = time.perf_counter()
        self._report += copy_pages(self._memory, runs, self._fd, compare=self._compare)
        self.changed.append(runs)
        self.rounds.append(Round(runs.total, time.perf_counter() - began))

    def _expect_all(self) -> None:
        """Make room for what the pause will read; copies ahead what would not fit the buffer."""
        runs = self._memory.private_pages()
        self._make_room(runs.total)
        if runs.total + _RESERVE > self._room:
            self._copy(runs)
            self._compare = True  # most of it will be found as it was copied

    def still(self) -> int:
        """While the guest stands still: take what is left; its bytes. No disk is touched.

        Unless there is more than the buffer may hold: the rest is copied to the image.
        """
        tracked = self._memory.tracked
        runs = self._memory.written_pages() if tracked else self._memory.private_pages()
        self.changed.append(runs)
        total = runs.total
        if total > self._room:
            self._room += self._budget.take(total - self._room)
        if total > self._room:
            runs, *rest = runs.pieces(self._room)
            for piece in rest:
                self._report += copy_pages(self._memory, piece, self._fd, compare=self._compare)
        if self._buffer is None or len(self._buffer) < runs.total:
            self._close_buffer()
            self._buffer = make_buffer(runs.total)
        self._memory.read(runs, self._buffer)
        self._runs = runs
        return total

    def after(self) -> WriteReport:
        """When the guest runs again: write what was taken; what the whole capture wrote."""
        if self._buffer is not None:
            self._report += write_pages(self._fd, self._runs, self._buffer, compare=self._compare)
            self._runs = Runs()
        self.close()
        return self._report

    def close(self) -> None:
        """Give the buffer back to the host, and its room to other captures."""
        self._close_buffer()
        self._budget.give_back(self._room)
        self._room = 0

    def _close_buffer(self) -> None:
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
