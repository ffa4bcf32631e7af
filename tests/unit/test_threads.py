"""Pieces of work: results in order, a bounded number ahead, nothing left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from stillframe.host.threads import in_order, usable_processors


def test_results_come_in_the_order_of_the_items() -> None:
    first_may_end = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert first_may_end.wait(60)
        elif item == 1:
            first_may_end.set()
        return item * item

    assert list(in_order(work, range(50), threads=2)) == [n * n for n in range(50)]


def test_only_a_few_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = in_order(str, items(), threads=3)
    next(results)
    assert len(taken) == 6
    results.close()
    assert len(taken) == 6


def test_a_failure_is_raised_in_its_place_and_the_rest_forgotten() -> None:
    done = []

    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        done.append(item)
        return item

    results = in_order(work, range(1000), threads=1)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert max(done) < 20
    assert not [t for t in threading.enumerate() if t.name.startswith("pieces")]


def test_by_default_there_is_a_thread_for_each_processor() -> None:
    names = set(in_order(lambda _: threading.current_thread().name, range(100)))
    assert 1 <= len(names) <= usable_processors()
