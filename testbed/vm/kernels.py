"""Finds a Debian kernel, downloads it without installing anything, and keeps it.

The mirror and its key are those of the host's own apt sources; lists, packages and configuration are private to the cache.
Only the plain amd64 flavour will do: the one for clouds has neither rdma_rxe nor 9p.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from testbed.errors import MachineError
from testbed.vm.initramfs import build_initramfs, needs_initramfs

_META_PACKAGE = "linux-image-amd64"
_DEFAULT_MIRROR = "http://deb.debian.org/debian"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_APT_FOLDER = Path("/etc/apt")
_RECORD, _IMAGE, _INITRAMFS = "kernel.json", "vmlinux", "initramfs.cpio"
# The program of an initramfs, and where its package has it.
_BUSYBOX_PACKAGE, _BUSYBOX = "busybox-static", "bin/busybox"
_ELF_MAGIC = b"\x7fELF"
# How the image in a bzImage may be compressed, by the first bytes of the stream.
_XZ_MAGIC, _ZSTD_MAGIC, _GZIP_MAGIC = b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08"
_APT_RETRIES = 3


class KernelName(StrEnum):
    """The kernels that can be booted, by the Debian suite that has them."""

    BOOKWORM = "bookworm"
    TRIXIE = "trixie"
    TRIXIE_BACKPORTS = "trixie-backports"
    BOOKWORM_BACKPORTS = "bookworm-backports"
    SID = "sid"


# The one in which rdma_rxe knows network namespaces, and qdiscs may be written in eBPF.
DEFAULT_KERNEL = KernelName.TRIXIE_BACKPORTS


@dataclass(frozen=True, slots=True)
class GuestKernel:
    """A kernel in the cache.

    Attributes:
        name: The suite it came from.
        release: What ``uname -r`` says in the guest.
        package_version: Debian's version of it.
        folder: Where it is: ``vmlinux``, ``lib/modules/RELEASE``, and ``initramfs.cpio`` where it needs one.
    """

    name: str
    release: str
    package_version: str
    folder: Path

    @property
    def image(self) -> Path:
        """The ELF image that QEMU loads."""
        return self.folder / _IMAGE

    @property
    def initramfs(self) -> Path | None:
        """The first root, for a kernel that needs one."""
        path = self.folder / _INITRAMFS
        return path if path.exists() else None


def cache_folder() -> Path:
    """Return the folder of all cached kernels."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "testbed" / "kernels"


def find_kernel(
    name: KernelName = DEFAULT_KERNEL, *, refresh: bool = False, report: Callable[[str], None] = lambda text: None
) -> GuestKernel:
    """Return a kernel from the cache, downloaded first where it is not there.

    Args:
        name: Which.
        refresh: Ask the mirror for its newest, and take that.
        report: Told when a download begins.

    Raises:
        MachineError: There is no apt here, the mirror does not answer, or a package is not as expected.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder} cannot be made: {error.strerror}", hint="set XDG_CACHE_HOME") from None
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs that begin together download once
        cached = None if refresh else _read_cached(name, folder / name)
        if cached is not None:
            return cached
        report(f"downloading the kernel of Debian {name}")
        return _download(name, folder)


def _read_cached(name: KernelName, folder: Path) -> GuestKernel | None:
    try:
        record = json.loads((folder / _RECORD).read_text())
        kernel = GuestKernel(name, record["release"], record["package_version"], folder)
    except (OSError, ValueError, KeyError):
        return None
    return kernel if kernel.image.exists() else None


def _download(name: KernelName, cache: Path) -> GuestKernel:
    """Download, unpack and record a kernel; the cached one stays until the new one is whole."""
    for program, package in (("apt-get", "apt"), ("dpkg", "dpkg"), ("depmod", "kmod")):
        if shutil.which(program) is None:
            raise MachineError(
                f"there is no program {program!r}, which fetches the guest's kernel", hint=f"apt-get install {package}"
            )
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as draft_name:
        draft = Path(draft_name)
        with _private_apt(name, draft / "apt") as apt:
            depends = _read_field(apt("apt-cache", "show", _META_PACKAGE), "Depends")
            version = _read_field(apt("apt-cache", "show", _META_PACKAGE), "Version")
            release = parse_release(depends)
            packages = choose_packages(
                release, apt("apt-cache", "depends", "--no-recommends", "--no-suggests", f"linux-image-{release}")
            )
            apt("apt-get", "download", *(f"{package}={version}" for package in packages))
            root = _unpack(draft / "apt", draft / "root")
            ready = draft / "ready"
            ready.mkdir()
            modules = next((one for one in (root / "usr/lib/modules", root / "lib/modules") if one.is_dir()), None)
            bootable = next(
                (one for name in (f"vmlinuz-{release}", "vmlinuz") for one in sorted(root.rglob(name))), None
            )
            if modules is None or bootable is None:
                raise MachineError(
                    f"the packages of Linux {release} have no image or no modules", hint="try another kernel"
                )
            (ready / _IMAGE).write_bytes(extract_vmlinux(bootable.read_bytes()))
            (ready / "lib").mkdir()
            shutil.move(modules, ready / "lib" / "modules")
            _run(["depmod", "-b", str(ready), release], "listing the guest's modules")
            if needs_initramfs(ready / "lib" / "modules" / release):
                apt("apt-get", "download", _BUSYBOX_PACKAGE)
                busybox = (_unpack(draft / "apt", draft / "root") / _BUSYBOX).read_bytes()
                (ready / _INITRAMFS).write_bytes(build_initramfs(ready / "lib" / "modules" / release, busybox))
        kernel = GuestKernel(name, release, version, cache / name)
        record = {key: value for key, value in asdict(kernel).items() if key != "folder"}
        (ready / _RECORD).write_text(json.dumps(record, indent=1))
        shutil.rmtree(cache / name, ignore_errors=True)
        ready.rename(cache / name)
    return kernel


def _unpack(archives: Path, root: Path) -> Path:
    """Unpack all packages of a folder, and remove them from it."""
    for archive in sorted(archives.glob("*.deb")):
        _run(["dpkg", "-x", str(archive), str(root)], "unpacking the guest's kernel")
        archive.unlink()
    return root


@contextlib.contextmanager
def _private_apt(suite: str, folder: Path) -> Iterator[Callable[..., str]]:
    """Yield a function that runs apt's programs with lists, cache and sources of their own; the lists are fetched."""
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    (folder / "sources.list").write_text(render_sources(suite, read_mirror(_APT_FOLDER), _KEYRING))
    (folder / "apt.conf").write_text(render_apt_configuration(folder))
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C"}

    def apt(*command: str) -> str:
        return _run(command, "fetching the guest's kernel", folder=folder, environment=environment)

    apt("apt-get", "update")
    yield apt


def render_sources(suite: str, mirror: str, keyring: Path) -> str:
    """Return the private sources.list: one suite, signed by Debian's archive."""
    return f"deb [arch=amd64 signed-by={keyring}] {mirror} {suite} main\n"


def render_apt_configuration(folder: Path) -> str:
    """Return an apt configuration that touches nothing of the host's but its list of installed packages, read."""
    return (
        f'Dir::State::lists "{folder}/lists";\n'
        f'Dir::Cache "{folder}/cache";\n'
        f'Dir::Etc::sourcelist "{folder}/sources.list";\n'
        'Dir::Etc::sourceparts "/dev/null";\n'
        'APT::Architecture "amd64";\n'
        'APT::Sandbox::User "root";\n'
        'Acquire::Languages "none";\n'
        f'Acquire::Retries "{_APT_RETRIES}";\n'
    )


def read_mirror(folder: Path) -> str:
    """Return the address of the Debian mirror that the host's own apt sources name."""
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    for file in files:
        with contextlib.suppress(OSError):
            if mirror := parse_mirror(file.read_text()):
                return mirror
    return _DEFAULT_MIRROR


def parse_mirror(text: str) -> str | None:
    """Return the first address in apt sources, of either format, that ends like Debian's archive."""
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith(("deb ", "URIs:")):
            for word in line.split():
                if re.fullmatch(r"[a-z+]+://\S+/debian/?", word):
                    return word.rstrip("/")
    return None


def parse_release(depends: str) -> str:
    """Return the release, such as ``6.12.9+deb13-amd64``, of the image that the meta package depends on.

    Raises:
        MachineError: It depends on none.
    """
    if match := re.search(r"\blinux-image-([0-9][^\s,]*)", depends):
        return match[1]
    raise MachineError(f"{_META_PACKAGE} names no image: {depends!r}", hint="try another kernel")


def choose_packages(release: str, depends: str) -> list[str]:
    """Return the packages that make up a kernel: the image, and since 7.x its binary, modules and base, which it depends on."""
    found = {f"linux-image-{release}"}
    found.update(re.findall(rf"\blinux-(?:binary|modules|base)-{re.escape(release)}(?=\s|$)", depends))
    return sorted(found)


def extract_vmlinux(bootable: bytes) -> bytes:
    """Return the ELF image inside a bzImage, which boots faster: the guest need not unpack it.

    Raises:
        MachineError: None is found, or nothing here unpacks its compression.

    Source:
        Linux, scripts/extract-vmlinux.
    """
    for magic, unpack in ((_XZ_MAGIC, _unpack_xz), (_ZSTD_MAGIC, _unpack_zstd), (_GZIP_MAGIC, _unpack_gzip)):
        start = bootable.find(magic)
        while start >= 0:
            image = unpack(bootable[start:])
            if image.startswith(_ELF_MAGIC):
                return image
            start = bootable.find(magic, start + 1)
    raise MachineError("the guest's kernel image is packed in a way that is not known here", hint="try another kernel")


def _unpack_xz(data: bytes) -> bytes:
    try:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data)
    except lzma.LZMAError:
        return b""


def _unpack_zstd(data: bytes) -> bytes:
    if shutil.which("zstd") is None:
        raise MachineError("there is no program 'zstd', which unpacks the guest's kernel", hint="apt-get install zstd")
    # What follows the stream is no zstd: an error that is expected, after all that matters was written.
    return subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=False).stdout


def _unpack_gzip(data: bytes) -> bytes:
    import zlib

    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data)
    except zlib.error:
        return b""


def _read_field(text: str, field: str) -> str:
    """Return a field of the first package that ``apt-cache show`` tells of."""
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        if key == field:
            return value.strip()
    return ""


def _run(
    command: Sequence[str], doing: str, *, folder: Path | None = None, environment: dict[str, str] | None = None
) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        why = next((line for line in words if line.startswith("E:")), words[-1] if words else "no message")
        raise MachineError(
            f"{doing}: `{' '.join(command[:2])}` failed: {why}",
            hint="see that apt's sources name a Debian mirror that answers, and debian-archive-keyring is installed",
        )
    return done.stdout
