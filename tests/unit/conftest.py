"""What scenarios of the engine share: one on the fake hypervisor, and nothing left of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.host.orphans import kill_orphans
from support.engine import open_engine


@pytest.fixture
def vms_end(tmp_path: Path) -> Iterator[None]:
    """End the VMs of engines that were closed on purpose, also when their scenario fails."""
    yield
    kill_orphans(tmp_path / "instances", ())


@pytest.fixture
async def engine(tmp_path: Path, vms_end: None) -> AsyncIterator[Engine]:
    """An open engine on the fake hypervisor."""
    async with open_engine(tmp_path) as opened:
        yield opened
