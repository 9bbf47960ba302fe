"""The first root of a kernel that has its root's file system as modules: loads them, mounts the root and goes on there.

Debian's kernels have what it takes built in since 6.12; 6.1 does not. One static program, busybox, does all of it.
"""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from testbed.errors import MachineError
from testbed.vm.guest import ROOT_TAG

_ROOT_MODULES = ("virtio_pci", "virtiofs")
_DEPENDENCIES = "modules.dep"
_MODULES_FOLDER = "modules"
_BUSYBOX = "busybox"
_INIT = """\
#!/{busybox} sh
{inserts}
/{busybox} mkdir /proc /new
/{busybox} mount -t proc proc /proc
for word in $(/{busybox} cat /proc/cmdline); do
    case $word in init=*) init=${{word#init=}} ;; esac
done
/{busybox} umount /proc
/{busybox} mount -t virtiofs -o ro {tag} /new
exec /{busybox} switch_root -c /dev/console /new $init
"""
_TRAILER = "TRAILER!!!"


def order_modules(dependencies: str, names: Iterable[str]) -> list[str]:
    """Return the files of some modules and of all that they need, each behind what it needs; what is built in has none.

    Args:
        dependencies: ``modules.dep``: a file of each line, and behind a colon those that it needs, the nearest first.
        names: The modules.

    Source:
        modules.dep(5).
    """
    needs: dict[str, list[str]] = {}
    for line in dependencies.splitlines():
        needed_by, _, others = line.partition(":")
        needs[needed_by] = others.split()
    by_name = {posixpath.basename(file).partition(".")[0].replace("-", "_"): file for file in needs}
    ordered: dict[str, None] = {}
    for name in names:
        if file := by_name.get(name):
            ordered.update(dict.fromkeys([*reversed(needs[file]), file]))
    return list(ordered)


def needs_initramfs(modules: Path) -> bool:
    """Return whether a kernel, by its folder of modules, cannot mount its root by itself."""
    return bool(order_modules((modules / _DEPENDENCIES).read_text(), _ROOT_MODULES))


def build_initramfs(modules: Path, busybox: bytes) -> bytes:
    """Return the archive for a kernel.

    Args:
        modules: Its folder of modules, with ``modules.dep``.
        busybox: The program, linked statically.

    Raises:
        MachineError: Its modules are compressed, which busybox does not undo.
    """
    files = order_modules((modules / _DEPENDENCIES).read_text(), _ROOT_MODULES)
    if packed := [file for file in files if not file.endswith(".ko")]:
        raise MachineError(f"the kernel's module {packed[0]} is compressed", hint="try another kernel")
    names = [f"{_MODULES_FOLDER}/{posixpath.basename(file)}" for file in files]
    init = _INIT.format(
        busybox=_BUSYBOX, tag=ROOT_TAG, inserts="\n".join(f"/{_BUSYBOX} insmod /{name}" for name in names)
    )
    contents = {name: (modules / file).read_bytes() for name, file in zip(names, files, strict=True)}
    return pack_cpio({"init": init.encode(), _BUSYBOX: busybox, **contents}, folders=("dev", _MODULES_FOLDER))


def pack_cpio(programs: Mapping[str, bytes], folders: Iterable[str]) -> bytes:
    """Return an archive of folders, of executable files, and of the console that the kernel opens for its first process.

    Source:
        Linux, Documentation/driver-api/early-userspace/buffer-format.rst: "newc", thirteen numbers of eight hexadecimal digits.
    """
    parts: list[bytes] = []

    def add(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        path = name.encode() + b"\0"
        numbers = (len(parts) + 1, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08x" % number for number in numbers) + path
        parts.append(_padded(header) + _padded(content))

    for folder in folders:
        add(folder, stat.S_IFDIR | 0o755)
    add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, content in programs.items():
        add(name, stat.S_IFREG | 0o755, content)
    add(_TRAILER, 0)
    return b"".join(parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
