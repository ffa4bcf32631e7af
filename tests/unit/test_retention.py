"""What retention keeps and lets go, and that it says why: by examples, and for any history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.model.errors import InvalidRequest
from stillframe.model.retention import (
    Candidate,
    Retention,
    Verdict,
    check_retention,
    judge,
    next_change,
)

NOW = datetime(2030, 3, 15, 12, 30, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def every(
    step: timedelta, count: int, *, pinned: tuple[int, ...] = (), damaged: tuple[int, ...] = ()
) -> list[Candidate]:
    """``count`` snapshots a ``step`` apart, the last one at NOW; s0 is the oldest."""
    return [
        Candidate(f"s{n}", NOW - step * (count - 1 - n), n in pinned, n in damaged)
        for n in range(count)
    ]


def kept(verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.id for verdict in verdicts if verdict.keep]


def reasons(verdicts: Sequence[Verdict], identifier: str) -> str:
    return "; ".join(next(v for v in verdicts if v.id == identifier).reasons)


def test_the_contract_s_limits_delete_what_is_beyond_either() -> None:
    verdicts = judge(every(HOUR, 6), Retention(max_count=4, max_age=2 * HOUR), NOW)
    assert kept(verdicts) == ["s4", "s5"]
    assert reasons(verdicts, "s5") == "within max_count 4 (number 1) and max_age 2h0m0s (0s old)"
    assert reasons(verdicts, "s3") == "2h0m0s old, older than max_age 2h0m0s"
    assert reasons(verdicts, "s0") == (
        "number 6, beyond max_count 4; 5h0m0s old, older than max_age 2h0m0s"
    )


def test_a_policy_keeps_the_last_of_each_period() -> None:
    snapshots = every(HOUR * 6, 40)  # ten days, four a day
    policy = Retention(keep_last=2, daily=3, weekly=2, monthly=5)
    verdicts = judge(snapshots, policy, NOW)
    assert [reasons(verdicts, i) for i in reversed(kept(verdicts))] == [
        "number 1 of keep_last 2; daily 1 of 3: the last of 2030-03-15; "
        "weekly 1 of 2: the last of 2030-W11; monthly 1 of 5: the last of 2030-03",
        "number 2 of keep_last 2",
        "daily 2 of 3: the last of 2030-03-14",
        "daily 3 of 3: the last of 2030-03-13",
        "weekly 2 of 2: the last of 2030-W10",
    ]
    assert reasons(verdicts, "s0") == "no rule keeps it"
    hourly = judge(snapshots, Retention(hourly=1), NOW)
    assert reasons(hourly, "s39") == "hourly 1 of 1: the last of 2030-03-15 12:00"


def test_what_a_policy_keeps_stays_beyond_the_limits() -> None:
    verdicts = judge(every(DAY, 5), Retention(max_count=1, daily=3), NOW)
    assert kept(verdicts) == ["s2", "s3", "s4"]
    assert reasons(verdicts, "s1") == "number 4, beyond max_count 1"


def test_a_pinned_one_stays_and_takes_no_place() -> None:
    verdicts = judge(every(HOUR, 5, pinned=(0, 4)), Retention(max_count=2), NOW)
    assert kept(verdicts) == ["s0", "s2", "s3", "s4"]
    assert reasons(verdicts, "s0") == "pinned"
    assert reasons(verdicts, "s3") == "within max_count 2 (number 1)"


def test_damaged_ones_take_no_place_and_no_count_lets_them_go() -> None:
    snapshots = every(HOUR, 6, damaged=(1, 4, 5))
    for rules in (Retention(max_count=2), Retention(keep_last=2), Retention(hourly=2)):
        verdicts = judge(snapshots, rules, NOW)
        assert kept(verdicts) == ["s1", "s2", "s3", "s4", "s5"]
        assert reasons(verdicts, "s5") == "damaged: it takes no place"
        assert "number 1" in reasons(verdicts, "s3") or "hourly 1" in reasons(verdicts, "s3")
        assert next_change(snapshots, rules, NOW) is None


def test_age_lets_a_damaged_one_go_unless_it_is_pinned_or_too_young() -> None:
    snapshots = every(HOUR, 5, damaged=(0, 1, 2, 3), pinned=(1,))
    rules = Retention(keep_last=9, max_age=3 * HOUR)
    verdicts = judge(snapshots, rules, NOW)
    assert kept(verdicts) == ["s1", "s2", "s3", "s4"]
    assert reasons(verdicts, "s0") == "damaged, and 4h0m0s old, older than max_age 3h0m0s"
    assert reasons(verdicts, "s2") == "damaged: it takes no place, and stays until max_age 3h0m0s"
    assert next_change(snapshots[2:], rules, NOW) == NOW + HOUR
    young = judge(snapshots, replace(rules, minimum_age=9 * HOUR), NOW)
    assert reasons(young, "s0").endswith("4h0m0s old, younger than minimum_age 9h0m0s")


def test_nothing_goes_before_its_minimum_age() -> None:
    rules = Retention(max_count=1, minimum_age=2 * HOUR)
    verdicts = judge(every(HOUR, 4), rules, NOW)
    assert kept(verdicts) == ["s2", "s3"]
    assert reasons(verdicts, "s2") == "1h0m0s old, younger than minimum_age 2h0m0s"


def test_a_clock_that_went_back_makes_no_new_snapshot_old() -> None:
    """The newest is the one made last, whatever the clock said."""
    before = [Candidate("before", NOW + DAY), Candidate("later", NOW + DAY + HOUR)]
    verdicts = judge([*before, Candidate("last", NOW)], Retention(max_count=2, max_age=DAY), NOW)
    assert kept(verdicts) == ["later", "last"]
    assert "0s old" in reasons(verdicts, "later")


@pytest.mark.parametrize(
    "rules",
    [
        Retention(),
        Retention(minimum_age=HOUR),
        Retention(max_age=timedelta(0)),
        Retention(max_count=-1),
        Retention(daily=2**40),
        Retention(max_count=1, max_age=-HOUR),
        Retention(max_count=1, minimum_age=-HOUR),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules: Retention) -> None:
    with pytest.raises(InvalidRequest):
        check_retention(rules)


def test_rules_that_let_something_go_are_good() -> None:
    for rules in (Retention(max_age=HOUR), Retention(monthly=1), Retention(keep_last=1)):
        assert check_retention(rules) is rules


counts = st.integers(0, 6)
ages = st.none() | st.integers(0, 200).map(lambda hours: HOUR * hours)
retentions = st.builds(
    Retention, counts, ages, counts, counts, counts, counts, counts, minimum_age=ages
)


@st.composite
def histories(draw: Callable[..., list[tuple[int, bool, bool]]]) -> list[Candidate]:
    """Any snapshots in any order of times: the clock may have gone anywhere between two."""
    minutes = st.integers(-5000, 60_000)
    drawn = draw(st.lists(st.tuples(minutes, st.booleans(), st.booleans())))
    return [
        Candidate(f"s{number}", NOW - timedelta(minutes=minutes), pinned, damaged)
        for number, (minutes, pinned, damaged) in enumerate(drawn)
    ]


def wanted_by_rules(snapshots: list[Candidate], rules: Retention) -> set[str]:
    """What the keep rules choose, worked out another way: period by period."""
    newest_first = [s for s in reversed(snapshots) if not (s.pinned or s.damaged)]
    chosen = {s.id for s in newest_first[: rules.keep_last]}
    for layout, count in (
        ("%Y%m%d%H", rules.hourly),
        ("%Y%m%d", rules.daily),
        ("%G%V", rules.weekly),
        ("%Y%m", rules.monthly),
    ):
        periods: dict[str, str] = {}
        for snapshot in newest_first:
            periods.setdefault(snapshot.created_at.strftime(layout), snapshot.id)
        chosen |= set(list(periods.values())[:count])
    return chosen


@given(histories(), retentions)
def test_exactly_what_nothing_speaks_for_goes(snapshots: list[Candidate], rules: Retention) -> None:
    verdicts = judge(snapshots, rules, NOW)
    assert [verdict.id for verdict in verdicts] == [snapshot.id for snapshot in snapshots]
    assert all(verdict.reasons for verdict in verdicts)
    wanted = wanted_by_rules(snapshots, rules)
    counted = [s for s in reversed(snapshots) if not (s.pinned or s.damaged)]
    for snapshot, verdict in zip(snapshots, verdicts, strict=True):
        age = max(timedelta(0), NOW - snapshot.created_at)
        young = rules.minimum_age is not None and age < rules.minimum_age
        too_old = bool(rules.max_age and age >= rules.max_age)
        if snapshot.pinned or snapshot.damaged:
            assert verdict.keep == (snapshot.pinned or young or not too_old)
            continue
        too_many = bool(rules.max_count and counted.index(snapshot) >= rules.max_count)
        within = rules.limited and not (too_many or too_old)
        assert verdict.keep == (young or snapshot.id in wanted or within)


@given(histories(), retentions)
def test_equal_arguments_give_equal_verdicts_and_a_second_pass_deletes_nothing(
    snapshots: list[Candidate], rules: Retention
) -> None:
    verdicts = judge(snapshots, rules, NOW)
    assert judge(list(snapshots), rules, NOW) == verdicts
    left = [s for s, verdict in zip(snapshots, verdicts, strict=True) if verdict.keep]
    assert all(verdict.keep for verdict in judge(left, rules, NOW))


@given(histories(), retentions)
def test_until_the_next_change_time_changes_nothing(
    snapshots: list[Candidate], rules: Retention
) -> None:
    change = next_change(snapshots, rules, NOW)
    until = NOW + 10_000 * DAY if change is None else change - timedelta(microseconds=1)
    assert until >= NOW
    assert kept(judge(snapshots, rules, until)) == kept(judge(snapshots, rules, NOW))
