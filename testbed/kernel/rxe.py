"""Soft-RoCE devices: rdma_rxe on top of an interface in a network namespace.

Whether the kernel's rxe knows namespaces is found out by trying: since it does, a device made inside a namespace has its UDP
socket there. Before, all sockets are in the initial namespace, where then the devices must stand
(:mod:`testbed.kernel.attachment`).
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import time
from pathlib import Path

from testbed.errors import KernelError, MachineError
from testbed.kernel.namespaces import entered

_DEVICES = Path("/sys/class/infiniband")
_ROCE_UDP_PORT_HEX = "12B7"
_PACKAGES = {"rdma": "iproute2", "modprobe": "kmod"}
# Devices and their ports' states come and go asynchronously.
_PATIENCE_S = 10.0
_LOOK_S = 0.005
# What the program says where the kernel has no RDMA at all, or no such type of link.
_NO_RXE_SIGNS = ("NETLINK_RDMA", "not supported", "No such file")


def create_rxe(name: str, ifname: str, netns_fd: int) -> bool:
    """Create a device on an interface of a namespace; names are global.

    Returns:
        False where rxe does not know namespaces; the device is then gone again.

    Raises:
        MachineError: The kernel or a program for it is missing.
        KernelError: The kernel refused it.
    """
    with entered(netns_fd):
        _add(name, ifname)
        listening = _listens_here()
    if not listening:
        delete_rxe(name)
    return listening


def create_rxe_here(name: str, ifname: str) -> None:
    """Create a device on an interface of the calling thread's namespace, for a kernel whose rxe does not know namespaces.

    Raises:
        MachineError: This is not the initial namespace, or the kernel or a program for it is missing.
        KernelError: The kernel refused it.
    """
    _add(name, ifname)
    if not _listens_here():
        delete_rxe(name)
        raise MachineError(
            "this kernel's rxe works in the initial network namespace alone, and this process is in another",
            hint="run on the host itself, or `testbed run --virtual-time SCENARIO`",
        )


def _add(name: str, ifname: str) -> None:
    _load("rdma_rxe")
    done = _run("rdma", "link", "add", name, "type", "rxe", "netdev", ifname)
    if not done.returncode:
        return
    words = done.stderr.strip()
    if not any(sign in words for sign in _NO_RXE_SIGNS):
        raise KernelError(f"rdma link add {name} type rxe netdev {ifname}", errno.EINVAL, words)
    if shutil.which("modprobe") is None:
        raise MachineError(
            f"rdma_rxe is not loaded, and there is no program 'modprobe': {words}",
            hint="apt-get install kmod",
        )
    raise MachineError(
        f"this kernel has no rdma_rxe: {words}",
        hint="`testbed run --virtual-time SCENARIO` and `testbed vm run -- COMMAND` bring a kernel that has",
    )


def has_device(name: str) -> bool:
    """Return whether an RDMA device of that name exists, in whatever namespace."""
    return (_DEVICES / name).exists()


def delete_rxe(name: str) -> None:
    """Delete a device and wait until it is gone.

    Raises:
        MachineError: The program for it is missing.
    """
    _run("rdma", "link", "delete", name)
    deadline = time.monotonic() + _PATIENCE_S
    while has_device(name) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def find_gid(name: str, address: str) -> tuple[int, str]:
    """Return index and text of a device's RoCEv2 GID for an IPv4 address.

    Raises:
        MachineError: It has none.
    """
    wanted = "0000:0000:0000:0000:0000:ffff:" + ":".join(
        f"{int(high):02x}{int(low):02x}" for high, low in (address.split(".")[:2], address.split(".")[2:])
    )
    port = _DEVICES / name / "ports" / "1"
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        for gid in (port / "gids").iterdir():
            kind = port / "gid_attrs" / "types" / gid.name
            with contextlib.suppress(OSError):
                if gid.read_text().strip() == wanted and "v2" in kind.read_text():
                    return int(gid.name), wanted
        time.sleep(_LOOK_S)
    raise MachineError(f"{name} has no RoCEv2 GID for {address}", hint=f"look at `rdma link show {name}/1`")


def read_rxe_counters(name: str) -> dict[str, int]:
    """Return a device's counters by their names in the kernel."""
    folder = _DEVICES / name / "ports" / "1" / "hw_counters"
    found = {}
    for entry in folder.iterdir():
        with contextlib.suppress(OSError, ValueError):
            found[entry.name] = int(entry.read_text())
    return found


def load_connection_manager() -> None:
    """Load what gives programs RDMA's connection manager (librdmacm), where it is a module."""
    _load("rdma_ucm")


def _load(module: str) -> None:
    """Load a module; it may be built in or loaded already, so whether it is there is for its user to find out."""
    if shutil.which("modprobe") is not None:
        _run("modprobe", "-q", module)


def _listens_here() -> bool:
    """Return whether a UDP socket of this namespace has RoCE's port."""
    return any(
        line.split()[1].endswith(f":{_ROCE_UDP_PORT_HEX}")
        for line in Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]
    )


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MachineError(
            f"there is no program {command[0]!r}", hint=f"apt-get install {_PACKAGES[command[0]]}"
        ) from None
