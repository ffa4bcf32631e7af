"""A sealed payload is whole: its manifest vouches for it, and what is torn is found before a load.

The numbers are those of the fault catalogue: F41, F43, F44, F46, F48 and F49.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from stillframe.model.errors import DamagedData
from stillframe.model.units import MIB
from stillframe.store.digests import write_table
from stillframe.store.manifest import (
    FileEntry,
    encode_document,
    encode_manifest,
    file_entries,
    parse_manifest,
    read_manifest,
)
from stillframe.store.paths import Payload
from stillframe.store.payloads import (
    add_tables,
    check,
    measure,
    seal,
    without_file,
)
from stillframe.store.readers import FileReader
from stillframe.store.verification import Depth
from support.payloads import (
    expected_table,
    make_payload,
    noise,
    verified,
    write_pieces,
)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return make_payload(tmp_path / "payload")


def table(source: Path, to: Path, threads: int | None = None) -> str:
    with FileReader(source) as reader:
        return write_table(reader, to, threads=threads)


def test_the_manifest_vouches_for_every_file(payload: Payload) -> None:
    entries = file_entries(check(payload))
    assert set(entries) == {"memory", "devices", "overlay.raw"}
    assert entries["devices"].blake3 == blake3(payload.devices.read_bytes()).hexdigest()
    for name in ("memory", "overlay.raw"):
        assert entries[name].table_blake3 == blake3(payload.table(name).read_bytes()).hexdigest()
        assert payload.table(name).read_bytes() == expected_table(payload.directory / name)
    found = verified(payload)
    assert found.damage == ()
    assert found.unchecked == ()
    assert found.checked_bytes == found.total_bytes


def test_equal_payloads_have_equal_manifests(tmp_path: Path) -> None:
    one, two = make_payload(tmp_path / "one"), make_payload(tmp_path / "two")
    assert one.manifest.read_bytes() == two.manifest.read_bytes()


def test_sealing_takes_the_tables_that_are_known(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "payload")
    payload.directory.mkdir()
    write_pieces(payload.memory, MIB, [(0, noise(MIB))])
    write_pieces(payload.devices, 100, [(0, noise(100))])
    digest = table(payload.memory, payload.table("memory"))
    made = payload.table("memory").stat().st_ino
    seal(payload, {}, {"memory": digest})
    assert payload.table("memory").stat().st_ino == made
    assert verified(payload).damage == ()
    payload.manifest.unlink()
    os.truncate(payload.table("memory"), 32)
    with pytest.raises(ValueError, match="memory"):
        seal(payload, {}, {"memory": digest})
    assert not payload.manifest.exists()


@pytest.mark.parametrize("name", ["pwrite", "ftruncate", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_f41_f43_f44_what_cannot_be_made_durable_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    payload = make_payload(tmp_path / "payload")
    real, points = getattr(os, name), 0
    while True:
        for made in (payload.manifest, payload.table("memory"), payload.table("overlay.raw")):
            made.unlink(missing_ok=True)
        calls = itertools.count()

        def fail(*arguments: object, at: int = points, calls: Iterator[int] = calls) -> object:
            if next(calls) == at:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            try:
                seal(payload, {})
                break
            except OSError as error:
                caught = error.errno
        assert caught == code
        # Only the flush of the directory comes after the manifest has its name.
        assert not payload.manifest.exists() or (name == "fsync" and next(calls) == points + 1)
        points += 1
    assert points >= 2
    assert verified(payload).damage == ()


def test_a_manifest_less_one_file_is_intact(payload: Payload) -> None:
    less = parse_manifest(without_file(payload.manifest.read_bytes(), "overlay.raw"))
    assert set(file_entries(less)) == {"memory", "devices"}
    assert less["hypervisor"] == "fake"


def format_1(payload: Payload) -> None:
    """Make a payload as it was before there were tables."""
    files = {n: {"size": e.size} for n, e in file_entries(check(payload)).items()}
    digest = blake3(payload.devices.read_bytes()).hexdigest()
    old = {"format": 1, "hypervisor": "fake", "files": files}
    old["files"]["devices"]["blake3"] = digest  # type: ignore[index]
    payload.manifest.write_text(json.dumps(old))
    for name in ("memory", "overlay.raw"):
        payload.table(name).unlink()


def test_a_payload_of_format_1_loads_and_can_be_given_tables(payload: Payload) -> None:
    format_1(payload)
    assert check(payload)["format"] == 1
    assert set(verified(payload).unchecked) == {"memory", "overlay.raw"}
    manifest = add_tables(payload)
    assert (manifest["format"], manifest["hypervisor"]) == (2, "fake")
    assert add_tables(payload) == manifest
    found = verified(payload)
    assert (found.damage, found.unchecked) == ((), ())


@pytest.mark.parametrize("name", ["memory", "devices", "overlay.raw"])
@pytest.mark.parametrize("cut", [1, 4096, None])
def test_f46_a_truncated_file_is_found_before_any_load(
    payload: Payload, name: str, cut: int | None
) -> None:
    path = payload.directory / name
    size = path.stat().st_size
    left = 0 if cut is None else size - cut
    os.truncate(path, left)
    with pytest.raises(DamagedData) as caught:
        check(payload)
    assert caught.value.facts["file"] == name
    for depth in Depth:
        (damage,) = verified(payload, depth).damage
        assert (damage.file, damage.offset, damage.length) == (name, left, size - left)


def intact(payload: Payload) -> bytes:
    return payload.manifest.read_bytes()


def torn(payload: Payload) -> bytes:
    new = encode_document({**read_manifest(payload.manifest), "accelerator": "another"})
    return new[:512] + intact(payload)[512:]


UNREADABLE = {
    "empty": b"", "a brace": b"{", "a list": b"[]", "null": b"null", "NULs": b"\0" * 512,
    "no files": b'{"format": 2}', "files is a number": b'{"format": 2, "files": 3}',
    "a path": b'{"format": 1, "files": {"../x": {"size": 1}}}',
    "an absolute path": b'{"format": 1, "files": {"/etc/passwd": {"size": 1}}}',
    "a surrogate": b'{"format": 1, "files": {"\\ud800": {"size": 1}}}',
    "negative": b'{"format": 1, "files": {"memory": {"size": -1}}}',
    "true": b'{"format": 1, "files": {"memory": {"size": true}}}',
    "beyond": b'{"format": 1, "files": {"memory": {"size": 1e999}}}',
    "huge": b'{"format": 1, "files": {"memory": {"size": ' + b"9" * 100 + b"}}}",
    "endless digits": b'{"format": 1, "files": {"memory": {"size": ' + b"9" * 9999 + b"}}}",
    "no digest of its own": b'{"format": 2, "files": {}}',
    "not UTF-8": b'{"format": 1, "files": {}, "x": "\xff"}', "UTF-16": "{}".encode("utf-16"),
    "deep": b"[" * 100_000, "deep within": b'{"files": {}, "format": ' + b"[" * 900 + b"]" * 900
    + b"}", "oversized": b'{"format": 1, "files": {}, "x": "' + b"x" * (1 << 20) + b'"}',
}  # fmt: skip


@pytest.mark.parametrize("what", [*UNREADABLE, "torn", "cut in half"])
def test_f48_a_torn_manifest_is_damage(payload: Payload, what: str) -> None:
    text = UNREADABLE.get(what, b"")
    text = torn(payload) if what == "torn" else text
    text = intact(payload)[: len(intact(payload)) // 2] if what == "cut in half" else text
    payload.manifest.write_bytes(text)
    with pytest.raises(DamagedData) as caught:
        check(payload)
    assert caught.value.facts["file"] == "manifest.json"
    (damage,) = verified(payload).damage
    assert damage.file == "manifest.json"


@pytest.mark.parametrize("what", ["missing", "a directory", "a link", "a pipe"])
def test_f48_a_manifest_that_is_no_file_is_damage(payload: Payload, what: str) -> None:
    text = payload.manifest.rename(payload.directory / "elsewhere")
    if what == "a directory":
        payload.manifest.mkdir()
    elif what == "a link":
        payload.manifest.symlink_to(text)
    elif what == "a pipe":
        os.mkfifo(payload.manifest)
    with pytest.raises(DamagedData) as caught:
        check(payload)
    assert caught.value.facts["file"] == "manifest.json"


def test_f49_unknown_facts_are_kept_and_newer_formats_refused(payload: Payload) -> None:
    manifest = {**read_manifest(payload.manifest), "future": [1, "ü"]}
    payload.manifest.write_bytes(encode_document(manifest))
    assert check(payload)["future"] == [1, "ü"]
    for version in (3, 0, -1, "2", None, True, 2.0, 10**30):
        payload.manifest.write_bytes(encode_document({**manifest, "format": version}))
        with pytest.raises(DamagedData, match="is not known") as caught:
            check(payload)
        assert caught.value.facts["file"] == "manifest.json"


@pytest.mark.parametrize("change", [
    {"length": 4096}, {"table": "../memory.blake3"}, {"table": "devices"}, {"blake3": "A" * 64},
    {"blake3": None},
])  # fmt: skip
def test_f49_a_table_of_another_kind_is_refused(
    payload: Payload, change: dict[str, object]
) -> None:
    manifest = read_manifest(payload.manifest)
    manifest["files"]["memory"]["extents"] |= change
    payload.manifest.write_bytes(encode_document(manifest))
    with pytest.raises(DamagedData, match="memory"):
        check(payload)


def test_a_fact_cannot_pose_as_the_manifests_digest(payload: Payload) -> None:
    facts = {"a": {"blake3": "0" * 64}, "aa": '\n "blake3": "' + "0" * 64 + '"', "b": "0" * 64}
    entries = {"memory": FileEntry(1)}
    assert parse_manifest(encode_manifest(entries, facts))["a"] == facts["a"]


def test_what_is_being_built_belongs_to_no_payload(payload: Payload) -> None:
    before, manifest = measure(payload), payload.manifest.read_bytes()
    payload.being_built(payload.memory).write_bytes(noise(MIB))
    assert measure(payload) == before
    for name in ("memory", "overlay.raw"):
        payload.table(name).unlink()
    assert seal(payload, {"hypervisor": "fake"}) == before
    assert payload.manifest.read_bytes() == manifest
