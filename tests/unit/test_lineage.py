"""The family tree told by records: descent, forks, restores, and what deletion leaves of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from stillframe.model.lineage import Family, Forebear, Relative, bury
from stillframe.model.values import Instance, Snapshot
from support.api_double import instance, snapshot

MADE = datetime(2030, 1, 1, tzinfo=UTC)


class Life:
    """Instances and snapshots as the engine would record them, in the order they are made."""

    def __init__(self) -> None:
        self.snapshots: dict[str, Snapshot] = {}
        self.instances: dict[str, Instance] = {}
        self.forebears: dict[str, Forebear] = {}
        self.clock = MADE

    def _later(self) -> datetime:
        self.clock += timedelta(minutes=1)
        return self.clock

    def boot(self, name: str, **facts: Any) -> Instance:
        made = replace(instance(name), id=name, created_at=self._later(), **facts)
        self.instances[name] = made
        return made

    def take(self, source: str, name: str) -> Snapshot:
        owner = self.instances[source]
        made = snapshot(
            owner, id=name, name=name, created_at=self._later(),
            template=replace(owner, head_snapshot_id=None),
            parent_snapshot_id=owner.head_snapshot_id or owner.parent_snapshot_id,
        )  # fmt: skip
        self.snapshots[name] = made
        self.instances[source] = replace(owner, head_snapshot_id=name)
        return made

    def fork(self, snapshot_id: str, name: str) -> Instance:
        return self.boot(name, parent_snapshot_id=snapshot_id)

    def restore(self, source: str, snapshot_id: str) -> None:
        self.instances[source] = replace(
            self.instances[source], parent_snapshot_id=snapshot_id, head_snapshot_id=None
        )

    def delete(self, snapshot_id: str) -> None:
        gone = self.snapshots.pop(snapshot_id)
        referred = [s.parent_snapshot_id for s in self.snapshots.values()]
        for owner in self.instances.values():
            referred += [owner.parent_snapshot_id, owner.head_snapshot_id]
        self.forebears = bury(self.forebears, gone, referred)

    @property
    def family(self) -> Family:
        return Family(self.snapshots, self.instances, self.forebears)

    def above(self, name: str) -> list[str]:
        return [_shown(relative) for relative in self.family.ancestors(name)]

    def below(self, name: str) -> list[str]:
        return [_shown(relative) for relative in self.family.descendants(name)]


def _shown(relative: Relative) -> str:
    return ("†" if relative.deleted else "") + (relative.name or relative.id)


def a_family() -> Life:
    """web with three snapshots; a fork of the second one, with a snapshot and a fork of its own."""
    life = Life()
    life.boot("web")
    for name in ("one", "two", "three"):
        life.take("web", name)
    life.fork("two", "fork")
    life.take("fork", "four")
    life.fork("four", "grandchild")
    return life


def test_a_second_snapshot_descends_from_the_first() -> None:
    life = a_family()
    assert life.above("one") == ["web"]
    assert life.above("three") == ["web", "two", "one"]
    assert life.below("one") == ["two", "three", "fork", "four", "grandchild"]


def test_a_fork_descends_from_its_snapshot_and_its_own_from_both() -> None:
    life = a_family()
    assert life.above("four") == ["fork", "two", "web", "one"]
    assert life.below("two") == ["three", "fork", "four", "grandchild"]
    assert life.below("four") == ["grandchild"]
    assert life.below("three") == []


def test_after_a_restore_the_line_starts_from_the_restored_one() -> None:
    life = a_family()
    life.restore("web", "one")
    life.take("web", "other")
    assert life.snapshots["other"].parent_snapshot_id == "one"
    assert "other" in life.below("one")
    assert "other" not in life.below("two")


def test_a_live_fork_descends_from_the_instance_and_from_its_last_snapshot() -> None:
    life = a_family()
    web = life.instances["web"]
    life.boot("twin", parent_instance_id="web", head_snapshot_id=web.head_snapshot_id)
    life.take("twin", "five")
    assert life.above("five") == ["twin", "web", "three", "two", "one"]
    assert life.below("three") == ["twin", "five"]


def test_deleting_in_the_middle_keeps_the_line_and_shows_the_deleted() -> None:
    life = a_family()
    life.delete("two")
    assert life.above("four") == ["fork", "†two", "web", "one"]
    assert life.below("one") == ["†two", "three", "fork", "four", "grandchild"]
    life.delete("one")
    assert life.above("three") == ["web", "†two"]
    assert list(life.forebears) == ["two"]


def test_a_long_line_of_deleted_ones_shrinks_to_its_youngest() -> None:
    life = Life()
    life.boot("web")
    for number in range(50):
        life.take("web", f"s{number}")
    for number in range(1, 49):
        life.delete(f"s{number}")
    assert list(life.forebears) == ["s48"]
    assert life.above("s49") == ["web", "†s48", "s0"]
    life.delete("s49")
    assert list(life.forebears) == ["s49"]  # web goes on from it
    assert life.family.ancestors("s0") == [life.family.instance("web")]


def test_a_deleted_source_is_shown_by_the_name_it_had() -> None:
    life = a_family()
    del life.instances["web"]
    assert life.above("three") == ["†web", "two", "one"]
    life.delete("three")
    life.fork("two", "late")
    life.take("late", "six")
    life.delete("two")
    assert life.above("six") == ["late", "†two", "†web", "one"]


def test_everyone_includes_the_deleted_that_somebody_refers_to() -> None:
    life = a_family()
    life.delete("two")
    del life.instances["fork"]
    names = [_shown(relative) for relative in life.family.everyone()]
    assert names == ["web", "one", "†two", "three", "†fork", "four", "grandchild"]


def test_records_that_point_in_a_circle_do_not_hang() -> None:
    life = a_family()
    life.snapshots["one"] = replace(life.snapshots["one"], parent_snapshot_id="three")
    life.instances["web"] = replace(life.instances["web"], parent_instance_id="web")
    assert set(life.above("one")) == {"web", "three", "two"}
    assert "two" in life.below("one")
    assert len(life.family.everyone()) == 7


def test_a_family_of_thousands_is_told_at_once() -> None:
    life = Life()
    life.boot("web")
    for number in range(5000):
        life.take("web", f"s{number}")
    assert len(life.family.ancestors("s4999")) == 5000
    assert len(life.family.descendants("s0")) == 4999
    assert len(life.family.everyone()) == 5001


def generations(count: int) -> Life:
    """A fork of a fork of a fork, each with a snapshot that the next was made from."""
    life = Life()
    life.boot("i0")
    for number in range(count):
        life.take(f"i{number}", f"s{number}")
        life.fork(f"s{number}", f"i{number + 1}")
    return life


def test_f57_a_hundred_generations_are_told_whole() -> None:
    life = generations(100)
    above = life.above("s99")
    assert len(above) == 199  # each snapshot's source, and the snapshot that was forked from
    assert above[:3] == ["i99", "s98", "i98"]
    assert above[-1] == "i0"
    assert len(life.below("s0")) == 199


def test_f57_of_a_hundred_deleted_generations_the_youngest_is_remembered() -> None:
    life = generations(100)
    for number in range(100):
        del life.instances[f"i{number}"]
        life.delete(f"s{number}")
    assert list(life.forebears) == ["s99"]
    assert life.forebears["s99"].parent_snapshot_id is None
    assert life.family.everyone()[-1].name == "i100"


def test_f57_a_circle_of_parents_ends() -> None:
    life = generations(3)
    oldest = life.snapshots["s0"]
    life.snapshots["s0"] = replace(oldest, parent_snapshot_id="s2")
    assert life.above("s0") == ["i0", "s2", "i2", "s1", "i1"]
    assert {"s1", "s2"} <= set(life.below("s0"))
    assert len(life.family.everyone()) == 7
    for name in ("s1", "s0", "s2"):  # those that are left still refer to each other
        life.delete(name)
        assert len(life.family.everyone()) >= len(life.instances)
    life.snapshots["s0"] = replace(oldest, parent_snapshot_id="s0")  # its own parent
    assert life.above("s0") == ["i0"]


def test_f57_a_parent_that_nothing_is_known_of_is_told_as_deleted() -> None:
    life = generations(2)
    del life.snapshots["s0"]  # a record that cannot be read
    assert life.above("s1") == ["i1", "†s0"]
    assert life.below("s0") == ["i0", "i1", "s1", "i2"]
    assert [r.id for r in life.family.everyone() if r.deleted] == ["s0"]
