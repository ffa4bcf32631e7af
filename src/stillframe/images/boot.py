"""The boot pair: kernel and initrd, kept by digest: memory needs the kernel it was made by."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from stillframe.host.files import remove_at_once, remove_tree, storage_errors
from stillframe.images.initrd import build_initrd, select_modules
from stillframe.model.errors import HostFailure, InvalidRequest, MissingComponent, StorageFull

CONFIG_MAGIC = b"STILLFRAME-CFG1\n"
CONFIG_DISK_BYTES = 1024 * 1024

# quiet/loglevel keep the console for the workload; panic=-1 and reboot=t end a broken guest at
# once; the rest leaves out probes and self-tests of no use here (gain of each not measured).
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t rdinit=/init mitigations=off "
    "no_timer_check tsc=reliable random.trust_cpu=on audit=0 8250.nr_uarts=1 "
    "i8042.noaux i8042.nokbd cryptomgr.notests"
)


@dataclass(frozen=True, slots=True)
class BootPair:
    """A kernel and its initrd; ``digest`` names both, ``arguments`` is the kernel command line."""

    digest: str
    kernel: Path
    initrd: Path
    arguments: str


@dataclass(frozen=True, slots=True)
class KernelTree:
    """An unpacked kernel package: the bzImage, its modules directory and its version."""

    image: Path
    modules: Path
    version: str


def _missing(what: str, path: Path) -> MissingComponent:
    return MissingComponent(
        f"{what} is missing", hint="run `make setup` to fetch and build it", path=str(path)
    )


def find_kernel(kernel_dir: Path) -> KernelTree:
    """The newest kernel in an unpacked Debian package (``boot/vmlinuz-V``, ``lib/modules/V``).

    Raises MissingComponent when there is none with modules.
    """
    for image in sorted(kernel_dir.glob("boot/vmlinuz-*"), reverse=True):
        version = image.name.removeprefix("vmlinuz-")
        for root in (kernel_dir / "lib/modules", kernel_dir / "usr/lib/modules"):
            if (root / version).is_dir():
                return KernelTree(image, root / version, version)
    raise _missing("the guest kernel", kernel_dir)


def build_boot_pair(kernel_dir: Path, agent_binary: Path, destination_root: Path) -> BootPair:
    """Make ``destination_root/DIGEST/{kernel,initrd}`` once, durably, and return it.

    The digest is over both files, so an existing directory of that name is already the answer.
    Raises MissingComponent (kernel, module or agent absent), StorageFull, HostFailure.
    """
    tree = find_kernel(kernel_dir)
    try:
        agent = agent_binary.read_bytes()
    except OSError as error:
        raise _missing("the guest agent", agent_binary) from error
    kernel = tree.image.read_bytes()
    initrd = build_initrd(agent, select_modules(tree.modules))
    digest = _digest_of(kernel, initrd)
    try:
        if not (destination_root / digest).is_dir():
            _publish(destination_root, digest, {"kernel": kernel, "initrd": initrd})
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("no space for the boot pair", path=str(destination_root)) from error
        raise HostFailure(f"cannot write the boot pair: {error}") from error
    return load_boot_pair(destination_root, digest)


def _digest_of(kernel: bytes, initrd: bytes) -> str:
    hasher = blake3(b"stillframe boot pair 1\n" + struct.pack("<Q", len(kernel)))
    return hasher.update(kernel).update(initrd).hexdigest()


def adopt_boot_pair(directory: Path, destination_root: Path, digest: str) -> BootPair:
    """Keep the pair of files ``kernel`` and ``initrd`` in ``directory``, durably, under its digest.

    One that is there already stays. Raises InvalidRequest when the files have another digest,
    StorageFull, HostFailure.
    """
    try:
        files = {name: (directory / name).read_bytes() for name in ("kernel", "initrd")}
        if _digest_of(files["kernel"], files["initrd"]) != digest:
            raise InvalidRequest("the kernel and initrd are not those that their digest names")
        if not (destination_root / digest).is_dir():
            _publish(destination_root, digest, files)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("no space for the boot pair", path=str(destination_root)) from error
        raise HostFailure(f"cannot keep the boot pair: {error}") from error
    return load_boot_pair(destination_root, digest)


def sweep_boot_pairs(destination_root: Path) -> None:
    """Remove pairs that an interrupted server left half-made; nobody may be making one.

    Raises HostFailure.
    """
    with storage_errors("sweep the boot pairs"):
        for leftover in destination_root.glob(".new-*"):
            remove_tree(leftover)


def remove_boot_pair(destination_root: Path, digest: str) -> None:
    """Remove a pair that nobody needs; none is fine. Raises OSError."""
    # What a crash leaves of it goes as if it were half-made.
    remove_at_once(destination_root / digest, destination_root / f".new-{digest}")


def load_boot_pair(destination_root: Path, digest: str) -> BootPair:
    """The pair built earlier. Raises MissingComponent (gone), InvalidRequest (malformed digest)."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise InvalidRequest("a boot pair is named by 64 hexadecimal digits")
    directory = destination_root / digest
    pair = BootPair(digest, directory / "kernel", directory / "initrd", KERNEL_ARGUMENTS)
    for path in (pair.kernel, pair.initrd):
        if not path.is_file():
            raise _missing(f"the boot pair {digest[:12]}", path)
    return pair


def write_config_disk(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write the guest's third disk (docs/agent-protocol.md), always 1 MiB, replacing the file.

    Not fsynced: it is written anew for each boot. Mode 0600, since it carries environment and
    seed. Raises what ``boot_configuration`` raises, StorageFull, HostFailure.
    """
    data = boot_configuration(pairs)
    beside = path.with_name(path.name + ".new")
    with ExitStack() as undo:
        undo.callback(beside.unlink, missing_ok=True)
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.truncate(CONFIG_DISK_BYTES)
            beside.replace(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull("no space for the config disk", path=str(path)) from error
            raise HostFailure(f"cannot write the config disk: {error}") from error


def boot_configuration(pairs: Iterable[tuple[str, str]]) -> bytes:
    """What the configuration disk holds before its zeros.

    Raises InvalidRequest when the pairs do not fit or contain NUL.
    """
    parts = [part.encode("utf-8", "surrogateescape") for pair in pairs for part in pair]
    if any(b"\0" in part for part in parts):
        raise InvalidRequest("environment and command cannot contain NUL")
    body = b"".join(part + b"\0" for part in parts)
    if len(body) + len(CONFIG_MAGIC) + 4 > CONFIG_DISK_BYTES:
        raise InvalidRequest("environment and command are too large for the guest", size=len(body))
    return CONFIG_MAGIC + struct.pack("<I", len(body)) + body


def _publish(root: Path, digest: str, files: dict[str, bytes]) -> None:
    """Build the directory beside and rename it; losing a race to an equal one is success."""
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        beside = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
        undo.callback(shutil.rmtree, beside, ignore_errors=True)
        for name, data in files.items():
            with (beside / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        beside.chmod(0o755)
        _sync_directory(beside)
        try:
            beside.rename(root / digest)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        _sync_directory(root)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
