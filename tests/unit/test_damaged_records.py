"""A flipped bit in the database costs at most the record that it is in; a server starts."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from stillframe.host.orphans import kill_orphans, processes_naming
from stillframe.model.values import SnapshotKind
from stillframe.store.paths import DataDirectory
from stillframe.store.records import Intent, Records
from support.engine import make_engine, open_engine, running, traces

pytestmark = pytest.mark.timeout(120)


def flip(data_dir: Path, table: str, column: str, where: str, place: int) -> None:
    """Set the topmost bit of a byte: what was ASCII is no UTF-8 any more."""
    with sqlite3.connect(DataDirectory(data_dir).database) as database:
        ((text,),) = database.execute(f"SELECT CAST({column} AS BLOB) FROM {table} WHERE {where}")
        damaged = bytearray(text)
        damaged[place] ^= 0x80
        database.execute(
            f"UPDATE {table} SET {column} = CAST(? AS TEXT) WHERE {where}",
            (bytes(damaged),),
        )
    database.close()


@pytest.mark.parametrize("column", ["document", "id", "name"])
async def test_a_record_that_is_no_text_any_more_hides_no_other(
    tmp_path: Path, column: str
) -> None:
    async with open_engine(tmp_path) as engine:
        source = await running(engine)
        await engine.stop(source.id)
        spoilt = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED, name="spoilt")
        whole = await engine.snapshot(source.id, kind=SnapshotKind.STOPPED, name="whole")
    flip(tmp_path, "snapshots", column, "name = 'spoilt'", 3)
    async with open_engine(tmp_path) as engine:
        found = [snapshot.id for snapshot in engine.list_snapshots()]
        # The name stands in the document too, which is what is believed.
        assert found == [whole.id] if column != "name" else [spoilt.id, whole.id]
        assert engine.context.data.snapshot(spoilt.id).directory.exists()


async def test_no_vmm_is_ended_for_an_instance_whose_very_id_cannot_be_read(
    tmp_path: Path,
) -> None:
    first = make_engine(tmp_path)
    try:
        async with open_engine(tmp_path, first):
            source = await running(first)
            await first.context.cancel_background()
            (pid,) = processes_naming(tmp_path / "instances")
            first.context.live[source.id].ending = True
            flip(tmp_path, "instances", "id", "name = 'source'", 3)
            second = make_engine(tmp_path)
            await second.open()
            assert second.list_instances() == []
            assert processes_naming(tmp_path / "instances") == [pid]
            await second.close()
    finally:
        kill_orphans(tmp_path / "instances", ())


@pytest.mark.parametrize("verb", ["snapshot", "fork", "restore snapshot"])
async def test_an_intent_whose_facts_cannot_be_read_is_undone_by_its_subject(
    tmp_path: Path, verb: str
) -> None:
    async with open_engine(tmp_path) as engine:
        source = await engine.stop((await running(engine)).id)
        subject = source.id if verb == "restore snapshot" else engine.context.new_id()
        before = traces(tmp_path)
        if verb == "snapshot":
            engine.context.data.snapshot_new(subject).directory.mkdir()
        elif verb == "fork":
            engine.context.data.instance(subject).directory.mkdir()
    with contextlib.closing(Records(DataDirectory(tmp_path).database)) as records:
        records.intend(Intent(subject, verb, {"name": "half"}))
    flip(tmp_path, "intents", "document", f"subject = '{subject}'", 3)
    async with open_engine(tmp_path) as engine:
        assert traces(tmp_path) == before
        assert engine.context.records.intents == {}
        assert [one.id for one in engine.list_instances()] == [source.id]


async def test_an_intent_of_a_verb_that_cannot_be_read_touches_nothing(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        subject = engine.context.new_id()
        engine.context.records.intend(Intent(subject, "snapshot", {}))
        engine.context.data.snapshot_new(subject).directory.mkdir()
    flip(tmp_path, "intents", "verb", f"subject = '{subject}'", 3)
    async with open_engine(tmp_path) as engine:
        assert subject in engine.context.records.intents
        assert engine.context.data.snapshot_new(subject).directory.exists()
        await running(engine)
