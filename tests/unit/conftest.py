"""What scenarios of the engine share: one on the fake hypervisor, and nothing left of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from stillframe.engine.engine import Engine
from stillframe.host.orphans import kill_orphans
from support.clock import SetClock
from support.engine import make_engine, open_engine


@pytest.fixture
def vms_end(tmp_path: Path) -> Iterator[None]:
    """End the VMs of engines that were closed on purpose, also when their scenario fails."""
    yield
    kill_orphans(tmp_path / "instances", ())


@pytest.fixture
def clock() -> SetClock:
    """A clock that the scenario sets; where it is used, it is the one of ``engine``."""
    return SetClock()


@pytest.fixture
async def engine(
    request: pytest.FixtureRequest, tmp_path: Path, vms_end: None
) -> AsyncIterator[Engine]:
    """An open engine on the fake hypervisor."""
    closed = make_engine(tmp_path)
    if "clock" in request.fixturenames:
        request.getfixturevalue("clock").rule(closed)
    async with open_engine(tmp_path, closed) as opened:
        yield opened
