"""The real agent in a real guest: boot, commands, files, identity, a new host, shutdown."""

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stillframe.guest import files, identity
from stillframe.guest.connection import AgentConnection
from stillframe.guest.exec import start_exec
from stillframe.guest.wire import Frame, FrameType, encode
from stillframe.images.boot import BootPair, build_boot_pair, write_config_disk
from stillframe.model.errors import GuestFailure

ROOT = Path(__file__).parents[2]
KERNEL = Path(os.environ.get("STILLFRAME_KERNEL_DIR", ROOT / ".cache/kernel"))
AGENT = ROOT / "agent/build/stillframe-init"
TOOLS = ("qemu-system-x86_64", "mksquashfs", "mkfs.ext4", "busybox")
pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(
        not KERNEL.is_dir() or not AGENT.exists() or not all(map(shutil.which, TOOLS)),
        reason="needs QEMU, squashfs-tools, busybox, the built agent and a kernel: make setup",
    ),
]


def make_disks(directory: Path) -> None:
    root = directory / "root"
    (root / "bin").mkdir(parents=True)  # no /proc, /dev, /etc: init must make them
    shutil.copy(str(shutil.which("busybox")), root / "bin/busybox")
    for name in ("sh", "echo", "cat", "sleep", "hostname", "stty"):
        (root / "bin" / name).symlink_to("busybox")
    run = ["mksquashfs", str(root), str(directory / "d0"), "-quiet", "-no-progress"]
    subprocess.run(run, check=True, capture_output=True, timeout=60)
    with (directory / "d1").open("xb") as file:
        file.truncate(64 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", directory / "d1"], check=True, timeout=60)
    pairs = [("arg", "sleep"), ("arg", "1000"), ("env", "COLOUR=green"), ("hostname", "first")]
    write_config_disk(directory / "d2", [*pairs, ("nonce", "n1"), ("seed", "5a" * 64)])


def qemu_command(directory: Path, pair: BootPair) -> list[str]:
    command = [
        "qemu-system-x86_64",
        "-M",
        "q35",
        "-accel",
        "tcg",
        "-cpu",
        "qemu64",
        "-m",
        "256M",
        "-nodefaults",
    ]
    command += ["-no-user-config", "-display", "none", "-no-reboot", "-device", "virtio-serial-pci"]
    command += ["-kernel", str(pair.kernel), "-initrd", str(pair.initrd)]
    command += ["-append", pair.arguments, "-serial", f"file:{directory}/console"]
    for number in range(3):
        readonly = "off" if number == 1 else "on"
        drive = f"file={directory}/d{number},if=none,id=d{number},format=raw,readonly={readonly}"
        command += ["-drive", drive, "-device", f"virtio-blk-pci,drive=d{number}"]
    command += ["-chardev", f"socket,id=agent,path={directory}/agent,server=on,wait=off"]
    return [*command, "-device", "virtserialport,chardev=agent,name=org.stillframe.agent"]


async def dial(directory: Path) -> AgentConnection:
    return await AgentConnection.open(
        await asyncio.open_unix_connection(str(directory / "agent")), deadline=60
    )


@asynccontextmanager
async def guest(directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    make_disks(directory)
    pair = build_boot_pair(KERNEL, AGENT, directory / "boot")
    qemu = await asyncio.create_subprocess_exec(*qemu_command(directory, pair))
    try:
        while not (directory / "agent").exists():
            assert qemu.returncode is None
            await asyncio.sleep(0.02)
        yield qemu
    finally:
        if qemu.returncode is None:
            qemu.kill()
        await qemu.wait()


async def run(
    connection: AgentConnection, *command: str, stdin: bytes = b"", tty: bool = False
) -> tuple[int, bytes]:
    session = await start_exec(connection, command, tty=tty, rows=33, cols=99)
    await session.write_stdin(stdin)
    if stdin:
        await session.write_stdin(b"")
    output = b"".join([data async for _, data in session.output()])
    await session.close()
    return await session.wait(), output


async def commands(connection: AgentConnection) -> None:
    assert await run(connection, "sh", "-c", "echo $COLOUR; exit 3") == (3, b"green\n")
    assert await run(connection, "stty", "size", tty=True) == (0, b"33 99\r\n")
    payload = os.urandom(1_000_000)
    session = await start_exec(connection, ["cat"])
    feed = asyncio.create_task(session.write_stdin(payload))
    feed.add_done_callback(lambda _: ends.append(asyncio.create_task(session.write_stdin(b""))))
    ends: list[asyncio.Task[None]] = []
    assert b"".join([data async for _, data in session.output()]) == payload
    await asyncio.gather(feed, *ends)
    assert await (await start_exec(connection, ["sleep", "99"], timeout=0.2)).wait() == 124
    killed = await start_exec(connection, ["sleep", "99"])
    await killed.signal(15)
    assert await killed.wait() == 143
    with pytest.raises(GuestFailure) as caught:
        await (await start_exec(connection, ["nope"])).wait()
    assert caught.value.facts["errno"] == "ENOENT"


async def copying(connection: AgentConnection) -> None:
    async def content() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"y" * 50_000

    assert (
        await files.write_path(connection, "/t/a/f", content(), mode=0o640, uid=7, patience=60)
        == 500_000
    )
    info = await files.stat(connection, "/t/a/f")
    assert (info.is_file, info.mode, info.size) == (True, 0o640, 500_000)
    assert not (await files.stat(connection, "/absent")).exists
    found = {}
    async for entry in files.read_path(connection, "/t"):
        found[entry.path] = (entry.kind, entry.uid, sum([len(d) async for d in entry.data]))
    assert found == {"a": ("dir", 0, 0), "a/f": ("file", 7, 500_000)}


@pytest.mark.timeout(180)
async def test_a_guest_boots_serves_survives_a_new_host_and_powers_off(tmp_path: Path) -> None:
    async with guest(tmp_path) as qemu:
        connection = await dial(tmp_path)
        await commands(connection)
        await copying(connection)
        state = await identity.identify(
            connection,
            seed=os.urandom(64),
            time_ns=lambda: time.time_ns() + 10**13,
            hostname="second",
            machine_id="b" * 32,
            instance_id="i",
        )
        assert state.workload == "running"
        assert await run(connection, "hostname") == (0, b"second\n")
        assert (await run(connection, "cat", "/etc/machine-id"))[1] == b"b" * 32 + b"\n"

        half = encode(Frame(FrameType.WRITE, 77, b"z" * 60_000))[:20_000]
        connection._writer.write(half)  # the host dies in the middle of a frame
        await connection.close()
        connection = await dial(tmp_path)
        assert await run(connection, "echo", "again") == (0, b"again\n")

        await identity.shutdown(connection, 2000)
        await asyncio.wait_for(qemu.wait(), 60)
        await connection.close()
        console = (tmp_path / "console").read_text()
        assert "STILLFRAME-AGENT-READY nonce=n1" in console
        assert 'STILLFRAME-EXIT nonce=n1 code=143 message="killed by signal 15"' in console
