"""What this host has: processors, memory, the speed of its network; and what a process holds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_MEMORY_TOTAL = re.compile(r"^MemTotal:\s+(\d+) kB$", re.MULTILINE)
_PRIVATE = re.compile(r"^(?:RssAnon|VmSwap):\s+(\d+) kB$", re.MULTILINE)
_DEFAULT_ROUTE = re.compile(r"^(\S+)\t00000000\t", re.MULTILINE)
# The lines of /proc/cpuinfo (x86) that say what a guest may execute on it; all processors agree.
_PROCESSOR = re.compile(r"^(vendor_id|cpu family|model|flags)\s*: (.*)$", re.MULTILINE)
_MEGABIT_BYTES = 10**6 // 8


def processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The host's processor as guests under KVM see it: vendor, family, model, digest of its flags.

    Empty where the kernel does not tell. Equal texts are processors that memory may move between.
    """
    told: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for name, value in _PROCESSOR.findall(cpuinfo.read_text(encoding="utf-8")):
            told.setdefault(name, value)
    if not {"vendor_id", "cpu family", "model", "flags"} <= told.keys():
        return ""
    flags = " ".join(sorted(told["flags"].split()))
    digest = hashlib.blake2s(flags.encode(), digest_size=8).hexdigest()
    return f"{told['vendor_id']} family {told['cpu family']} model {told['model']} flags {digest}"


def memory_bytes() -> int:
    """Usable memory of the host (MemTotal of /proc/meminfo)."""
    match = _MEMORY_TOTAL.search(Path("/proc/meminfo").read_text(encoding="ascii"))
    return int(match[1]) * 1024 if match else 0


def network_bytes_per_second() -> int:
    """Speed of the link with the default route; 0 where the kernel does not know it."""
    with contextlib.suppress(OSError, ValueError):
        routes = Path("/proc/net/route").read_text(encoding="ascii")
        if (match := _DEFAULT_ROUTE.search(routes)) is not None:
            speed = Path("/sys/class/net", match[1], "speed").read_text(encoding="ascii")
            return max(0, int(speed)) * _MEGABIT_BYTES
    return 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a network device has received and sent."""

    received: int
    sent: int


def device_traffic(pid: int, device: str) -> Traffic | None:
    """What a network device in the namespace of a process has counted (/proc/PID/net/dev, proc(5)).

    None when there is no such device, and for a process that is gone.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/net/dev").read_text(encoding="ascii").splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == device:
                columns = counts.split()
                return Traffic(received=int(columns[0]), sent=int(columns[8]))
    return None


def private_bytes(pid: int) -> int:
    """Memory a process holds for itself: anonymous pages as the kernel counts them, swapped or not.

    Zero for a process that is gone.
    """
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        return sum(int(kilobytes) for kilobytes in _PRIVATE.findall(status)) * 1024
    return 0
