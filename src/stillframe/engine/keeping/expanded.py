"""Memory images expanded from compressed payloads: each once, for all who map it.

An expanded image lies in the data directory under the digest of its content. Who needs it gets a
hard link of its own, so that all forks of a compressed snapshot share one image, as they do of a
raw one. The stored payload never changes by it. When the last instance drops its link, the image
goes; the link count says so, so there is nothing to keep in step and nothing to recover.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from stillframe.engine.context import Context
from stillframe.engine.keeping.quota import check_free
from stillframe.host.files import storage_errors
from stillframe.store import compression
from stillframe.store.manifest import damaged, file_entries, read_manifest
from stillframe.store.paths import Payload
from stillframe.store.payloads import image_key, memory_file

log = logging.getLogger("stillframe.expanded")
T = TypeVar("T")


async def cancellable(
    work: Callable[[Callable[[], bool]], T], executor: Executor | None = None
) -> T:
    """Run blocking ``work`` in a thread. When cancelled, tell it so and wait for its end.

    ``work`` is given what says whether it was cancelled.
    """
    stop = threading.Event()
    task = asyncio.get_running_loop().run_in_executor(executor, work, stop.is_set)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([task])
        raise


def link_in_place(source: Path, destination: Path) -> None:
    """Another name for ``source``, in place of whatever has it now. Raises OSError."""
    replacement = destination.with_name(f"{destination.name}.new")
    replacement.unlink(missing_ok=True)
    replacement.hardlink_to(source)
    try:
        replacement.replace(destination)
    except BaseException:
        replacement.unlink(missing_ok=True)
        raise


@dataclass(slots=True, eq=False)
class _Use:
    """How many need an image just now, and the one expansion that all of them wait for."""

    users: int = 0
    making: asyncio.Task[None] | None = None


class ExpandedImages:
    """All expanded images. Used from the event loop's thread only."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._uses: dict[str, _Use] = {}
        self._known: set[str] = set()
        self._endings: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Remove what an earlier server left and nobody maps."""
        for path in self._context.data.expanded.iterdir():
            if path.name.startswith("."):
                path.unlink(missing_ok=True)
            else:
                self._known.add(path.name)
        self.sweep()

    async def close(self) -> None:
        """Wait for what is being removed."""
        if self._endings:
            await asyncio.wait(list(self._endings))

    def path(self, key: str) -> Path:
        """Where the image with that content lies, if it is there."""
        return self._context.data.expanded / key

    async def link(self, payload: Payload, destination: Path) -> None:
        """Give the memory image of ``payload`` the further name ``destination``, raw.

        A compressed one is expanded first, unless an expanded one is there.
        Raises DamagedData, StorageFull, HostFailure, OSError; then nothing is left.
        """
        found = memory_file(payload)
        if found is not None and found[1] is None:
            try:
                link_in_place(found[0], destination)
                return
            except FileNotFoundError:  # it has been compressed since we looked
                found = memory_file(payload)
        if found is None:
            raise damaged(payload.memory.name, "is missing")
        async with self._image(payload, found[0]) as image:
            link_in_place(image, destination)

    async def missing_bytes(self, payload: Payload) -> int:
        """What ``link`` would have to write: nothing for a raw image, or one expanded already.

        Raises DamagedData, OSError.
        """
        found = memory_file(payload)
        if found is None or found[1] is None:
            return 0
        if self.path(await asyncio.to_thread(image_key, payload)).exists():
            return 0
        return await asyncio.to_thread(_data_bytes, found[0])

    def keep(self, key: str) -> None:
        """Count an image that may have been put here as one of ours, unless nobody maps it."""
        self._known.add(key)
        self.sweep()

    def sweep(self) -> None:
        """Remove every image that nobody maps and nobody is about to map."""
        for key in [key for key in self._known if key not in self._uses]:
            path = self.path(key)
            try:
                if path.stat().st_nlink > 1:
                    continue
                self._remove(path)
            except FileNotFoundError:
                pass
            except OSError as error:  # a disk that fails: whoever drops a link is not to suffer
                log.warning("expanded image %s cannot be removed: %s", key, error)
                continue
            self._known.discard(key)

    def _remove(self, path: Path) -> None:
        """Take an image away at once, its bytes soon: large files take a while. Raises OSError."""
        try:
            going = path.rename(path.with_name(f".{path.name}.{self._context.new_id()}"))
        except OSError:
            path.unlink()  # a full disk has no room for another name, and needs these bytes
            return
        task = asyncio.create_task(_unlink(going), name=f"remove {going.name}")
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    @contextlib.asynccontextmanager
    async def _image(self, payload: Payload, compressed: Path) -> AsyncIterator[Path]:
        """The expanded image of a payload, kept in place during the block."""
        key = await asyncio.to_thread(image_key, payload)
        use = self._uses.setdefault(key, _Use())
        use.users += 1
        try:
            await self._made(use, key, payload, compressed)
            yield self.path(key)
        finally:
            use.users -= 1
            if not use.users:
                del self._uses[key]
                self.sweep()

    async def _made(self, use: _Use, key: str, payload: Payload, compressed: Path) -> None:
        """Return when the image is there; one makes it and the others wait."""
        if self.path(key).exists():
            return
        if use.making is None:
            use.making = asyncio.create_task(
                self._make(key, payload, compressed), name=f"expand {key}"
            )
        making = use.making
        try:
            await asyncio.shield(making)
        except BaseException:
            if making.done() or use.users == 1:  # it failed, or nobody waits for it any more
                if use.making is making:
                    use.making = None
                making.cancel()
                await asyncio.wait([making])
            raise

    async def _make(self, key: str, payload: Payload, compressed: Path) -> None:
        self._known.add(key)
        image = self.path(key)
        # Another name each time: one that was called off may still be ending.
        building = image.with_name(f".{key}.{self._context.new_id()}")

        def work(cancelled: Callable[[], bool]) -> None:
            entry = file_entries(read_manifest(payload.manifest))[payload.memory.name]
            done = compression.expand(compressed, building, size=entry.size, cancelled=cancelled)
            if done is not None:
                try:
                    building.rename(image)
                except BaseException:
                    building.unlink(missing_ok=True)
                    raise

        with storage_errors("expand the memory image"):
            check_free(self._context, await asyncio.to_thread(_data_bytes, compressed))
            await cancellable(work)


def _data_bytes(compressed: Path) -> int:
    """What the expanded image will take: frames of zeros become holes."""
    with compression.CompressedReader(compressed) as reader:
        return sum(end - start for start, end in reader.data(0, reader.size))


async def _unlink(path: Path) -> None:
    await asyncio.to_thread(path.unlink, missing_ok=True)
