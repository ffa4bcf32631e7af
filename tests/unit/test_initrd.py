"""The archive is one that cpio reads, the same every time; the boot pair appears whole or not."""

import shutil
import subprocess
from pathlib import Path

import pytest

from stillframe.images import boot, initrd
from stillframe.model.errors import InvalidRequest, MissingComponent


def module(depends: str) -> bytes:
    return b"\x7fELF" + b"\0" * 20 + b"license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


@pytest.fixture
def kernel_dir(tmp_path: Path) -> Path:
    root = tmp_path / "kernel"
    modules = root / "lib/modules/6.1.0-1"
    (modules / "kernel").mkdir(parents=True)
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-6.1.0-1").write_bytes(b"kernel")
    (modules / "modules.builtin").write_text("kernel/fs/squashfs/squashfs.ko\n")
    needs = {
        "virtio_pci": "virtio_ring,virtio",
        "virtio_ring": "virtio",
        "virtio_net": "net-failover",
    }
    names = {*initrd.REQUIRED_MODULES, *needs, "virtio", "net-failover"} - {"squashfs"}
    for name in names:
        (modules / f"kernel/{name}.ko").write_bytes(module(needs.get(name, "")))
    return root


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_bytes(b"\x7fELF agent")
    return path


def test_modules_come_after_what_they_depend_on(kernel_dir: Path) -> None:
    order = list(initrd.select_modules(kernel_dir / "lib/modules/6.1.0-1"))
    assert order[:3] == ["virtio", "virtio_ring", "virtio_pci"]
    assert order.index("net_failover") < order.index("virtio_net")
    assert "squashfs" not in order


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    archive = initrd.build_initrd(b"agent", {"virtio": b"one", "virtio_pci": b"two"})
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / "init").read_bytes() == b"agent"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "modules/order").read_text() == "virtio.ko\nvirtio_pci.ko\n"
    assert (tmp_path / "modules/virtio_pci.ko").read_bytes() == b"two"


def test_a_boot_pair_is_built_once_and_found_again(
    kernel_dir: Path, agent: Path, tmp_path: Path
) -> None:
    root = tmp_path / "boot"
    first = boot.build_boot_pair(kernel_dir, agent, root)
    inode = first.initrd.stat().st_ino
    assert boot.build_boot_pair(kernel_dir, agent, root) == first
    assert first.initrd.stat().st_ino == inode
    assert boot.load_boot_pair(root, first.digest) == first
    assert [p.name for p in root.iterdir()] == [first.digest]


def test_another_agent_is_another_pair(kernel_dir: Path, agent: Path, tmp_path: Path) -> None:
    first = boot.build_boot_pair(kernel_dir, agent, tmp_path / "boot")
    agent.write_bytes(b"\x7fELF newer")
    assert boot.build_boot_pair(kernel_dir, agent, tmp_path / "boot").digest != first.digest


def test_what_is_missing_is_named_with_a_hint(
    kernel_dir: Path, agent: Path, tmp_path: Path
) -> None:
    (kernel_dir / "lib/modules/6.1.0-1/kernel/overlay.ko").unlink()
    with pytest.raises(MissingComponent, match="overlay") as caught:
        boot.build_boot_pair(kernel_dir, agent, tmp_path / "boot")
    assert "make setup" in (caught.value.hint or "")
    with pytest.raises(MissingComponent, match="agent"):
        boot.build_boot_pair(kernel_dir, tmp_path / "none", tmp_path / "boot")
    with pytest.raises(InvalidRequest):
        boot.load_boot_pair(tmp_path, "../../etc")


def test_the_config_disk_never_changes_its_size(tmp_path: Path) -> None:
    disk = tmp_path / "config"
    boot.write_config_disk(disk, [("arg", "sh")])
    assert disk.read_bytes().startswith(b"STILLFRAME-CFG1\n\x07\0\0\0arg\0sh\0\0\0")
    boot.write_config_disk(disk, [("env", "A=" + "x" * 9000)])
    assert disk.stat().st_size == boot.CONFIG_DISK_BYTES
    assert disk.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InvalidRequest):
        boot.write_config_disk(disk, [("env", "x" * boot.CONFIG_DISK_BYTES)])
    with pytest.raises(InvalidRequest):
        boot.write_config_disk(disk, [("env", "A=\0")])
