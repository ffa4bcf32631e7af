"""The memory of a running VMM, seen from outside: which pages differ, and what is in them.

A VMM maps its guest's memory image privately (MAP_PRIVATE), so a page the guest has written is an
anonymous page and an untouched one still belongs to the file. The kernel tells which is which:

* ``PAGEMAP_SCAN`` (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst) returns ranges at once;
* ``/proc/PID/pagemap`` works everywhere: bit 63 present, 62 swapped, 61 file-backed.

Where writes are tracked (``tracker/tracker.c``), ``PAGEMAP_SCAN`` also tells which pages were
written since it was last asked, and asks the kernel to watch them again, in one atomic step. So
memory can be copied while the guest runs, round after round, and nothing is missed. Asked for
nothing else, the kernel has a path (fs/proc/task_mmu.c, pagemap_scan_pmd_entry) that looks at page
tables only, not at what each page is: a fraction of the time, which counts while the guest stands
still. It takes a page that is not there for a written one, so it is for stretches of memory that
are known to be private throughout.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from stillframe.host.runs import Runs
from stillframe.model.errors import HostFailure, MissingComponent

PAGE = mmap.PAGESIZE
_MADV_POPULATE_WRITE = 23  # linux/mman.h, Linux 5.14
_PAGEMAP_SCAN = 0xC0606610  # linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), 96 bytes
_WP_MATCHING, _CHECK_WPASYNC = 1 << 0, 1 << 1  # PM_SCAN_*: protect what is found; only if tracked
_IS_WRITTEN, _IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_SCAN_ARGUMENT = struct.Struct("<12Q")
_REGION_WORDS = 3  # struct page_region: start, end, categories
_REGIONS_PER_CALL = 8192
# What a kernel that lacks the ioctl, or a flag of it, answers.
_NOT_OFFERED = (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP)
# Top byte of a pagemap entry -> 1 when the page is private to the process (see module docstring).
_PRIVATE = bytes(int(bool(top & 0xC0) and not top & 0x20) for top in range(256))
_PRIVATE_RUN = re.compile(rb"\x01+")
_MAPS_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$", re.M
)
_DENSE = 8 << 20  # bytes of private memory in one stretch, from which on a scan of its own pays
_VECTORS_PER_CALL = 1024  # UIO_MAXIOV
_BYTES_PER_CALL = 1 << 30  # a call moves less than 2 GiB (MAX_RW_COUNT)


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where a process maps an image: addresses ``start`` to ``end``, image offset of ``start``."""

    start: int
    end: int
    offset: int

    @property
    def shift(self) -> int:
        """What to add to an offset of the image for the address."""
        return self.start - self.offset


def find_mappings(pid: int, image: Path) -> list[Mapping]:
    """Where process ``pid`` maps ``image`` privately, found by device and inode in /proc/PID/maps.

    They are sorted by offset. A VMM may map its image in parts (guest memory has a gap below
    4 GiB), and the kernel may show one mapping in several pieces.
    Raises HostFailure when there is none, or a page is mapped twice; MissingComponent when we may
    not look.
    """
    status = image.stat()
    with _process_errors(pid):
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    path = os.fsencode(image)
    found: list[Mapping] = []
    for match in _MAPS_LINE.finditer(maps):
        start, end, flags, offset, major, minor, inode, name = match.groups()
        if not flags.endswith(b"p") or int(inode) != status.st_ino:
            continue
        device = os.makedev(int(major, 16), int(minor, 16))
        # Some file systems (btrfs, overlayfs) show another device number here than stat does.
        if device == status.st_dev or name == path or _is_seen_as(pid, name, status):
            found.append(Mapping(int(start, 16), int(end, 16), int(offset, 16)))
    if not found:
        raise HostFailure(f"the VMM (process {pid}) does not map its memory image", pid=pid)
    found.sort(key=lambda mapping: mapping.offset)
    for one, other in pairwise(found):
        if other.offset < one.offset + one.end - one.start:
            raise HostFailure(f"the VMM (process {pid}) maps its memory image twice", pid=pid)
    return found


def _is_seen_as(pid: int, name: bytes, status: os.stat_result) -> bool:
    """Whether the process, whose root may be another, sees the file of ``status`` as ``name``."""
    try:
        seen = os.stat(b"/proc/%d/root%s" % (pid, name))  # noqa: PTH116 - not text
    except OSError:
        return False
    return (seen.st_dev, seen.st_ino) == (status.st_dev, status.st_ino)


class GuestMemory:
    """The memory of the VMM ``pid`` that maps ``image``. A context manager; blocking calls.

    Offsets are those of the image. All methods raise HostFailure when the VMM is gone,
    MissingComponent when this user may not look at it.
    """

    def __init__(self, pid: int, image: Path) -> None:
        self.pid = pid
        self._mappings = find_mappings(pid, image)
        with _process_errors(pid):
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self.tracked = self._is_tracked()
        self._dense = Runs()  # private throughout: a page never becomes the file's again

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop looking."""
        os.close(self._pagemap)

    def _is_tracked(self) -> bool:
        """Whether the kernel tracks writes: asked of one page, without protecting any."""
        start = self._mappings[0].start
        try:
            scan_ioctl(self._pagemap, start, start + PAGE, PRIVATE, flags=_CHECK_WPASYNC)
        except OSError as error:
            if error.errno in (*_NOT_OFFERED, errno.EPERM):  # EPERM: not enabled for this mapping
                return False
            raise self._failed(error) from error
        return True

    def private_pages(self) -> Runs:
        """Every page that the process has written since it mapped the image.

        Once this was asked, ``written_pages`` takes less time.
        """
        try:
            found = self._scan(PRIVATE)
            self._dense = Runs.of((low, high) for low, high in found if high - low >= _DENSE)
            return found
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise self._failed(error) from error
        return Runs.of(
            (start - mapping.shift, end - mapping.shift)
            for mapping in self._mappings
            for start, end in scan_pagemap(self._pagemap, mapping.start, mapping.end)
        )

    def written_pages(self) -> Runs:
        """The pages written since this was last asked; the first time as ``private_pages``.

        Only where ``tracked``. Each page is found once: a write that comes later, even while this
        looks, is found the next time.
        """
        found, flags = Runs(), _WP_MATCHING | _CHECK_WPASYNC
        try:
            for mapping in self._mappings:
                position, shift = mapping.start, mapping.shift
                for low, high in self._dense:
                    start, end = low + shift, high + shift
                    if mapping.start <= start and end <= mapping.end:
                        self._scan_into(
                            found, shift, position, start, wanted=PRIVATE_WRITTEN, flags=flags
                        )
                        self._scan_into(found, shift, start, end, wanted=_WRITTEN, flags=flags)
                        position = end
                self._scan_into(
                    found, shift, position, mapping.end, wanted=PRIVATE_WRITTEN, flags=flags
                )
        except OSError as error:
            raise self._failed(error) from error
        return found

    def _scan(self, wanted: Categories) -> Runs:
        found = Runs()
        for mapping in self._mappings:
            self._scan_into(found, mapping.shift, mapping.start, mapping.end, wanted=wanted)
        return found

    def _scan_into(
        self, found: Runs, shift: int, start: int, end: int, *, wanted: Categories, flags: int = 0
    ) -> None:
        """Add what is found at addresses ``start`` to ``end``, as offsets of the image."""
        starts, ends = scan_ioctl(self._pagemap, start, end, wanted, flags=flags)
        found.starts.extend(map((-shift).__add__, starts))
        found.ends.extend(map((-shift).__add__, ends))

    def _addresses(self, runs: Runs) -> tuple[array[int], array[int]]:
        """Addresses and lengths of ``runs``, cut where one mapping ends and the next begins."""
        shifts = {mapping.shift for mapping in self._mappings}
        if len(shifts) == 1:
            return array("Q", map(shifts.pop().__add__, runs.starts)), runs.lengths
        addresses, lengths = array("Q"), array("Q")
        for start, end in runs:
            for mapping in self._mappings:
                low = max(start + mapping.shift, mapping.start)
                high = min(end + mapping.shift, mapping.end)
                if low < high:
                    addresses.append(low)
                    lengths.append(high - low)
        return addresses, lengths

    def read(self, runs: Runs, buffer: mmap.mmap) -> None:
        """Copy the pages of ``runs`` into ``buffer``, one run after another.

        The pages may be written meanwhile: what is read of them then is of no moment in time.
        """
        addresses, lengths = self._addresses(runs)
        remote = array("Q", bytes(16 * len(addresses)))
        remote[0::2], remote[1::2] = addresses, lengths
        target = ctypes.c_char.from_buffer(buffer)
        try:
            self._read_vectors(remote, ctypes.addressof(target), len(addresses))
        except OSError as error:
            raise self._failed(error) from error
        finally:
            del target  # or the buffer could not be closed

    def _read_vectors(self, remote: array[int], target: int, count: int) -> None:
        """``remote`` is address and length of each run, alternating; process_vm_readv(2)."""
        base, _ = remote.buffer_info()
        local = array("Q", [0, 0])
        local_address, _ = local.buffer_info()
        first = 0
        while first < count:
            last = min(count, first + _VECTORS_PER_CALL)
            local[0], local[1] = target, _BYTES_PER_CALL
            done = _LIBC.process_vm_readv(
                self.pid, local_address, 1, base + 16 * first, last - first, 0
            )
            if done < 0:
                raise OSError(ctypes.get_errno(), "process_vm_readv")
            if done == 0:
                raise OSError(errno.EIO, "process_vm_readv")
            target += done
            while first < last and done >= remote[2 * first + 1]:
                done -= remote[2 * first + 1]
                first += 1
            if done:  # in the middle of a run
                remote[2 * first] += done
                remote[2 * first + 1] -= done

    def _failed(self, error: OSError) -> HostFailure | MissingComponent:
        return _translated(error, self.pid)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    word, pointer = ctypes.c_ulong, ctypes.c_void_p
    libc.process_vm_readv.argtypes = [ctypes.c_int, pointer, word, pointer, word, word]
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    return libc


_LIBC = _libc()


@dataclass(frozen=True, slots=True)
class Categories:
    """Which pages PAGEMAP_SCAN is to find, in the words of struct pm_scan_arg (``*_mask``)."""

    inverted: int
    required: int
    any_of: int
    returned: int


PRIVATE = Categories(_IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_FILE)
PRIVATE_WRITTEN = Categories(_IS_FILE, _IS_FILE | _IS_WRITTEN, _IS_PRESENT | _IS_SWAPPED, _IS_FILE)
_WRITTEN = Categories(0, _IS_WRITTEN, 0, _IS_WRITTEN)  # exactly what takes the kernel's fast path


def scan_ioctl(
    pagemap: int, start: int, end: int, wanted: Categories, *, flags: int = 0
) -> tuple[array[int], array[int]]:
    """Starts and ends of the address ranges whose pages are ``wanted``.

    Raises OSError: ENOTTY before Linux 6.7, EPERM when ``flags`` want tracking and there is none.
    """
    vector = array("Q", bytes(8 * _REGION_WORDS * _REGIONS_PER_CALL))
    address, _ = vector.buffer_info()
    starts, ends = array("Q"), array("Q")
    position = start
    while position < end:
        argument = bytearray(
            _SCAN_ARGUMENT.pack(
                _SCAN_ARGUMENT.size, flags, position, end, 0, address, _REGIONS_PER_CALL, 0,
                wanted.inverted, wanted.required, wanted.any_of, wanted.returned,
            )
        )  # fmt: skip
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        words = _REGION_WORDS * count
        starts.extend(vector[0:words:_REGION_WORDS])
        ends.extend(vector[1:words:_REGION_WORDS])
        if count < _REGIONS_PER_CALL:
            break  # walk_end does not say so: it stays where the kernel's own buffer last filled up
        position = max(_SCAN_ARGUMENT.unpack(argument)[4], ends[-1])  # walk_end
    return starts, ends


def scan_pagemap(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Private address ranges by reading /proc/PID/pagemap, 8 bytes a page."""
    position = start
    while position < end:
        pages = min((end - position) // PAGE, 1 << 17)
        entries = os.pread(pagemap, pages * 8, position // PAGE * 8)
        if len(entries) < 8:
            raise HostFailure("the page map ended early")
        marks = entries[7::8].translate(_PRIVATE)
        for run in _PRIVATE_RUN.finditer(marks):
            yield position + run.start() * PAGE, position + run.end() * PAGE
        position += len(marks) * PAGE


def make_buffer(size: int) -> mmap.mmap:
    """Anonymous memory of at least ``size`` bytes, already backed by the host.

    Faulting a buffer in costs as much as filling it, so it is made before the pause.
    """
    buffer = mmap.mmap(-1, max(size, PAGE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # before Linux 5.14 whoever fills it pays for it
        buffer.madvise(_MADV_POPULATE_WRITE)
    return buffer


@contextlib.contextmanager
def _process_errors(pid: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _translated(error, pid) from error


def _translated(error: OSError, pid: int) -> HostFailure | MissingComponent:
    if error.errno in (errno.EPERM, errno.EACCES):
        return MissingComponent(
            f"not allowed to read the memory of process {pid}",
            hint="run the server as the user that owns the VMs, or grant CAP_SYS_PTRACE",
        )
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return HostFailure(f"the VMM (process {pid}) is gone", pid=pid)
    reason = os.strerror(error.errno) if error.errno else str(error)
    return HostFailure(f"reading the memory of process {pid} failed: {reason}", pid=pid)
