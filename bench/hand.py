"""The command line of the server's VMs, for VMs that are started by hand.

It is made by the server's own ``command_line``, and compared with what the server really ran.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.monitor import AGENT_FD, MONITOR_FD, STATE_FD
from stillframe.host.files import clone
from stillframe.images.boot import BootPair, load_boot_pair, write_config_disk
from stillframe.model.units import parse_size
from stillframe.model.values import Hypervisor
from stillframe.store.paths import DataDirectory, InstancePaths
from stillframe.vmm.driver import Disk, MachineResources, MachineSpec
from stillframe.vmm.qemu.boards import BOARDS
from stillframe.vmm.qemu.command import QemuBuild, command_line

_QEMU = shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"
# What differs between two processes that run the same VM: where, by which descriptors, and who.
_OWN = re.compile(r"(?<=fd[=:])\d+|(?<=guid=)[0-9a-f-]{36}")


@dataclass(frozen=True, slots=True)
class Hand:
    """All that is needed to start an instance's VM by hand; ``overlay_bytes``: its disk's size."""

    data: DataDirectory
    build: QemuBuild
    spec: MachineSpec
    root_disk: Path
    pair: BootPair
    overlay_bytes: int

    @classmethod
    def like(cls, data: DataDirectory, instance: dict[str, Any]) -> Hand:
        """As the server runs ``instance`` (its answer over HTTP)."""
        (pair,) = (path.name for path in data.system.iterdir() if len(path.name) == 64)
        major, minor, micro = map(int, instance["hypervisor_version"].split("."))
        digest = instance["image_digest"].removeprefix("sha256:")
        return cls(
            data,
            QemuBuild(
                _QEMU,
                (major, minor, micro),
                instance["accelerator"],
                BOARDS[Hypervisor(instance["hypervisor"])],
            ),
            MachineSpec(parse_size(instance["size"]), instance["vcpus"], instance["accelerator"]),
            data.images / digest / "root.squashfs",
            load_boot_pair(data.system, pair),
            parse_size(instance["overlay_size"]),
        )

    def command(self, directory: Path, state: Path | None) -> list[str]:
        """The command line for a VM with its files in ``directory``, laid out as the server's."""
        paths = InstancePaths(directory)
        resources = MachineResources(
            directory=directory,
            memory_image=paths.memory,
            disks=(
                Disk(self.root_disk, readonly=True),
                Disk(paths.overlay, readonly=False),
                Disk(paths.config, readonly=True),
            ),
            kernel=self.pair.kernel,
            initrd=self.pair.initrd,
            kernel_arguments=self.pair.arguments,
            generation_id=uuid.uuid4(),
            console_log=paths.log("app"),
            vmm_log=paths.log("vmm"),
            device_state=state,
        )
        return command_line(
            self.build, self.spec, resources, monitor_fd=MONITOR_FD, agent_fd=AGENT_FD,
            devices_fd=None if state is None else STATE_FD,
        )  # fmt: skip

    def prepare_fork(self, snapshot_id: str, directory: Path) -> Path:
        """The files of a fork of a snapshot in the new ``directory``; its device state's path."""
        payload = self.data.snapshot(snapshot_id)
        paths = _make(directory)
        os.link(payload.memory, paths.memory)
        clone(payload.overlay, paths.overlay)
        write_config_disk(paths.config, [])
        return payload.devices

    def prepare_boot(self, directory: Path, config: list[tuple[str, str]]) -> None:
        """The disks of a VM to be booted in the new ``directory``."""
        paths = _make(directory)
        clone(self.data.templates / f"overlay-{self.overlay_bytes}.ext4", paths.overlay)
        write_config_disk(paths.config, config)

    def differs_from_server(self, instance_id: str, pid: int) -> list[str]:
        """Arguments of a running fork's VMM ``pid`` that ours would not have, or the reverse."""
        theirs = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
        home = self.data.instance(instance_id).directory
        ours = self.command(home, Path("state"))
        return sorted(set(map(_impersonal, theirs)) ^ set(map(_impersonal, ours)))


def _impersonal(argument: str) -> str:
    return _OWN.sub("#", argument)


def _make(directory: Path) -> InstancePaths:
    paths = InstancePaths(directory)
    paths.log("app").parent.mkdir(parents=True)
    return paths


def plain_memory(command: list[str]) -> list[str]:
    """The same VM with ordinary anonymous memory instead of a mapping of an image."""
    plain: list[str] = []
    for argument in command:
        if argument.startswith("memory-backend-file,"):
            plain.pop()  # its -object
        else:
            plain.append(argument.replace(",memory-backend=mem", ""))
    return plain
