"""Copies of a running QEMU's disks: a dirty bitmap, and a backup of what it names.

The caller copies the disk's data while the guest runs; what the guest writes meanwhile is noted in
a bitmap (QMP block-dirty-bitmap-add), and copied by QEMU when the guest stands still (QMP
blockdev-backup). The job runs to its end within the pause: a copy-before-write that outlives it
could fail a write of the guest when the copy's file system is full.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillframe.model.errors import StillframeError, StorageFull, VmmFailure
from stillframe.vmm.qemu.qmp import QmpConnection

_PREFIX = "copy-"
_GRANULARITY = 1 << 16  # bytes of disk for each bit
_DEADLINE = 60.0  # seconds for a job


@dataclass(slots=True)
class _Copy:
    """One copy under way. ``name`` is that of its bitmap, node and job."""

    name: str
    done: asyncio.Future[None]


class DiskCopies:
    """The copies under way of one QEMU. All methods raise VmmFailure."""

    def __init__(self, qmp: QmpConnection) -> None:
        self._qmp = qmp
        self._copies: dict[int, _Copy] = {}

    async def begin(self, index: int, copy: Path) -> None:
        """Note changes of disk ``index`` from now on; open ``copy`` for ``finish``."""
        # QEMU's names have at most 31 characters; that of the copy is never used twice.
        name = _PREFIX + hashlib.blake2s(bytes(copy), digest_size=8).hexdigest()
        self._copies[index] = _Copy(name, asyncio.get_running_loop().create_future())
        await self._qmp.execute(
            "block-dirty-bitmap-add",
            **{"node": _node(index), "name": name, "granularity": _GRANULARITY},
        )
        await self._qmp.execute(
            "blockdev-add",
            **{
                "driver": "raw", "node-name": name, "discard": "unmap",
                "file": {"driver": "file", "filename": str(copy)},
            },
        )  # fmt: skip

    async def finish(self, index: int) -> None:
        """Bring the copy up to date. Raises StorageFull."""
        copy = self._copies[index]
        if not await self._changed(index, copy):
            return
        await self._qmp.execute(
            "blockdev-backup",
            **{
                "job-id": copy.name, "device": _node(index), "target": copy.name,
                "sync": "bitmap", "bitmap": copy.name, "bitmap-mode": "never",
            },
        )  # fmt: skip
        try:
            async with asyncio.timeout(_DEADLINE):
                await asyncio.shield(copy.done)
        except TimeoutError as error:
            raise VmmFailure("QEMU does not finish the copy of a disk") from error

    async def _changed(self, index: int, copy: _Copy) -> bool:
        """Whether the bitmap names anything: asking is faster than a job with nothing to do.

        A disk with a limit is no device's own node, and found among all nodes only: that is slower.
        """
        for command, arguments in (
            ("query-block", {}),
            ("query-named-block-nodes", {"flat": True}),
        ):
            for told in await self._qmp.execute(command, **arguments):
                node = told.get("inserted", told)
                if node.get("node-name") == _node(index):
                    for bitmap in node.get("dirty-bitmaps", ()):
                        if bitmap.get("name") == copy.name:
                            return bool(bitmap["count"])
        return True

    def completed(self, data: Mapping[str, Any]) -> None:
        """From the event BLOCK_JOB_COMPLETED."""
        for copy in self._copies.values():
            if copy.name == data["device"] and not copy.done.done():
                if "error" in data:
                    copy.done.set_exception(_failure(data["error"]))
                    copy.done.exception()  # seen, should nobody wait for it
                else:
                    copy.done.set_result(None)

    async def end(self, index: int) -> None:
        """Remove bitmap and node. No error when there are none."""
        copy = self._copies.pop(index, None)
        if copy is None:
            return
        if not copy.done.done():
            copy.done.cancel()
        await self._remove(_node(index), copy.name)

    async def _remove(self, node: str, name: str) -> None:
        await self._attempt("block-dirty-bitmap-remove", {"node": node, "name": name})
        await self._attempt("blockdev-del", {"node-name": name})

    async def _attempt(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Run a command whose refusal means that there is nothing to do."""
        try:
            await self._qmp.execute(command, **arguments)
        except VmmFailure as error:
            if not error.facts.get("refused"):
                raise

    async def forget_all(self) -> None:
        """Remove every copy that somebody else began and did not end: it holds a file open."""
        for job in await self._qmp.execute("query-jobs"):
            if job["id"].startswith(_PREFIX):
                await self._attempt("job-cancel", {"id": job["id"]})
        for node in await self._qmp.execute("query-named-block-nodes", flat=True):
            names = [bitmap.get("name", "") for bitmap in node.get("dirty-bitmaps", ())]
            for name in [*names, node["node-name"]]:
                if name.startswith(_PREFIX):
                    await self._remove(node["node-name"], name)


def _node(index: int) -> str:
    return f"disk{index}"


def _failure(reason: str) -> StillframeError:
    if "No space" in reason or "quota" in reason:
        return StorageFull(
            f"could not copy the disk: {reason}",
            hint="free space in the data directory, or delete snapshots",
        )
    return VmmFailure(f"QEMU could not copy the disk: {reason}")
