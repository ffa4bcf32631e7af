"""The time that deletions go by: a wall clock that leaps forward is not believed at once.

What a clock set wrong would delete is gone when it is set right. So expiry and ages go by the
*believed* time: the wall clock, as long as it keeps step with the monotonic clock. When it leaps
ahead, the believed time goes on at the monotonic clock's pace, and takes the leap over when the
wall clock has held to it for ``PATIENCE``. A clock that goes back is believed at once: nothing
is ever deleted too early by it.

A start is no exception: what it finds is held against the time that the last server believed, or
a newer one in the records. Up to ``PATIENCE`` beyond that it is taken for the time the server was
down, and further for a leap. What a server has waited of its patience counts for the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from stillframe.model.values import ClockReading

PATIENCE = timedelta(days=1)
TOLERANCE = timedelta(minutes=2)  # what a clock may drift or be slewed between two readings


def steady_seconds() -> float:
    """Seconds since boot, sleep of the host included: never set, never going back."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class BelievedClock:
    """Reads the wall clock ``now`` against the monotonic clock ``steady`` (seconds)."""

    def __init__(
        self, now: Callable[[], datetime], steady: Callable[[], float] = steady_seconds
    ) -> None:
        self.now, self.steady = now, steady
        self.times_gone_back = 0  # as far as readings have seen
        # Offsets of the wall clock from the monotonic one: the believed, and the one seen last.
        self._believed: timedelta | None = None
        self._seen = timedelta(0)
        self._since = 0.0  # when the wall clock was first seen to hold to the last offset

    def begin(self, newest: datetime | None, before: ClockReading | None = None) -> None:
        """Start from the newest time in the records and what an earlier server read last, if any.

        A record may have its time from a clock that had leapt: one of more than ``PATIENCE`` after
        the earlier server's reading tells nothing.
        """
        wall, steady = self.now(), self.steady()
        offset = wall - datetime.fromtimestamp(steady, UTC)
        self._believed, self._seen, self._since = offset, offset, steady
        known = newest if before is None else before.believed
        if known is not None and newest is not None and newest - known <= PATIENCE:
            known = max(newest, known)
        if known is None or wall - known <= PATIENCE:
            return
        self._believed = known - datetime.fromtimestamp(steady, UTC)
        if before is not None and timedelta(0) <= wall - before.wall <= PATIENCE:
            self._since -= before.held.total_seconds()  # it goes on as it was seen then

    def reading(self) -> ClockReading:
        """What the next server should know, as of now."""
        believed = self.read()
        steady = self.steady()
        held = timedelta(seconds=steady - self._since)
        return ClockReading(believed, datetime.fromtimestamp(steady, UTC) + self._seen, held)

    def read(self) -> datetime:
        """The believed time (UTC)."""
        wall, steady = self.now(), self.steady()
        offset = wall - datetime.fromtimestamp(steady, UTC)
        if self._believed is None:
            self._believed, self._seen = offset, offset
            return wall
        self.times_gone_back += offset < self._seen - TOLERANCE
        if abs(offset - self._seen) > TOLERANCE:
            self._since = steady
        self._seen = offset
        held = timedelta(seconds=steady - self._since)
        if offset <= self._believed + TOLERANCE or held >= PATIENCE:
            self._believed = offset
        return datetime.fromtimestamp(steady, UTC) + self._believed
