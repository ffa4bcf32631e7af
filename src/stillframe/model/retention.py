"""Which snapshots of a schedule stay, which go, and why: a pure function of its arguments.

Two kinds of rule stand side by side. The contract's limits (``max_count``, ``max_age``) say how
much is kept at most; the policy's keep rules (``keep_last``, ``hourly`` … ``monthly``) name
snapshots worth keeping. A snapshot stays when anything speaks for it: it is pinned, younger than
``minimum_age``, chosen by a keep rule, or within the limits if there are any. Else it goes.

A pinned snapshot is out of the rules' hands: it stays, and takes no place in any count. A damaged
one takes none either, else good ones would go in its favour; as it may be found whole again, no
count or keep rule lets it go, but ``max_age`` does.

"Newest" means made last, as the order of the arguments tells; a clock that went back cannot make
the snapshot of this minute look like the oldest. Ages and periods go by ``created_at`` in UTC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from stillframe.model.errors import InvalidRequest
from stillframe.model.units import format_duration

_MOST = 2**31 - 1
_COUNTS = ("max_count", "keep_last", "hourly", "daily", "weekly", "monthly")


@dataclass(frozen=True, slots=True)
class Retention:
    """Rules for the snapshots of a schedule; zero and None mean that a rule is off.

    ``max_count`` and ``max_age`` are the contract's limits. ``keep_last`` keeps the newest N;
    ``hourly``, ``daily``, ``weekly`` (ISO weeks) and ``monthly`` keep the last snapshot of each of
    the newest N such periods that have one; nothing younger than ``minimum_age`` goes.
    """

    max_count: int = 0
    max_age: timedelta | None = None
    keep_last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    minimum_age: timedelta | None = None

    @property
    def limited(self) -> bool:
        """Whether one of the contract's limits is on."""
        return self.max_count > 0 or bool(self.max_age)

    @property
    def effective(self) -> bool:
        """Whether any rule says what may go: without one nothing would ever be right."""
        return self.limited or any((self.keep_last, *(count for _, count, _ in self.periods())))

    def periods(self) -> Iterator[tuple[str, int, Callable[[datetime], tuple[int, ...]]]]:
        """Yield name, count and the period's key of a time, for each rule by period."""
        yield "hourly", self.hourly, lambda t: (t.year, t.month, t.day, t.hour)
        yield "daily", self.daily, lambda t: (t.year, t.month, t.day)
        yield "weekly", self.weekly, lambda t: tuple(t.isocalendar()[:2])
        yield "monthly", self.monthly, lambda t: (t.year, t.month)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot as far as retention is concerned; ``damaged`` when it was found so."""

    id: str
    created_at: datetime
    pinned: bool = False
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a snapshot is kept, and everything that speaks for it (or why it goes)."""

    id: str
    keep: bool
    reasons: tuple[str, ...]


def check_retention(retention: Retention) -> Retention:
    """Return the rules if they make sense. Raises InvalidRequest naming what does not."""
    for name in _COUNTS:
        if not 0 <= getattr(retention, name) <= _MOST:
            raise InvalidRequest(f"{name} must be 0 to {_MOST}", field=name)
    for name, age in (("max_age", retention.max_age), ("minimum_age", retention.minimum_age)):
        if age is not None and age < timedelta(0):
            raise InvalidRequest(f"{name} must not be negative", field=name)
    if not retention.effective:
        raise InvalidRequest(
            "the retention has no rule that lets snapshots go",
            hint="set max_count or max_age, or a policy of keep_last, hourly, daily, weekly, "
            "monthly",
        )
    return retention


def judge(
    snapshots: Sequence[Candidate], retention: Retention, now: datetime
) -> tuple[Verdict, ...]:
    """The verdict on each of ``snapshots``, which come in the order they were made.

    Verdicts come in the same order. Equal arguments give equal verdicts.
    """
    counted = [s for s in reversed(snapshots) if not (s.pinned or s.damaged)]  # newest first
    chosen = _chosen(counted, retention)
    number = {snapshot.id: place for place, snapshot in enumerate(counted, start=1)}

    def verdict(snapshot: Candidate) -> Verdict:
        if snapshot.pinned:
            return Verdict(snapshot.id, True, ("pinned",))
        if snapshot.damaged:
            return _judge_damaged(snapshot, retention, now)
        return _judge(snapshot, number[snapshot.id], chosen.get(snapshot.id, []), retention, now)

    return tuple(verdict(snapshot) for snapshot in snapshots)


def next_change(
    snapshots: Sequence[Candidate], retention: Retention, now: datetime
) -> datetime | None:
    """When the passing of time alone may next change a verdict; None if it never will."""
    ages = [age for age in (retention.max_age, retention.minimum_age) if age]
    # No age lets a damaged one go where there is no max_age.
    subject = (s for s in snapshots if not (s.pinned or (s.damaged and not retention.max_age)))
    moments = (s.created_at + age for s in subject for age in ages)
    return min((moment for moment in moments if moment > now), default=None)


def _chosen(counted: Sequence[Candidate], retention: Retention) -> dict[str, list[str]]:
    """What the keep rules say, by snapshot id."""
    chosen: dict[str, list[str]] = {}
    for place, snapshot in enumerate(counted[: retention.keep_last], start=1):
        chosen.setdefault(snapshot.id, []).append(
            f"number {place} of keep_last {retention.keep_last}"
        )
    for name, count, key in retention.periods():
        seen: set[tuple[int, ...]] = set()
        for snapshot in counted:
            period = key(snapshot.created_at.astimezone(UTC))
            if len(seen) >= count:
                break
            if period not in seen:
                seen.add(period)
                reason = f"{name} {len(seen)} of {count}: the last of {_words(name, period)}"
                chosen.setdefault(snapshot.id, []).append(reason)
    return chosen


def _words(name: str, period: tuple[int, ...]) -> str:
    if name == "weekly":
        return f"{period[0]:04d}-W{period[1]:02d}"
    date = "-".join(f"{part:0{4 if place == 0 else 2}d}" for place, part in enumerate(period[:3]))
    return f"{date} {period[3]:02d}:00" if len(period) > 3 else date


def _judge_damaged(snapshot: Candidate, retention: Retention, now: datetime) -> Verdict:
    too_young, too_old, _ = _by_age(snapshot, retention, now)
    if too_old and not too_young:
        return Verdict(snapshot.id, False, (f"damaged, and {too_old[0]}",))
    until = f", and stays until max_age {_text(retention.max_age)}" if retention.max_age else ""
    return Verdict(snapshot.id, True, (f"damaged: it takes no place{until}", *too_young))


def _by_age(
    snapshot: Candidate, retention: Retention, now: datetime
) -> tuple[list[str], list[str], str]:
    """What its age says for it and against it, and the age in words."""
    age = max(timedelta(0), now - snapshot.created_at)
    spoken = format_duration(timedelta(seconds=age // timedelta(seconds=1)))
    too_young, too_old = [], []
    if retention.minimum_age and age < retention.minimum_age:
        too_young = [f"{spoken} old, younger than minimum_age {_text(retention.minimum_age)}"]
    if retention.max_age and age >= retention.max_age:
        too_old = [f"{spoken} old, older than max_age {_text(retention.max_age)}"]
    return too_young, too_old, spoken


def _judge(
    snapshot: Candidate, number: int, reasons: list[str], retention: Retention, now: datetime
) -> Verdict:
    too_young, too_old, spoken = _by_age(snapshot, retention, now)
    reasons = [*reasons, *too_young]
    beyond = []
    if 0 < retention.max_count < number:
        beyond.append(f"number {number}, beyond max_count {retention.max_count}")
    beyond += too_old
    if retention.limited and not beyond:
        within = [f"max_count {retention.max_count} (number {number})"] * bool(retention.max_count)
        within += (
            [f"max_age {_text(retention.max_age)} ({spoken} old)"] if retention.max_age else []
        )
        reasons.append("within " + " and ".join(within))
    if reasons:
        return Verdict(snapshot.id, True, tuple(reasons))
    return Verdict(snapshot.id, False, tuple(beyond) or ("no rule keeps it",))


def _text(age: timedelta) -> str:
    return format_duration(age)
