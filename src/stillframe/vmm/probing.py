"""A probe that is made once, whoever asks, and never raises for an absent hypervisor.

What is there stays; what is missing may be installed or mended while the server runs, so that is
looked for again, but not so often that looking becomes work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from stillframe.model.errors import StillframeError
from stillframe.model.values import Hypervisor
from stillframe.vmm.driver import DriverProbe, Limit

_FEATURES = ("fork", "pause", "snapshots", "standby")  # what every driver here offers


def features(limits: frozenset[Limit]) -> tuple[str, ...]:
    """The contract's feature ids of a driver that can limit this."""
    return (*(["disk-io-limit"] if Limit.DISK in limits else []), *_FEATURES)


_SHORTEST_REST = 10.0  # seconds after which what was missing is looked for again
_REST_FACTOR = 20  # times what looking took, if that is more: a guest that hangs takes seconds


class ProbeOnce:
    """The finding of ``examine`` about a hypervisor; its error is why that is unavailable.

    ``steady`` is a monotonic clock in seconds.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        examine: Callable[[], Awaitable[DriverProbe]],
        *,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hypervisor, self._examine, self._steady = hypervisor, examine, steady
        self._turn = asyncio.Lock()
        self._found: DriverProbe | None = None
        self._again_at = 0.0

    async def __call__(self) -> DriverProbe:
        """The finding, made by whoever asks first."""
        async with self._turn:
            began = self._steady()
            if self._found is None or (not self._found.available and began >= self._again_at):
                try:
                    self._found = await self._examine()
                except StillframeError as error:
                    self._found = DriverProbe(
                        self._hypervisor, False, reason=error.message, hint=error.hint
                    )
                ended = self._steady()
                self._again_at = ended + max(_SHORTEST_REST, _REST_FACTOR * (ended - began))
            return self._found
