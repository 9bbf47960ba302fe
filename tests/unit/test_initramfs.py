"""The first root of a guest whose kernel has its root's file system as modules."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from testbed.errors import MachineError
from testbed.vm.initramfs import build_initramfs, needs_initramfs, order_modules, pack_cpio

DEPENDENCIES = """\
kernel/fs/fuse/fuse.ko:
kernel/fs/fuse/virtiofs.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko kernel/fs/fuse/fuse.ko
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio-pci.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
"""


def write_modules(folder: Path, dependencies: str) -> Path:
    for line in dependencies.splitlines():
        file = folder / line.partition(":")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"module {file.name}".encode())
    (folder / "modules.dep").write_text(dependencies)
    return folder


def test_modules_come_behind_what_they_need_and_once() -> None:
    names = [Path(file).name for file in order_modules(DEPENDENCIES, ["virtio_pci", "virtiofs"])]
    assert sorted(names) == ["fuse.ko", "virtio-pci.ko", "virtio.ko", "virtio_ring.ko", "virtiofs.ko"]
    needed = {line.partition(":")[0]: line.partition(":")[2].split() for line in DEPENDENCIES.splitlines()}
    for file, others in needed.items():
        for other in others:
            assert names.index(Path(other).name) < names.index(Path(file).name)


def test_kernel_that_has_it_built_in_needs_none(tmp_path: Path) -> None:
    assert not needs_initramfs(write_modules(tmp_path, "kernel/net/sctp/sctp.ko:\n"))
    assert needs_initramfs(write_modules(tmp_path, DEPENDENCIES))


def test_compressed_modules_are_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, DEPENDENCIES.replace(".ko", ".ko.xz"))
    with pytest.raises(MachineError, match=r"virtio\.ko\.xz is compressed"):
        build_initramfs(tmp_path, b"")


def read_cpio(archive: bytes) -> dict[str, tuple[str, bytes]]:
    """Return mode and content of each member of an archive of format newc, up to its trailer."""
    found: dict[str, tuple[str, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * field : at + 14 + 8 * field], 16) for field in range(13)]
        name = archive[at + 110 : at + 110 + numbers[11] - 1].decode()
        begin = at + (110 + numbers[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (stat.filemode(numbers[1]), archive[begin : begin + numbers[6]])
        at = begin + (numbers[6] + 3) // 4 * 4


def test_archive_holds_what_was_packed() -> None:
    files = {"init": b"#!/busybox sh\n", "modules/a.ko": b"\1\2\3"}
    assert read_cpio(pack_cpio(files, folders=("dev", "modules"))) == {
        "dev": ("drwxr-xr-x", b""),
        "modules": ("drwxr-xr-x", b""),
        "dev/console": ("crw-------", b""),
        "init": ("-rwxr-xr-x", files["init"]),
        "modules/a.ko": ("-rwxr-xr-x", files["modules/a.ko"]),
    }


def test_init_loads_all_and_goes_on_in_the_root(tmp_path: Path) -> None:
    members = read_cpio(build_initramfs(write_modules(tmp_path, DEPENDENCIES), b"program"))
    assert members["busybox"] == ("-rwxr-xr-x", b"program")
    lines = members["init"][1].decode().splitlines()
    inserted = [line.split()[-1].lstrip("/") for line in lines if "insmod" in line]
    assert len(inserted) == 5
    assert all(members[name][1] == f"module {Path(name).name}".encode() for name in inserted)
    assert lines[-1].endswith("switch_root -c /dev/console /new $init")
