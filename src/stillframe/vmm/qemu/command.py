"""The QEMU command line, as data.

It must be the same for every process that loads the same memory, but for paths and identity.
What differs between machines is in ``boards.py``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from stillframe.host.capacity import processor
from stillframe.vmm.driver import GUEST_MAC, MachineResources, MachineSpec
from stillframe.vmm.qemu.boards import (
    AGENT_SLOT,
    FIRST_DISK_SLOT,
    NETWORK_SLOT,
    Q35,
    RANDOM_SLOT,
    Board,
)

AGENT_PORT = "org.stillframe.agent"
# (major, minor) of the first QEMU that can map memory from a file it may only read.
_READONLY_MEMORY = (8, 2)
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class QemuBuild:
    """One QEMU binary: where, which version, the accelerator that works, and a machine it has."""

    binary: str
    version: tuple[int, int, int]
    accelerator: str
    board: Board = field(default_factory=Q35)

    @property
    def processor(self) -> str:
        """The processor that guests have: the host's under KVM, one by name otherwise."""
        return processor() if self.accelerator == "kvm" else processor_model(self.accelerator)

    @property
    def version_text(self) -> str:
        """The version as QEMU writes it."""
        return ".".join(map(str, self.version))


def processor_model(accelerator: str) -> str:
    """The argument of ``-cpu``: memory made on one processor runs on no other."""
    return "host" if accelerator == "kvm" else "qemu64"


def quoted(path: Path) -> str:
    """A path inside an option list: QEMU separates by commas and wants them doubled."""
    return str(path).replace(",", ",,")


def command_line(
    build: QemuBuild,
    spec: MachineSpec,
    resources: MachineResources,
    *,
    monitor_fd: int,
    agent_fd: int,
    devices_fd: int | None = None,
) -> list[str]:
    """The arguments to start QEMU with; ``*_fd`` are inherited descriptors.

    ``monitor_fd`` and ``agent_fd`` are listening sockets, ``devices_fd`` is the open device state;
    without it a QEMU that is to load waits for ``migrate-incoming``.
    """
    board = build.board
    added = board.kernel_arguments(spec)
    arguments = [
        build.binary,
        "-nodefaults",
        "-no-user-config",
        "-display", "none",
        "-sandbox", _SANDBOX,
        "-msg", "timestamp=on",
        "-name", "guest=stillframe",
        "-M", board.machine(spec),
        "-accel", spec.accelerator,
        "-cpu", processor_model(spec.accelerator),
        "-smp", str(spec.vcpus),
        "-m", f"{spec.memory_bytes // (1 << 20)}M",
        "-object", _memory(build, spec, resources),
        "-global", "migration.send-configuration=off",
        "-global", "migration.x-events=on",  # the capability "events", before anybody can ask
        "-action", "reboot=shutdown,panic=shutdown",
        "-rtc", "base=utc,clock=host",
        "-kernel", str(resources.kernel),
        "-initrd", str(resources.initrd),
        "-append", f"{resources.kernel_arguments} {added}".rstrip(),
        "-chardev", f"socket,id=monitor,fd={monitor_fd},server=on,wait=off",
        "-mon", "chardev=monitor,mode=control",
        "-chardev", f"file,id=console,path={quoted(resources.console_log)},append=on",
        "-serial", "chardev:console",
        *board.generation(resources.generation_id),
        "-device", board.virtio(spec, "serial", AGENT_SLOT, "id=ports,max_ports=2"),
        "-chardev", f"socket,id=agent,fd={agent_fd},server=on,wait=off",
        "-device", f"virtserialport,bus=ports.0,nr=1,chardev=agent,name={AGENT_PORT}",
        "-device", board.virtio(spec, "rng", RANDOM_SLOT, "id=random"),
    ]  # fmt: skip
    if spec.network:
        arguments += [
            "-netdev", "user,id=net0,ipv6=off",
            "-device", board.virtio(spec, "net", NETWORK_SLOT, f"netdev=net0,mac={GUEST_MAC}"),
        ]  # fmt: skip
    arguments += _disks(board, spec, resources)
    if resources.device_state is not None:
        # -S: the guest stands still after the load until we say cont.
        arguments += ["-incoming", "defer" if devices_fd is None else f"fd:{devices_fd}", "-S"]
    return arguments


def _memory(build: QemuBuild, spec: MachineSpec, resources: MachineResources) -> str:
    options = (
        f"memory-backend-file,id=mem,size={spec.memory_bytes},"
        f"mem-path={quoted(resources.memory_image)},share=off,dump=off"
    )
    # Older versions open the file for writing although a private mapping never writes it.
    return options + (",readonly=on,rom=off" if build.version[:2] >= _READONLY_MEMORY else "")


def _disks(board: Board, spec: MachineSpec, resources: MachineResources) -> list[str]:
    arguments: list[str] = []
    for index, disk in enumerate(resources.disks):
        options = f"read-only={'on' if disk.readonly else 'off'},discard=unmap"
        node = f"disk{index}"
        arguments += [
            "-blockdev",
            f"driver=raw,node-name={node},{options},"
            f"file.driver=file,file.filename={quoted(disk.path)},file.aio=threads",
        ]
        if resources.limits.disk:
            node = f"limited{index}"
            arguments += _throttle(index, options, resources.limits.disk)
        properties = f"drive={node},serial=stillframe{index}"
        arguments += ["-device", board.virtio(spec, "blk", FIRST_DISK_SLOT + index, properties)]
    return arguments


def _throttle(index: int, options: str, rate: int) -> list[str]:
    """A node above that of the disk, through which the guest reads and writes ``rate`` bytes/s.

    It is there before the guest's first step and no part of device state (QEMU's
    docs/throttle.txt; QAPI ThrottleLimits, BlockdevOptionsThrottle). Copies of the disk go by the
    node below it and are not slowed, and a drained guest (QMP stop) waits for no limit.
    """
    group = {"qom-type": "throttle-group", "id": f"limit{index}", "limits": {"bps-total": rate}}
    return [
        "-object", json.dumps(group),
        "-blockdev",
        f"driver=throttle,node-name=limited{index},{options},"
        f"throttle-group=limit{index},file=disk{index}",
    ]  # fmt: skip
