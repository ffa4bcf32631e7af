"""A clock that a scenario sets: the wall clock may leap, the monotonic one only goes on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from stillframe.engine.engine import Engine

START = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


class SetClock:
    """Stands at ``START`` until told otherwise."""

    def __init__(self) -> None:
        self.wall, self.seconds = START, 1000.0

    def now(self) -> datetime:
        """The wall clock."""
        return self.wall

    def steady(self) -> float:
        """The monotonic clock, in seconds."""
        return self.seconds

    def go_on(self, time: timedelta) -> None:
        """Let time pass."""
        self.leap(time)
        self.seconds += time.total_seconds()

    def leap(self, time: timedelta) -> None:
        """Set the wall clock forward or back, while no time passes."""
        self.wall += time

    def rule(self, engine: Engine) -> None:
        """Make this the clock of an engine that is not open yet."""
        engine.context.now = self.now
        engine.scheduler.clock.steady = self.steady
