"""What a process has open."""

from __future__ import annotations

import contextlib
import os
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


def descriptors() -> Counter[str]:
    """How many of a kind this process has open: sockets, pidfds, files by path, and so on."""
    found: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[str(link.readlink()).split(":[")[0]] += 1
    return found


@contextlib.contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """This process may open only so many more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 - few names
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def no_descriptors(*, but: int) -> Iterator[None]:
    """This process has only so many free, those between others counted too."""
    with few_descriptors(2), contextlib.ExitStack() as held:
        taken: list[int] = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for fd in taken[: len(taken) - but]:
            held.callback(os.close, fd)
        for fd in taken[len(taken) - but :]:
            os.close(fd)
        yield
