"""Named network namespaces, as ``ip netns`` makes them, each marked as ours.

A namespace is marked (alias of ``lo``) before it gets its name, and its name's file holds the mark before the namespace
is mounted over it: whatever is found after a SIGKILL can be proved ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from testbed.errors import KernelError, LabError
from testbed.kernel.links import IFLA_IFALIAS, LOOPBACK_IFINDEX, set_alias, set_link_up
from testbed.kernel.netlink import RouteSocket

NETNS_DIR = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED, _MNT_DETACH = 0x1000, 0x4000, 1 << 20, 2
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, operation: str) -> None:
    if result < 0:
        raise KernelError(operation, ctypes.get_errno())


def _mount(source: str, target: str, flags: int, kind: str = "none") -> int:
    return int(_libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None))


def _prepare_netns_dir() -> None:
    """Make ``/run/netns`` a shared mount, as the first ``ip netns add`` does."""
    NETNS_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = str(NETNS_DIR)
    if _mount("", path, _MS_SHARED | _MS_REC) < 0:
        if ctypes.get_errno() != errno.EINVAL:
            raise KernelError(f"mount --make-shared {path}", ctypes.get_errno())
        _check(_mount(path, path, _MS_BIND | _MS_REC), f"mount --bind {path} {path}")
        _check(_mount("", path, _MS_SHARED | _MS_REC), f"mount --make-shared {path}")


@contextlib.contextmanager
def entered(fd: int) -> Iterator[None]:
    """Move the calling thread into the network namespace of ``fd`` for the block."""
    origin = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, _CLONE_NEWNET), "setns")
        try:
            yield
        finally:
            _check(_libc.setns(origin, _CLONE_NEWNET), "setns back")
    finally:
        os.close(origin)


class RouteSockets:
    """A NETLINK_ROUTE socket of each of some namespaces; close it to let go of them.

    Args:
        netns: Descriptors of the namespaces, each as often as it comes.
    """

    def __init__(self, netns: Iterable[int]) -> None:
        self._sockets: dict[int, RouteSocket] = {}
        for descriptor in netns:
            if descriptor not in self._sockets:
                with entered(descriptor):
                    self._sockets[descriptor] = RouteSocket()

    def __getitem__(self, netns: int) -> RouteSocket:
        return self._sockets[netns]

    def close(self) -> None:
        """Close all."""
        for opened in self._sockets.values():
            opened.close()


def create_namespace(name: str, mark: str, sysctls: dict[str, str]) -> int:
    """Create a marked network namespace with ``lo`` up and return a file descriptor of it.

    Args:
        name: Name under ``/run/netns``.
        mark: Proof of ownership, set as the alias of ``lo``.
        sysctls: ``net/…`` path to value; a path this kernel lacks is skipped when it starts with ``?``.

    Raises:
        LabError: A namespace of that name exists.
        KernelError: The kernel refused.
    """
    _prepare_netns_dir()
    path = NETNS_DIR / name
    origin = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_CLONE_NEWNET), "unshare --net")
        try:
            with RouteSocket() as route:
                route.request([set_alias(LOOPBACK_IFINDEX, mark), set_link_up(LOOPBACK_IFINDEX, "lo")])
            for key, value in sysctls.items():
                write_sysctl(key, value)
            try:
                _create_name(path, mark)
            except FileExistsError:
                raise LabError(
                    f"a network namespace named {name!r} exists already",
                    hint="choose another lab name with --name, or `testbed gc` if a killed run left it",
                ) from None
            fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            if _mount("/proc/thread-self/ns/net", str(path), _MS_BIND) < 0:
                code = ctypes.get_errno()
                os.close(fd)
                path.unlink()
                raise KernelError(f"mount --bind /proc/self/ns/net {path}", code)
            return fd
        finally:
            _check(_libc.setns(origin, _CLONE_NEWNET), "setns back")
    finally:
        os.close(origin)


def _create_name(path: Path, mark: str) -> None:
    """Create a namespace's name with the mark in it, both at once: a name without it could not be proved ours.

    Raises:
        FileExistsError: The name is taken.
    """
    try:
        holder = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o444)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # a file system without O_TMPFILE
            raise
        holder = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        os.write(holder, mark.encode())
        os.close(holder)
        return
    try:
        os.write(holder, mark.encode())
        # With a directory given, even unused, Python calls linkat(AT_SYMLINK_FOLLOW); without one link(), which does not follow.
        os.link(f"/proc/self/fd/{holder}", path, src_dir_fd=holder)
    finally:
        os.close(holder)


def write_sysctl(key: str, value: str) -> None:
    """Write a sysctl of the calling thread's namespace; one that this kernel lacks is skipped when its path starts with ``?``.

    Raises:
        KernelError: The kernel refused it.
    """
    optional = key.startswith("?")
    path = Path("/proc/sys") / key.lstrip("?")
    try:
        path.write_text(value)
    except OSError as error:
        if not (optional and error.errno in (errno.ENOENT, errno.EINVAL)):
            raise KernelError(f"sysctl -w {key.lstrip('?').replace('/', '.')}={value}", error.errno or 0) from error


def delete_namespace(name: str, mark: str) -> bool:
    """Unmount and remove a namespace's name if it can be proved ours.

    Returns:
        True when it was removed or was not there; False when it is somebody else's.
    """
    path = NETNS_DIR / name
    if not path.exists():
        return True
    if read_mark(name) != mark:
        return False
    _libc.umount2(str(path).encode(), _MNT_DETACH)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return True


def read_mark(name: str) -> str | None:
    """Return the mark of a namespace, of its empty name file, or None when it has none."""
    path = NETNS_DIR / name
    try:
        if os.stat(path).st_dev == os.stat(NETNS_DIR).st_dev:
            return path.read_text(errors="replace")  # the name's file, nothing mounted over it
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with entered(fd):
            return _read_alias()
    except KernelError:
        return None
    finally:
        os.close(fd)


def _read_alias() -> str | None:
    """Return the alias of ``lo`` of the calling thread's namespace."""
    with RouteSocket() as route:
        alias = route.read_link(LOOPBACK_IFINDEX).get(IFLA_IFALIAS)
    return alias.rstrip(b"\0").decode(errors="replace") if alias else None


def open_namespace(name: str) -> int:
    """Return a file descriptor of a named namespace.

    Raises:
        LabError: There is none.
    """
    try:
        return os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LabError(f"no network namespace named {name!r}", hint="`testbed inspect` lists labs") from None
