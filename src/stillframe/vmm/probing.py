"""A probe that is made once, whoever asks, and never raises for an absent hypervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from stillframe.model.errors import StillframeError
from stillframe.model.values import Hypervisor
from stillframe.vmm.driver import DriverProbe, Limit

_FEATURES = ("fork", "pause", "snapshots", "standby")  # what every driver here offers


def features(limits: frozenset[Limit]) -> tuple[str, ...]:
    """The contract's feature ids of a driver that can limit this."""
    return (*(["disk-io-limit"] if Limit.DISK in limits else []), *_FEATURES)


class ProbeOnce:
    """The finding of ``examine`` about a hypervisor; its error is why that is unavailable."""

    def __init__(
        self, hypervisor: Hypervisor, examine: Callable[[], Awaitable[DriverProbe]]
    ) -> None:
        self._hypervisor, self._examine = hypervisor, examine
        self._turn = asyncio.Lock()
        self._found: DriverProbe | None = None

    async def __call__(self) -> DriverProbe:
        """The finding, made by whoever asks first."""
        async with self._turn:
            if self._found is None:
                try:
                    self._found = await self._examine()
                except StillframeError as error:
                    self._found = DriverProbe(
                        self._hypervisor, False, reason=error.message, hint=error.hint
                    )
            return self._found
