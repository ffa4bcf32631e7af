"""The built-in image ``stillframe/base``: a static busybox with all its applets."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import IO

from stillframe.model.errors import MissingComponent
from stillframe.model.values import ImageConfig

_CANDIDATES = (Path("/usr/bin/busybox"), Path("/bin/busybox"))
_DIRECTORIES = {
    "bin": 0o755, "dev": 0o755, "etc": 0o755, "home": 0o755, "mnt": 0o755, "opt": 0o755,
    "proc": 0o555, "root": 0o700, "run": 0o755, "sbin": 0o755, "sys": 0o555, "tmp": 0o1777,
    "usr": 0o755, "usr/bin": 0o755, "usr/sbin": 0o755, "var": 0o755, "var/log": 0o755,
    "var/tmp": 0o1777,
}  # fmt: skip
_FILES = {
    "etc/group": "root:x:0:\ntty:x:5:\nusers:x:100:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
    "etc/os-release": 'NAME="Stillframe base"\nID=stillframe\nPRETTY_NAME="Stillframe base"\n',
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/resolv.conf": "",
    "etc/shells": "/bin/sh\n/bin/ash\n",
}
# An applet that would shadow the image's own program, or has no use without one.
_LEFT_OUT = frozenset({"busybox", "init", "linuxrc"})

BASE_CONFIG = ImageConfig(
    cmd=("/bin/sleep", "2147483647"),  # busybox builds differ in knowing "infinity"
    env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
)


def find_busybox() -> Path:
    """The host's static busybox. Raises MissingComponent when there is none."""
    for path in _CANDIDATES:
        if path.is_file() and is_static(path):
            return path
    raise MissingComponent(
        "the built-in image needs a static busybox", hint="apt-get install busybox-static"
    )


def is_static(path: Path) -> bool:
    """Whether an ELF file has no interpreter: no PT_INTERP program header (elf(5), 64 bit)."""
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        return False
    offset = int.from_bytes(data[32:40], "little")
    size = int.from_bytes(data[54:56], "little")
    count = int.from_bytes(data[56:58], "little")
    kinds = (
        int.from_bytes(data[offset + n * size : offset + n * size + 4], "little")
        for n in range(count)
    )
    return 3 not in kinds


def applets(busybox: bytes) -> list[str]:
    """The applet names compiled into a busybox: its longest run of sorted NUL-ended words.

    Reading them needs no execution of the program (include/applet_tables.h: names, sorted).
    """
    start = busybox.find(b"\0[\0[[\0")
    if start < 0:
        return ["sh", "ls", "cat", "sleep", "echo", "mount", "ps", "uname"]
    names: list[str] = []
    position = start + 1
    while position < len(busybox):
        end = busybox.index(b"\0", position)
        word = busybox[position:end]
        if not word or not word.isascii() or (names and word.decode() < names[-1]):
            break
        names.append(word.decode())
        position = end + 1
    return names


def write_base_tar(output: IO[bytes], busybox: Path) -> None:
    """Write the built-in image's file tree as tar; the same bytes for the same busybox."""
    program = busybox.read_bytes()
    for name, mode in sorted(_DIRECTORIES.items()):
        _entry(output, name, tarfile.DIRTYPE, mode)
    _entry(output, "bin/busybox", tarfile.REGTYPE, 0o755, program)
    for name, text in sorted(_FILES.items()):
        _entry(output, name, tarfile.REGTYPE, 0o644, text.encode())
    for applet in applets(program):
        if applet not in _LEFT_OUT:
            _entry(output, f"bin/{applet}", tarfile.SYMTYPE, 0o777, link="busybox")
    output.write(bytes(2 * tarfile.BLOCKSIZE))


def _entry(
    output: IO[bytes], name: str, kind: bytes, mode: int, data: bytes = b"", *, link: str = ""
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size, info.linkname = kind, mode, len(data), link
    output.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    output.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
