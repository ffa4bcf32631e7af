"""The initrd: our init and the kernel modules it loads, as an uncompressed newc cpio archive.

Uncompressed: at 1.4 MiB, single boots under TCG with and without lz4 differed by less than the
noise (2.0-2.9 s), so the simpler form is kept. Equal input gives equal bytes.
The format is cpio(5) "new ASCII".
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from stillframe.model.errors import DamagedData, MissingComponent

# Modules a guest cannot do without on any of our machines; dependencies are added.
REQUIRED_MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "squashfs",
    "overlay",
)
# Taken when the kernel has them as modules: other transports, entropy.
OPTIONAL_MODULES = ("virtio_mmio", "virtio_rng", "vmw_vsock_virtio_transport")

_DEPENDS = re.compile(rb"(?:\0|^)depends=([A-Za-z0-9_,-]*)\0")
_DIRECTORY, _FILE = 0o040755, 0o100644


def cpio_archive(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A newc archive of ``(name, mode, data)``, names relative; always the same bytes.

    Raises ValueError for a name with NUL or data of 4 GiB and more.
    """
    parts: list[bytes] = []
    for inode, (name, mode, data) in enumerate((*entries, ("TRAILER!!!", 0, b""))):
        raw = name.encode() + b"\0"
        if b"\0" in raw[:-1] or len(data) >= 2**32:
            raise ValueError(f"cannot archive {name!r}")
        fields = (inode + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + raw
        parts += [head, b"\0" * (-len(head) % 4), data, b"\0" * (-len(data) % 4)]
    return b"".join(parts)


def module_files(modules_dir: Path) -> dict[str, Path]:
    """All modules below ``/lib/modules/VERSION``, by name with ``-`` written as ``_``."""
    found: dict[str, Path] = {}
    for path in sorted(modules_dir.rglob("*.ko*")):
        name, _, suffix = path.name.partition(".ko")
        if suffix in ("", ".xz"):
            found[name.replace("-", "_")] = path
    return found


def read_module(path: Path) -> bytes:
    """The module's ELF image, decompressed. Raises DamagedData for anything else."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise DamagedData(f"kernel module {path.name} does not decompress") from error
    if not data.startswith(b"\x7fELF"):
        raise DamagedData(f"kernel module {path.name} is not an ELF file", path=str(path))
    return data


def module_dependencies(image: bytes) -> list[str]:
    """Names the module says it needs (``depends=`` of .modinfo), with ``-`` written as ``_``.

    An unpacked package has no modules.dep (depmod runs at installation), so each module is asked.
    """
    match = _DEPENDS.search(image)
    names = match[1].decode().replace("-", "_") if match else ""
    return [name for name in names.split(",") if name]


def builtin_modules(modules_dir: Path) -> set[str]:
    """Modules compiled into the kernel, by name with ``-`` written as ``_``."""
    try:
        lines = (modules_dir / "modules.builtin").read_text().splitlines()
    except FileNotFoundError:
        return set()
    return {Path(line).stem.replace("-", "_") for line in lines}


def select_modules(modules_dir: Path) -> dict[str, bytes]:
    """The modules a guest needs, by name, each after what it depends on.

    Raises MissingComponent when a required one is neither a module nor built in.
    """
    files, builtin = module_files(modules_dir), builtin_modules(modules_dir)
    chosen: dict[str, bytes] = {}

    def add(name: str, required: bool) -> None:
        if name in chosen or name in builtin:
            return
        if name not in files:
            if not required:
                return
            raise MissingComponent(
                f"kernel module {name} is missing",
                hint="run `make setup` to fetch a complete kernel package",
                directory=str(modules_dir),
            )
        image = read_module(files[name])
        for dependency in module_dependencies(image):
            add(dependency, required=True)
        chosen[name] = image

    for name in REQUIRED_MODULES:
        add(name, required=True)
    for name in OPTIONAL_MODULES:
        add(name, required=False)
    return chosen


def build_initrd(agent: bytes, modules: Mapping[str, bytes]) -> bytes:
    """The archive with ``/init``, ``/modules/NAME.ko`` and ``/modules/order`` (load order)."""
    order = "".join(f"{name}.ko\n" for name in modules).encode()
    entries = [
        ("dev", _DIRECTORY, b""),
        ("modules", _DIRECTORY, b""),
        ("init", 0o100755, agent),
        ("modules/order", _FILE, order),
    ]
    entries += [(f"modules/{name}.ko", _FILE, image) for name, image in modules.items()]
    return cpio_archive(entries)
