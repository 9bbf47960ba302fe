"""Receive packet steering: every port of a node is served by one fixed CPU, so that frames are never reordered."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

from testbed.errors import KernelError

SYSCTL = "net/core/rps_default_mask"
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def cpu_mask(cpu: int) -> str:
    """Return the mask of one CPU as sysfs writes it, 32 bits a group."""
    groups = [0] * (cpu // 32 + 1)
    groups[-1 - cpu // 32] = 1 << (cpu % 32)
    return ",".join(f"{group:08x}" for group in groups)


def has_default_mask() -> bool:
    """Tell whether a namespace's new ports can be steered by sysctl.

    Linux kernel commit 605cfa1b1079 "net: introduce default_rps_mask netns attribute" (in v6.3); before, each port's
    sysfs file must be written.
    """
    return (Path("/proc/sys") / SYSCTL).exists()


def steer_ports(netns_fd: int, ifnames: Sequence[str], cpu: int) -> None:
    """Write ``rps_cpus`` of a namespace's ports through a sysfs of its own, from a child process.

    Raises:
        KernelError: It could not be written.
    """
    child = os.fork()
    if child == 0:
        try:
            _must(_libc.unshare(_CLONE_NEWNS))
            _must(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
            _must(_libc.setns(netns_fd, _CLONE_NEWNET))
            _must(_libc.mount(b"sysfs", b"/sys", b"sysfs", ctypes.c_ulong(0), None))
            for ifname in ifnames:
                Path(f"/sys/class/net/{ifname}/queues/rx-0/rps_cpus").write_text(cpu_mask(cpu))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status:
        raise KernelError(f"steer {', '.join(ifnames)} to CPU {cpu} through sysfs", 5)


def _must(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
