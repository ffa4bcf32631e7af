"""A clock that a scenario sets: the wall clock may leap, the monotonic one only goes on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from stillframe.engine.engine import Engine
from stillframe.model.values import Instance, Snapshot
from support.engine import running

START = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


class SetClock:
    """Stands at ``START`` until told otherwise; goes on by ``step`` at each look."""

    def __init__(self) -> None:
        self.wall, self.seconds = START, 1000.0
        self.step = timedelta(0)

    def now(self) -> datetime:
        """The wall clock."""
        self.go_on(self.step)
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


async def stopped(engine: Engine, name: str = "source") -> Instance:
    """A Stopped instance: its snapshots are the cheapest."""
    return await engine.stop((await running(engine, name)).id)


async def look(engine: Engine) -> list[Snapshot]:
    """Let the scheduler look at what is due and finish it; the snapshots there are then."""
    engine.scheduler.tick()
    await engine.scheduler.settled()
    return engine.list_snapshots()
