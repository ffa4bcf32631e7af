"""Logs of instances: read by lines, followed, and kept from growing without bound.

A guest writes what it likes to its console, and its VMM appends that to a file which it holds open.
A log that has grown too large is therefore copied, its last part only, to ``NAME.log.1``, and then
emptied in place: whoever appends (O_APPEND) goes on at its beginning. What is written between the
last byte copied and the emptying, which are two system calls, is lost.

Places in a log are counted on over such a cut, so that one who follows it misses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stillframe.host.files import new_file, open_regular, storage_errors
from stillframe.host.watch import file_changes
from stillframe.model.errors import HostFailure, InvalidRequest, NotFound

if TYPE_CHECKING:
    from stillframe.engine.context import Context

log = logging.getLogger("stillframe.logs")
LOG_SOURCES = ("app", "vmm", "hypeman")
_BLOCK = 1 << 16
_MAX_LINE = 1 << 16
_ROUNDS = 8
_MAX_TAIL = 64 << 20  # bytes that are searched for the last lines


def kept_part(path: Path) -> Path:
    """Where the older part of a log is kept after a cut."""
    return path.with_name(f"{path.name}.1")


def last_bytes(path: Path, count: int) -> bytes:
    """The last bytes of a log, from before a cut too; none if there is no log."""
    found = b""
    for part in (path, kept_part(path)):
        with contextlib.suppress(OSError), _opened(part) as fd:
            size = _size(fd)
            wanted = min(size, count - len(found))
            found = os.pread(fd, wanted, size - wanted) + found
    return found


class Logs:
    """The logs of all instances. Used from the event loop's thread only."""

    def __init__(self, context: Context) -> None:
        """``start`` has them looked after."""
        self._context = context
        self._cut: dict[Path, int] = {}  # bytes cut off a log since this server started
        self._changing = threading.Lock()  # held while a log is read, and while it is cut

    # -- keeping ------------------------------------------------------------------------------
    def start(self) -> None:
        """Look at the sizes of logs now and then, as the settings say."""
        self._context.spawn(self._look_for_ever(), name="logs")

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._context.settings.log_check_seconds)
            await self.look()

    async def look(self) -> None:
        """Cut every log of a running instance that is larger than the settings allow.

        Instances that a verb is at are left for the next look.
        """
        for path in [path for path in self._cut if not path.exists()]:  # deleted meanwhile
            del self._cut[path]
        for instance_id in list(self._context.live):
            paths = self._context.data.instance(instance_id)
            large = [path for path in map(paths.log, LOG_SOURCES) if self._too_large(path)]
            if not large or self._context.held(instance_id):
                continue
            try:
                async with self._context.exclusive(instance_id, "cut logs"):
                    for path in large:
                        await self._shorten(path)
            except NotFound:
                continue
            except HostFailure as error:  # it is looked at again
                log.warning("the logs of %s cannot be shortened: %s", instance_id, error)

    def _too_large(self, path: Path) -> bool:
        try:
            return path.lstat().st_size > self._context.settings.max_log_bytes
        except OSError:
            return False

    async def _shorten(self, path: Path) -> None:
        try:
            with storage_errors("cut a log"):
                await asyncio.to_thread(self._cut_off, path)
        except HostFailure as error:  # it is looked at again
            log.warning("%s cannot be shortened: %s", path, error)

    def _cut_off(self, path: Path) -> None:
        # Not beside it: restoring in place takes all that lies there along.
        copy = path.parent.parent / f"{path.name}.new"
        copy.unlink(missing_ok=True)  # an interrupted server's
        with _opened(path, os.O_RDWR) as source, new_file(copy) as target:
            place = max(0, _size(source) - self._context.settings.max_log_bytes)
            if place:  # begin with a whole line
                place += os.pread(source, _MAX_LINE, place).find(b"\n") + 1
            place = _append(source, target, place)
            with self._changing:
                for _ in range(_ROUNDS):  # little is left, unless the guest is faster than we are
                    if _size(source) == place:
                        break
                    place = _append(source, target, place)
                copy.replace(kept_part(path))  # after a crash here it is there twice, not never
                os.ftruncate(source, 0)
                self._cut[path] = self._cut.get(path, 0) + place

    # -- reading ------------------------------------------------------------------------------
    async def lines(
        self, instance_id: str, *, source: str, tail: int, follow: bool
    ) -> AsyncIterator[str]:
        """The last ``tail`` lines of a log and, with ``follow``, every later one until deletion.

        A line that is not finished is shown when nothing can follow it any more. Raises
        InvalidRequest, NotFound (code ``log_not_found``).
        """
        if source not in LOG_SOURCES:
            raise InvalidRequest(f"log source must be one of {', '.join(LOG_SOURCES)}")
        self._context.instance(instance_id)
        path = self._context.data.instance(instance_id).log(source)
        try:
            found, rest, place = await asyncio.to_thread(self._tail, path, tail)
            if not follow:
                for line in _with_rest(found, rest, tail):
                    yield line
                return
            async with file_changes(path) as changed:
                for line in found:
                    yield line
                async for line in self._follow(path, rest, place, changed):
                    yield line
        except FileNotFoundError as error:
            raise NotFound(f"no {source} log", code="log_not_found") from error

    async def _follow(
        self, path: Path, partial: bytes, place: int, changed: asyncio.Event
    ) -> AsyncIterator[str]:
        with contextlib.suppress(FileNotFoundError):  # the instance has been deleted
            while path.exists():
                changed.clear()
                block, place = await asyncio.to_thread(self._read, path, place)
                *whole, partial = (partial + block).split(b"\n")
                for raw in whole:
                    yield _text(raw)
                if len(partial) > _MAX_LINE:  # a guest may never end its line
                    yield _text(partial)
                    partial = b""
                if not block:
                    await changed.wait()
        if partial:
            yield _text(partial)

    def _tail(self, path: Path, count: int) -> tuple[list[str], bytes, int]:
        """The last ``count`` whole lines, what follows them, and the place where that ends."""
        blocks, size, newlines = list[bytes](), 0, 0
        with self._changing, _opened(path) as newer, _opened_if_there(kept_part(path)) as older:
            start = _size(newer)
            end = self._cut.get(path, 0) + start
            for fd in (newer, older):
                start = 0 if fd is None else _size(fd)
                while fd is not None and start > 0 and newlines <= count and size < _MAX_TAIL:
                    step = min(_BLOCK, start)
                    start -= step
                    blocks.append(os.pread(fd, step, start))
                    size += step
                    newlines += blocks[-1].count(b"\n")
        whole, _, rest = b"".join(reversed(blocks)).rpartition(b"\n")
        lines = deque(whole.split(b"\n") if whole else (), maxlen=count)
        return [_text(line) for line in lines], rest, end

    def _read(self, path: Path, place: int) -> tuple[bytes, int]:
        """A block of a log from a place on, if there is any, and the place behind it.

        What was cut off and not kept is passed over.
        """
        with self._changing, _opened(path) as newer, _opened_if_there(kept_part(path)) as older:
            cut = self._cut.get(path, 0)
            if place > cut + _size(newer):  # somebody else has emptied it
                place = cut
            if place < cut:
                kept = 0 if older is None else _size(older)
                place = max(place, cut - kept)
                if older is not None and place < cut:
                    block = os.pread(older, _BLOCK, place - (cut - kept))
                    return block, place + len(block)
            block = os.pread(newer, _BLOCK, place - cut)
            return block, place + len(block)


def _size(fd: int) -> int:
    return os.fstat(fd).st_size


def _append(source: int, target: int, place: int) -> int:
    """Append what a log has now from ``place`` on; where that ends. Raises OSError."""
    end = _size(source)
    while place < end and (block := os.pread(source, min(_BLOCK, end - place), place)):
        place += os.write(target, block)
    return place


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A log, which a VMM could have put anything in the place of. Raises OSError."""
    fd = open_regular(path, flags=flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened_if_there(path: Path) -> Iterator[int | None]:
    with contextlib.ExitStack() as opened:
        fd = None
        with contextlib.suppress(OSError):
            fd = opened.enter_context(_opened(path))
        yield fd


def _with_rest(found: list[str], rest: bytes, count: int) -> list[str]:
    """The last ``count`` lines, where the last one need not be finished."""
    lines = [*found, _text(rest[-_MAX_LINE:])] if rest else found
    return lines[-count:] if count else []


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\r").decode("utf-8", "replace")
