"""Merging layers: what an image finally holds, and what is refused (S22, S23, S24)."""

from __future__ import annotations

import gzip
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from stillframe.images import tarread
from stillframe.images.base import applets, find_busybox, write_base_tar
from stillframe.images.disk import build_root_disk, make_overlay_disk
from stillframe.images.layers import MergedLayers
from stillframe.images.tarread import Blob
from stillframe.model.errors import InvalidRequest
from support.registry import layer


def entry(name: str, kind: bytes, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in values.items():
        setattr(info, key, value)
    return info


def blobs(directory: Path, layers: Sequence[bytes]) -> list[Blob]:
    found = []
    for number, data in enumerate(layers):
        path = directory / f"layer{number}"
        path.write_bytes(data)
        found.append(Blob(path))
    return found


def build(directory: Path, *layers: bytes) -> Path:
    disk = directory / "root.squashfs"
    merged = MergedLayers(blobs(directory, layers))
    build_root_disk(merged.write, disk, root_mode=merged.root_mode)
    return disk


def listing(disk: Path) -> dict[str, str]:
    done = subprocess.run(
        ["unsquashfs", "-lln", disk], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line.split(None, 5) for line in done.stdout.splitlines() if "squashfs-root/" in line]
    return {words[5].removeprefix("squashfs-root/"): f"{words[0]} {words[1]}" for words in lines}


def cat(disk: Path, name: str) -> bytes:
    return subprocess.run(
        ["unsquashfs", "-cat", disk, name], capture_output=True, check=True, timeout=60
    ).stdout


def test_opaque_directories_and_whiteouts_hide_lower_layers_only(tmp_path: Path) -> None:
    lower = layer(("d/old", b"1"), ("e/gone", b"2"), ("e/kept", b"3"))
    upper = layer(("d/new", b"4"), ("d/.wh..wh..opq", b""), ("e/.wh.gone", b""))
    names = listing(build(tmp_path, lower, upper))
    assert set(names) == {"d", "d/new", "e", "e/kept"}


def test_owners_setuid_and_links_survive(tmp_path: Path) -> None:
    disk = build(
        tmp_path,
        layer(
            entry("./bin", tarfile.DIRTYPE, mode=0o755, uid=3, gid=4),
            entry("bin/su", tarfile.REGTYPE, mode=0o4755, uid=1000, gid=2000),
            entry("bin/sh", tarfile.SYMTYPE, linkname="su", mode=0o777),
        ),
    )
    names = listing(disk)
    assert names["bin/su"] == "-rwsr-xr-x 1000/2000"
    assert names["bin"] == "drwxr-xr-x 3/4"
    assert "bin/sh -> su" in names


def test_a_hard_link_keeps_the_content_its_target_had(tmp_path: Path) -> None:
    first = layer(("a", b"first"))
    second = layer(entry("b", tarfile.LNKTYPE, linkname="a"))
    third = layer(("a", b"third"))
    disk = build(tmp_path, first, second, third)
    assert (cat(disk, "a"), cat(disk, "b")) == (b"third", b"first")


def test_the_last_of_duplicate_names_wins_and_long_names_survive(tmp_path: Path) -> None:
    long = "/".join(["x" * 90] * 5)
    disk = build(tmp_path, gzip.compress(layer(("/a", b"1"), ("./a", b"2"), (long, b"3"))))
    assert (cat(disk, "a"), cat(disk, long)) == (b"2", b"3")


def test_extended_attributes_survive(tmp_path: Path) -> None:
    info = entry("ping", tarfile.REGTYPE, mode=0o755)
    info.pax_headers = {"SCHILY.xattr.user.note": "kept", "SCHILY.xattr.system.x": "dropped"}
    (blob,) = blobs(tmp_path, [layer(info)])
    target = tmp_path / "out.tar"
    with target.open("wb") as output:
        MergedLayers([blob]).write(output)
    with tarfile.open(target) as archive:
        found = archive.getmember("ping").pax_headers
    assert found["SCHILY.xattr.user.note"] == "kept"
    assert "SCHILY.xattr.system.x" not in found


def big_header() -> bytes:
    return entry("x", tarfile.XHDTYPE, size=1 << 30).tobuf(tarfile.GNU_FORMAT)


def sparse(size: int, **more: str) -> tarfile.TarInfo:
    """A file of ``size`` bytes that is nothing but holes, in GNU's sparse formats 0.1 and 1.0."""
    fields = {"size": str(size), "numblocks": "1", "map": f"{size},0", **more}
    info = entry("a", tarfile.REGTYPE)
    info.pax_headers = {f"GNU.sparse.{key}": value for key, value in fields.items()}
    return info


def old_sparse(size: int) -> bytes:
    """The same in the format of old GNU tar: an entry of type S with its real size in octal."""
    block = bytearray(entry("a", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(1024)


HOSTILE = {
    "S22 dot dot": layer(("a/../../etc/passwd", b"x")),
    "S22 through a symbolic link": layer(
        entry("a", tarfile.SYMTYPE, linkname="/etc"), ("a/passwd", b"x")
    ),
    "S22 through a file": layer(("a", b""), ("a/b", b"x")),
    "S22 hard link out": layer(entry("a", tarfile.LNKTYPE, linkname="../../etc/passwd")),
    "S22 hard link to nothing": layer(entry("a", tarfile.LNKTYPE, linkname="b")),
    "S22 over-long path": layer(("/".join(["y" * 200] * 21), b"")),
    "S22 over-long header": big_header(),
    "S22 sparse bomb": layer(sparse(1 << 42)),
    "S22 sparse bomb of old": old_sparse(8**11 - 1) * 9,
    "S22 sparse file of a negative size": layer(sparse(-1)),
    "S22 sparse map of nonsense": layer(sparse(1 << 20, map="a,b")),
    "S22 link to itself": layer(entry("a", tarfile.LNKTYPE, linkname="a")),
    "S22 hard link to a directory": layer(
        entry("d", tarfile.DIRTYPE), entry("a", tarfile.LNKTYPE, linkname="d")
    ),
    "S22 unknown type": layer(entry("a", b"Z")),
    "S22 symbolic link to nothing": layer(entry("a", tarfile.SYMTYPE, linkname="")),
    "S22 below a device": layer(entry("a", tarfile.CHRTYPE), ("a/b", b"x")),
    "S22 below a FIFO": layer(entry("a", tarfile.FIFOTYPE), ("a/b", b"x")),
    "S22 dot dot as a FIFO": layer(entry("../a", tarfile.FIFOTYPE)),
    "S22 bad owner": layer(entry("a", tarfile.REGTYPE, uid=1 << 32)),
    "S23 whiteout escapes": layer((".wh...", b"")),
    "S23 whiteout of dot dot": layer(("d/.wh...", b"")),
    "S23 below a whiteout": layer((".wh.a/b", b"")),
    "S23 whiteout through a symbolic link": layer(
        entry("a", tarfile.SYMTYPE, linkname="/etc"), ("a/.wh.passwd", b"")
    ),
    "S23 opaque through a symbolic link": layer(
        entry("a", tarfile.SYMTYPE, linkname="/"), ("a/.wh..wh..opq", b"")
    ),
    "cut off in a file": layer(("a", b"x" * 5000))[:3000],
    "cut off gzip": gzip.compress(layer(("a", b"x" * 5000)))[:-20],
    "damaged second header": layer(("a", b""))[:512] + b"\x01" * 512,
    "not a tar": b"nonsense" * 1000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layers_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        MergedLayers(blobs(tmp_path, [HOSTILE[name]]))
    assert caught.value.code == "invalid_layer"


def test_s22_devices_and_fifos_are_made_in_the_disk_of_the_guest_only(tmp_path: Path) -> None:
    disk = build(
        tmp_path,
        layer(
            entry("mem", tarfile.CHRTYPE, devmajor=1, devminor=1, mode=0o666),
            entry("sda", tarfile.BLKTYPE, devmajor=8, devminor=0, mode=0o666),
            entry("pipe", tarfile.FIFOTYPE, mode=0o666),
        ),
    )
    kinds = {name.rpartition("/")[2]: words[:10] for name, words in listing(disk).items()}
    assert kinds == {"mem": "crw-rw-rw-", "sda": "brw-rw-rw-", "pipe": "prw-rw-rw-"}
    assert all(path.is_file() for path in tmp_path.iterdir())


def test_s22_names_that_differ_in_case_are_two_files(tmp_path: Path) -> None:
    disk = build(tmp_path, layer(("Readme", b"1"), ("README", b"2"), ("readme", b"3")))
    assert [cat(disk, name) for name in ("Readme", "README", "readme")] == [b"1", b"2", b"3"]


@pytest.mark.parametrize("names", [range(30), ["/".join("d" * 30)]], ids=["files", "implied"])
def test_s22_very_many_entries_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: Sequence[object]
) -> None:
    monkeypatch.setattr("stillframe.images.layers.MAX_ENTRIES", 20)
    layers = [layer(*((str(name), b"") for name in names[n::2])) for n in (0, 1)]
    with pytest.raises(InvalidRequest, match="more than 20 entries"):
        MergedLayers(blobs(tmp_path, layers))


def test_s24_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarread, "RATIO_FREE", 1 << 20)
    bomb = gzip.compress(layer(("zeros", bytes(8 << 20))))
    with pytest.raises(InvalidRequest, match="too many bytes"):
        MergedLayers(blobs(tmp_path, [bomb]))


def test_s23_a_layer_with_another_digest_is_refused(tmp_path: Path) -> None:
    (blob,) = blobs(tmp_path, [layer(("a", b"x"))])
    with pytest.raises(InvalidRequest, match="not what the image says"):
        MergedLayers([Blob(blob.path, diff_id="sha256:" + "0" * 64)])


def test_a_refused_layer_leaves_no_disk(tmp_path: Path) -> None:
    merged = MergedLayers(blobs(tmp_path, [layer(("a", b"x" * 5000))]))
    (tmp_path / "layer0").write_bytes(layer(("b", b"")))
    with pytest.raises(InvalidRequest):
        build_root_disk(merged.write, tmp_path / "disk")
    assert not (tmp_path / "disk").exists()


def test_the_built_in_image_has_a_shell_and_is_deterministic(tmp_path: Path) -> None:
    busybox = find_busybox()
    assert {"sh", "sleep", "mount"} <= set(applets(busybox.read_bytes()))
    digests = [
        build_root_disk(lambda out: write_base_tar(out, busybox), tmp_path / name)
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    assert "bin/sh -> busybox" in listing(tmp_path / "one")


def test_an_overlay_disk_is_a_clean_sparse_ext4(tmp_path: Path) -> None:
    path = tmp_path / "overlay.raw"
    make_overlay_disk(path, 1 << 30, tmp_path)
    assert path.stat().st_size == 1 << 30
    assert path.stat().st_blocks * 512 < 64 << 20
    check = subprocess.run(["e2fsck", "-fn", path], capture_output=True, check=False, timeout=60)
    assert check.returncode == 0
    with pytest.raises(InvalidRequest):
        make_overlay_disk(tmp_path / "small", 4096, tmp_path)
