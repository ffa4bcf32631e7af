"""A fake hypervisor that writes its guests' memory itself, as Firecracker does.

It notes what was written since it last saved, and a save writes that and forgets it: also one that
fails afterwards. What its log is relative to is its own copy of memory, so a difference that is
laid over any other image gives an image that is not what ``said`` tells.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from stillframe.host.files import write_fully
from stillframe.host.memory import PAGE, GuestMemory, make_buffer
from stillframe.host.process import Process
from stillframe.host.runs import Runs
from stillframe.model.errors import StorageFull
from stillframe.model.values import ProcessIdentity
from stillframe.vmm.driver import MachineResources, MachineSpec
from stillframe.vmm.fake.driver import FakeDriver, FakeMachine
from stillframe.vmm.moments import MemoryDifference, Moment


class NotingMachine(FakeMachine):
    """A fake VMM whose memory is not read from outside by anybody but this class."""

    writes_memory = True
    saving_hangs_up = True

    def __init__(self, process: Process, directory: Path) -> None:
        """Use ``begin`` before anything else."""
        super().__init__(process, directory)
        self._image, self._noted = directory, b""
        self.saves: list[str] = []  # how memory was written, each time
        self.said = ""  # the digest of memory at the last save
        self.fails_after_forgetting = False

    def begin(self, image: Path, *, adopted: bool = False) -> None:
        """It was started with this image; who adopts it does not know what it has noted since."""
        self._image, self._noted = image, image.read_bytes()
        self.moment = None if adopted else Moment(image)

    async def save_devices(
        self, destination: Path, memory: Path | None = None, since: Moment | None = None
    ) -> MemoryDifference | None:
        """Write devices, and of memory what was written ``since``, or all of it with its zeros."""
        assert memory is not None
        kind = "difference" if since is not None and since is self.moment else "all"
        self.moment = None
        await super().save_devices(destination)
        before, self._noted = self._noted, self._now()
        if self.fails_after_forgetting:
            raise StorageFull("no space for what the fake VMM writes")
        self.saves.append(kind)
        self.said, self.moment = hashlib.sha256(self._noted).hexdigest(), Moment()
        if kind == "all":
            with memory.open("r+b") as file:
                file.write(self._noted)
            return None
        return self._difference(before)

    def _now(self) -> bytes:
        content = bytearray(self._image.read_bytes())
        with GuestMemory(self.process.pid, self._image) as memory:
            runs = memory.private_pages()
            buffer = make_buffer(runs.total)
            memory.read(runs, buffer)
        position = 0
        for start, end in runs:
            content[start:end] = buffer[position : position + end - start]
            position += end - start
        buffer.close()
        return bytes(content)

    def _difference(self, before: bytes) -> MemoryDifference:
        now = self._noted
        pages = range(0, len(now), PAGE)
        changed = [at for at in pages if now[at : at + PAGE] != before[at : at + PAGE]]
        with tempfile.TemporaryFile() as file:
            for at in changed:
                write_fully(file.fileno(), now[at : at + PAGE], at)
            runs = Runs.of((at, at + PAGE) for at in changed)
            return MemoryDifference(os.dup(file.fileno()), runs)


class NotingDriver(FakeDriver):
    """Starts ``NotingMachine``."""

    machine = NotingMachine

    async def start(self, spec: MachineSpec, resources: MachineResources) -> FakeMachine:
        """As the fake one does."""
        return self._mine(await super().start(spec, resources), resources)

    async def adopt(self, process: ProcessIdentity, resources: MachineResources) -> FakeMachine:
        """Take over a process."""
        return self._mine(await super().adopt(process, resources), resources, adopted=True)

    @staticmethod
    def _mine(
        machine: FakeMachine, resources: MachineResources, *, adopted: bool = False
    ) -> NotingMachine:
        assert isinstance(machine, NotingMachine)
        machine.begin(resources.memory_image, adopted=adopted)
        return machine
