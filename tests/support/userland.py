"""A small userland as layers of an image: owners, modes, links, devices and whiteouts."""

from __future__ import annotations

import io
import tarfile

from stillframe.images.base import find_busybox

APPLETS = ["sh", "cat", "sleep", "stat", "id", "ls", "tr", "grep", "readlink"]


def entry(
    name: str, content: bytes = b"", *, mode: int = 0o644, owner: tuple[int, int] = (0, 0),
    kind: bytes = tarfile.REGTYPE, link: str = "", device: tuple[int, int] = (0, 0),
) -> tuple[tarfile.TarInfo, bytes]:  # fmt: skip
    """One member of a layer."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size = kind, mode, link, len(content)
    info.uid, info.gid = owner
    info.devmajor, info.devminor = device
    return info, content


def layer(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A layer of members with owners and modes."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return output.getvalue()


def layers() -> list[bytes]:
    """Two layers: a userland with owners, modes and links, and one that takes some of it away."""
    links = [entry(f"bin/{a}", kind=tarfile.SYMTYPE, link="busybox", mode=0o777) for a in APPLETS]
    lower = layer(
        entry("bin", kind=tarfile.DIRTYPE, mode=0o755),
        entry("bin/busybox", find_busybox().read_bytes(), mode=0o755),
        *links,
        entry("tmp", kind=tarfile.DIRTYPE, mode=0o1777),
        entry("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1500:1600::/home/app:/bin/sh\n"),
        entry("etc/group", b"root:x:0:\napp:x:1600:\nextra:x:1700:other,app\n"),
        entry("srv", kind=tarfile.DIRTYPE, mode=0o750, owner=(1500, 1600)),
        entry("srv/data", b"lower", mode=0o640, owner=(1234, 2345)),
        entry("srv/same", kind=tarfile.LNKTYPE, link="srv/data"),
        entry("srv/link", kind=tarfile.SYMTYPE, link="data", owner=(7, 8)),
        entry("srv/null", kind=tarfile.CHRTYPE, mode=0o666, owner=(3, 4), device=(1, 3)),
        entry("srv/pipe", kind=tarfile.FIFOTYPE, mode=0o600, owner=(5, 6)),
        entry("srv/setid", b"x", mode=0o6755, owner=(1, 2)),
        entry("srv/changed", b"old", mode=0o600),
        entry("srv/gone", b"x"),
        entry("srv/tree/old", b"x"),
        entry("srv/whole/deep/file", b"x"),
    )
    upper = layer(
        entry("srv/changed", b"new", mode=0o444, owner=(1500, 1600)),
        entry("srv/.wh.gone"),
        entry("srv/tree/.wh..wh..opq"),
        entry("srv/tree/new", b"x"),
        entry("srv/.wh.whole"),
    )
    return [lower, upper]
