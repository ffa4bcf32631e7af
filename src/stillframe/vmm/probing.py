"""A probe that is made once, whoever asks, and never raises for an absent hypervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from stillframe.model.errors import StillframeError
from stillframe.model.values import Hypervisor
from stillframe.vmm.driver import DriverProbe

_EVERYWHERE = ("fork", "pause", "snapshots", "standby")  # what every driver here offers


def features(*more: str) -> tuple[str, ...]:
    """A driver's features: what all of them have, and ``more`` that this one has on this host.

    The words are the contract's runtime feature ids, of which ``vsock`` and ``disk-io-limit`` are
    not everybody's.
    """
    return tuple(sorted((*_EVERYWHERE, *more)))


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
