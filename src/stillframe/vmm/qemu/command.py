"""The QEMU command line, as data.

It must be the same for every process that loads the same memory, but for paths and identity:
QEMU matches devices by their place on the bus, so every device has a fixed address.

Device layouts (``MachineSpec.layout``): 1 had transitional virtio devices, whose state lists all
1024 possible queues of each (45 KB a device, most of the time of a save or a load), and the
chipset's SATA and SMBus controllers, which no guest of ours uses. Since 2 they are gone, and virtio
devices are legacy ones: the state fell from 303 to 28 KB, the time to save it to less than half.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillframe.vmm.driver import MachineResources, MachineSpec

AGENT_PORT = "org.stillframe.agent"
_MAC = "52:54:00:12:34:56"
# (major, minor) of the first QEMU that can map memory from a file it may only read.
_READONLY_MEMORY = (8, 2)
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class QemuBuild:
    """One QEMU binary: where, which version, and the accelerator that works."""

    binary: str
    version: tuple[int, int, int]
    accelerator: str

    @property
    def version_text(self) -> str:
        """The version as QEMU writes it."""
        return ".".join(map(str, self.version))


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
    arguments = [
        build.binary,
        "-nodefaults",
        "-no-user-config",
        "-display", "none",
        "-sandbox", _SANDBOX,
        "-msg", "timestamp=on",
        "-name", "guest=stillframe",
        "-M", _machine(spec),
        "-accel", spec.accelerator,
        "-cpu", "host" if spec.accelerator == "kvm" else "qemu64",
        "-smp", str(spec.vcpus),
        "-m", f"{spec.memory_bytes // (1 << 20)}M",
        "-object", _memory(build, spec, resources),
        "-global", "migration.send-configuration=off",
        "-global", "migration.x-events=on",  # the capability "events", before anybody can ask
        "-action", "reboot=shutdown,panic=shutdown",
        "-rtc", "base=utc,clock=host",
        "-kernel", str(resources.kernel),
        "-initrd", str(resources.initrd),
        "-append", resources.kernel_arguments,
        "-chardev", f"socket,id=monitor,fd={monitor_fd},server=on,wait=off",
        "-mon", "chardev=monitor,mode=control",
        "-chardev", f"file,id=console,path={quoted(resources.console_log)},append=on",
        "-serial", "chardev:console",
        "-device", f"vmgenid,guid={resources.generation_id}",
        "-device", virtio(spec, "serial", "id=ports,addr=0x3,max_ports=2"),
        "-chardev", f"socket,id=agent,fd={agent_fd},server=on,wait=off",
        "-device", f"virtserialport,bus=ports.0,nr=1,chardev=agent,name={AGENT_PORT}",
        "-device", virtio(spec, "rng", "addr=0x4"),
    ]  # fmt: skip
    if spec.network:
        arguments += [
            "-netdev", "user,id=net0,ipv6=off",
            "-device", virtio(spec, "net", f"netdev=net0,addr=0x5,romfile=,mac={_MAC}"),
        ]  # fmt: skip
    arguments += _disks(spec, resources)
    if resources.device_state is not None:
        # -S: the guest stands still after the load until we say cont.
        arguments += ["-incoming", "defer" if devices_fd is None else f"fd:{devices_fd}", "-S"]
    return arguments


def _machine(spec: MachineSpec) -> str:
    options = "q35,memory-backend=mem,suppress-vmdesc=on,smm=off,vmport=off"
    return options if spec.layout == 1 else f"{options},sata=off,smbus=off"


def virtio(spec: MachineSpec, kind: str, properties: str) -> str:
    """A virtio PCI device of the spec's layout, as a ``-device`` option."""
    model = f"virtio-{kind}-pci" if spec.layout == 1 else f"virtio-{kind}-pci,disable-modern=on"
    return f"{model},{properties}"


def _memory(build: QemuBuild, spec: MachineSpec, resources: MachineResources) -> str:
    options = (
        f"memory-backend-file,id=mem,size={spec.memory_bytes},"
        f"mem-path={quoted(resources.memory_image)},share=off,dump=off"
    )
    # Older versions open the file for writing although a private mapping never writes it.
    return options + (",readonly=on,rom=off" if build.version[:2] >= _READONLY_MEMORY else "")


def _disks(spec: MachineSpec, resources: MachineResources) -> list[str]:
    arguments: list[str] = []
    for index, disk in enumerate(resources.disks):
        readonly = "on" if disk.readonly else "off"
        arguments += [
            "-blockdev",
            f"driver=raw,node-name=disk{index},read-only={readonly},discard=unmap,"
            f"file.driver=file,file.filename={quoted(disk.path)},file.aio=threads",
            "-device",
            virtio(
                spec, "blk", f"drive=disk{index},addr={0x8 + index:#x},serial=stillframe{index}"
            ),
        ]
    return arguments
