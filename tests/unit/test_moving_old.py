"""Snapshots of manifest format 1, which have no digests, get them when they are to leave."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from stillframe.engine.interface import ForkRequest
from stillframe.model.errors import DamagedData
from stillframe.model.values import Snapshot
from stillframe.model.verification import Depth
from stillframe.store.manifest import encode_document, read_manifest
from stillframe.store.paths import Payload
from stillframe.store.payloads import check, measure
from support.engine import ask, open_engine
from support.moving import LIVE, archive_of, remembering, take
from support.payloads import flip


def made_old(payload: Payload) -> None:
    """Turn a payload into what format 1 had: names and sizes, and facts."""
    manifest = json.loads(payload.manifest.read_bytes())
    del manifest["blake3"]
    files = {name: {"size": entry["size"]} for name, entry in manifest.pop("files").items()}
    payload.manifest.write_bytes(encode_document({**manifest, "format": 1, "files": files}))
    for name in files:
        payload.table(name).unlink(missing_ok=True)
    assert check(payload)["format"] == 1


@pytest.mark.parametrize("interrupted", [False, True])
async def test_an_old_snapshot_gets_its_digests_and_goes_on_elsewhere(
    tmp_path: Path, interrupted: bool
) -> None:
    async with open_engine(tmp_path / "here") as here, open_engine(tmp_path / "there") as there:
        await there.context.images.ensure("stillframe/base")
        made = await here.snapshot((await remembering(here)).id, kind=LIVE)
        payload = here.context.data.snapshot(made.id)
        made_old(payload)
        if interrupted:  # a table that nobody vouches for
            payload.table("memory").write_bytes(b"half a table")
        one, other = await asyncio.gather(archive_of(here, made), archive_of(here, made))
        assert read_manifest(payload.manifest)["format"] == 2
        size = measure(payload)
        told: Snapshot = here.find_snapshot(made.id)
        assert (told.size_bytes, told.stored_bytes) == (size.size, size.stored)
        assert (await here.verify_snapshot(made.id, Depth.FULL)).unchecked == ()
        for number, data in enumerate((one, other)):
            arrived = await take(there, data, name=f"copy-{number}")
            fork = await there.fork_snapshot(arrived.id, ForkRequest(f"fork-{number}"))
            assert await ask(there, fork.id, "get", "who") == "source"


async def test_what_was_damaged_before_is_found_by_its_size_only_and_after_by_its_digest(
    tmp_path: Path,
) -> None:
    async with open_engine(tmp_path) as here:
        made = await here.snapshot((await remembering(here)).id, kind=LIVE)
        payload = here.context.data.snapshot(made.id)
        made_old(payload)
        with payload.devices.open("ab") as file:
            file.write(b"?")
        with pytest.raises(DamagedData):
            await archive_of(here, made)
        payload.devices.write_bytes(payload.devices.read_bytes()[:-1])
        assert await archive_of(here, made)
        flip(payload.devices, 0)
        with pytest.raises(DamagedData):
            await archive_of(here, made)
