"""Records survive, refuse doubles, and one bad record hides no other; payloads are checked."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stillframe.model.errors import DamagedData, HostFailure, NameConflict, NotFound
from stillframe.model.states import InstanceState
from stillframe.model.units import new_id
from stillframe.model.values import (
    ClockReading,
    CompressionAlgorithm,
    CompressionConfig,
    Hypervisor,
    Instance,
    ProcessIdentity,
    Snapshot,
    SnapshotKind,
    SnapshotPolicy,
)
from stillframe.store.manifest import encode_document, read_manifest
from stillframe.store.paths import DataDirectory, Payload
from stillframe.store.payloads import check, seal
from stillframe.store.records import Intent, Records

NOW = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def an_instance(name: str = "one") -> Instance:
    policy = SnapshotPolicy(
        CompressionConfig(True, CompressionAlgorithm.ZSTD, 3), timedelta(seconds=90)
    )
    return Instance(
        id=new_id(), name=name, image="stillframe/base", image_digest="sha256:0",
        state=InstanceState.RUNNING, created_at=NOW, hypervisor=Hypervisor.QEMU,
        memory_bytes=2**28, overlay_bytes=2**30, vcpus=2, env={"A": "ü"}, cmd=("a", "b"),
        process=ProcessIdentity(1, 2, "boot"), snapshot_policy=policy, phase_since=NOW,
    )  # fmt: skip


def a_snapshot(source: Instance, name: str | None = None) -> Snapshot:
    return Snapshot(
        id=new_id(), kind=SnapshotKind.STANDBY, source_instance_id=source.id,
        source_instance_name=source.name, source_hypervisor=source.hypervisor, created_at=NOW,
        size_bytes=1, template=source, name=name,
    )  # fmt: skip


def test_records_are_there_again_after_a_restart(tmp_path: Path) -> None:
    records = Records(tmp_path / "db")
    instance = an_instance()
    snapshot = a_snapshot(instance, "first")
    records.put_instance(instance)
    records.put_snapshot(snapshot)
    records.intend(Intent("subject", "fork", {"key": "value"}))
    records.close()
    again = Records(tmp_path / "db")
    assert again.instances == {instance.id: instance}
    assert again.snapshots == {snapshot.id: snapshot}
    assert again.intents == {"subject": Intent("subject", "fork", {"key": "value"})}
    again.close()


def test_a_name_belongs_to_one_instance(tmp_path: Path) -> None:
    records = Records(tmp_path / "db")
    records.put_instance(an_instance("taken"))
    with pytest.raises(NameConflict):
        records.reserve_instance(an_instance("taken"), Intent("x", "create", {}))
    assert records.intents == {}
    assert len(records.instances) == 1
    records.drop_instance(next(iter(records.instances)))
    records.put_instance(an_instance("taken"))
    records.close()


def test_a_snapshot_name_is_unique_for_its_source_only(tmp_path: Path) -> None:
    records = Records(tmp_path / "db")
    one, two = an_instance("one"), an_instance("two")
    records.put_snapshot(a_snapshot(one, "same"))
    records.put_snapshot(a_snapshot(two, "same"))
    records.put_snapshot(a_snapshot(one))
    records.put_snapshot(a_snapshot(one))
    with pytest.raises(NameConflict):
        records.put_snapshot(a_snapshot(one, "same"))
    assert records.snapshot_name_taken(one.id, "same")
    assert not records.snapshot_name_taken(one.id, "other")
    assert len(records.snapshots) == 4
    records.close()


def test_a_name_is_taken_while_its_snapshot_is_being_made(tmp_path: Path) -> None:
    records = Records(tmp_path / "db")
    records.intend(Intent("s", "snapshot", {"source": "i", "name": "n"}))
    assert records.snapshot_name_taken("i", "n")
    records.fulfil("s")
    assert not records.snapshot_name_taken("i", "n")
    records.close()


def test_one_unreadable_record_hides_no_other(tmp_path: Path) -> None:
    records = Records(tmp_path / "db")
    source = an_instance()
    good, bad = a_snapshot(source), a_snapshot(source)
    records.put_snapshot(good)
    records.put_snapshot(bad)
    records.close()
    with sqlite3.connect(tmp_path / "db") as connection:
        connection.execute("UPDATE snapshots SET document = ? WHERE id = ?", ("{torn", bad.id))
    connection.close()
    again = Records(tmp_path / "db")
    assert list(again.snapshots) == [good.id]
    assert again.damaged == [("snapshots", bad.id)]
    again.close()


def test_a_newer_data_directory_is_refused(tmp_path: Path) -> None:
    Records(tmp_path / "db").close()
    with sqlite3.connect(tmp_path / "db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(HostFailure, match="format 99"):
        Records(tmp_path / "db")


def test_a_data_directory_of_an_earlier_version_is_brought_up_to_date(tmp_path: Path) -> None:
    records = Records(tmp_path / "db")
    instance = an_instance()
    records.put_instance(instance)
    records.close()
    with sqlite3.connect(tmp_path / "db") as connection:
        connection.executescript("DROP TABLE clock; PRAGMA user_version = 2;")
    connection.close()
    for expected in (None, ClockReading(NOW, NOW + timedelta(days=3), timedelta(hours=2))):
        again = Records(tmp_path / "db")
        assert list(again.instances) == [instance.id]
        assert again.clock == expected
        again.put_clock(ClockReading(NOW, NOW + timedelta(days=3), timedelta(hours=2)))
        again.close()


def test_a_data_directory_that_cannot_be_brought_up_to_date_says_so(tmp_path: Path) -> None:
    Records(tmp_path / "db").close()
    with sqlite3.connect(tmp_path / "db") as connection:  # the table is there already
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(HostFailure, match="could not be written"):
        Records(tmp_path / "db")


@pytest.mark.parametrize(
    "document", ["{torn", '{"believed": "2030-01-02T03:04", "wall": "2030-01-02", "held": "P1D"}']
)
def test_a_reading_of_the_clock_that_makes_no_sense_is_as_good_as_none(
    tmp_path: Path, document: str
) -> None:
    records = Records(tmp_path / "db")
    records.put_clock(ClockReading(NOW, NOW, timedelta(0)))
    with records.transaction() as sql:
        sql.execute("UPDATE clock SET document = ?", (document,))
    records.close()
    again = Records(tmp_path / "db")
    assert (again.clock, again.damaged) == (None, [])
    again.put_clock(ClockReading(NOW, NOW, timedelta(0)))
    again.close()


def _delete_then_break(records: Records) -> None:
    with records.transaction() as sql:
        sql.execute("DELETE FROM instances")
        sql.execute("INSERT INTO intents (subject, verb, document) VALUES ('a', 'b', '{}')")
        sql.execute("INSERT INTO intents (subject, verb, document) VALUES ('a', 'b', '{}')")


def test_a_failed_transaction_changes_nothing(tmp_path: Path) -> None:
    records = Records(tmp_path / "db")
    instance = an_instance()
    records.put_instance(instance)
    with pytest.raises(NameConflict):
        _delete_then_break(records)
    records.put_instance(replace(instance, env={}))
    records.close()
    again = Records(tmp_path / "db")
    assert list(again.instances) == [instance.id]
    again.close()


@pytest.mark.parametrize("identifier", ["../etc", "", ".", "a/b", "A" * 24, "x" * 25])
def test_no_path_is_made_from_what_is_no_id(tmp_path: Path, identifier: str) -> None:
    data = DataDirectory(tmp_path)
    for place in (data.instance, data.snapshot, data.snapshot_new, data.instance_staged):
        with pytest.raises(NotFound):
            place(identifier)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    sealed = Payload(tmp_path / "payload")
    sealed.directory.mkdir()
    sealed.memory.write_bytes(b"m" * 8192)
    sealed.devices.write_bytes(b"d" * 100)
    sealed.overlay.write_bytes(b"o" * 4096)
    seal(sealed, {"hypervisor": "fake"})
    return sealed


def test_a_sealed_payload_passes_its_check(payload: Payload) -> None:
    assert check(payload)["hypervisor"] == "fake"


@pytest.mark.parametrize("name", ["memory", "devices", "overlay.raw"])
@pytest.mark.parametrize("cut", [1, 4096])
def test_a_truncated_file_is_found_before_any_load(payload: Payload, name: str, cut: int) -> None:
    path = payload.directory / name
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DamagedData, match=name) as caught:
        check(payload)
    assert caught.value.facts["file"] == name


def test_a_flipped_bit_in_the_device_state_is_found(payload: Payload) -> None:
    data = bytearray(payload.devices.read_bytes())
    data[50] ^= 1
    payload.devices.write_bytes(data)
    with pytest.raises(DamagedData, match="digest"):
        check(payload)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\0" * 512, b'{"files": 3}', b'{"files": {"../x": {}}}',
             b"[" * 100_000],
)  # fmt: skip
def test_a_torn_manifest_is_damage(payload: Payload, text: bytes) -> None:
    payload.manifest.write_bytes(text)
    with pytest.raises(DamagedData):
        check(payload)


def test_a_missing_file_or_manifest_is_damage(payload: Payload) -> None:
    payload.memory.unlink()
    with pytest.raises(DamagedData, match="memory is missing"):
        check(payload)
    payload.manifest.unlink()
    with pytest.raises(DamagedData, match=r"manifest.json is missing"):
        check(payload)


def test_unknown_facts_are_tolerated_and_a_newer_format_is_refused(payload: Payload) -> None:
    manifest = {**read_manifest(payload.manifest), "future": {"x": 1}}
    payload.manifest.write_bytes(encode_document(manifest))
    assert check(payload)["future"] == {"x": 1}
    manifest["format"] += 1
    payload.manifest.write_bytes(encode_document(manifest))
    with pytest.raises(DamagedData, match="format 3") as caught:
        check(payload)
    assert caught.value.facts["file"] == "manifest.json"
