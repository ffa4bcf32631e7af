"""Memory and devices of a paused VM as files, the way the engine takes them, without the engine."""

from __future__ import annotations

from pathlib import Path

from stillframe.host.capture import BufferBudget, MemoryCapture
from stillframe.host.files import clone, create_sparse
from stillframe.host.image import drop_zeros, merge_pages, open_private
from stillframe.host.memory import GuestMemory
from stillframe.vmm.driver import Machine


async def save(machine: Machine, mapped: Path, *, memory: Path, devices: Path) -> str:
    """Write the new files ``memory`` and ``devices``; how that was done.

    ``mapped`` is the image that the VMM was started with. ``outside``: read from outside;
    ``difference``: the VMM wrote one, onto the image of its moment; ``all``: the VMM wrote it all.
    """
    if not machine.writes_memory:
        clone(mapped, memory)
        await machine.save_devices(devices)
        with GuestMemory(machine.process.pid, mapped) as guest, open_private(memory) as fd:
            assert guest.private_pages().total > 0
            taken = MemoryCapture(guest, fd, incremental=False, budget=BufferBudget(1 << 28))
            taken.ahead()
            taken.still()
            taken.after()
        return "outside"
    moment = machine.moment
    below = None if moment is None else moment.image
    if below is None:
        create_sparse(memory, mapped.stat().st_size)
        difference = await machine.save_devices(devices, memory)
    else:
        clone(below, memory)
        difference = await machine.save_devices(devices, memory, moment)
    with open_private(memory) as fd:
        if difference is None:
            drop_zeros(fd)
        else:
            merge_pages(difference.fd, difference.runs, fd)
            difference.close()
    assert machine.moment is not None
    machine.moment.is_kept_in(memory)
    return "all" if below is None else "difference"
