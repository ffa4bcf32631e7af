"""A kernel and an initrd of nobody's, and a snapshot whose memory belongs to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from stillframe.engine.engine import Engine
from stillframe.images.boot import adopt_boot_pair
from stillframe.model.values import Snapshot
from stillframe.store.archive_export import Companion
from support.moving import LIVE, remembering

KERNEL, INITRD = b"kernel" * 300_000, b"initrd" * 100_000
# By the definition in docs/format.md.
_WORDS = b"stillframe boot pair 1\n" + len(KERNEL).to_bytes(8, "little")
PAIR = blake3(_WORDS + KERNEL + INITRD).hexdigest()


def files_of_pair(directory: Path, initrd: bytes = INITRD) -> Companion:
    """The pair as files in the new ``directory``, or one with another ``initrd``."""
    directory.mkdir()
    files = {"kernel": KERNEL, "initrd": initrd}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return Companion(PAIR, {name: directory / name for name in files})


async def with_pair(engine: Engine, scratch: Path) -> Snapshot:
    """A snapshot whose memory belongs to that pair, which is there."""
    files_of_pair(scratch)
    adopt_boot_pair(scratch, engine.context.data.system, PAIR)
    made = await engine.snapshot((await remembering(engine)).id, kind=LIVE)
    made = replace(made, template=replace(made.template, boot=PAIR))
    engine.context.records.update_snapshot(made)
    return made
