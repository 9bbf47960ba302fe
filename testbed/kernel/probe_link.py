"""The fidelity probe: a veth pair of its own through which the engine measures how long a frame waits for the fabric's CPU.

It lives in a namespace without a name that goes with the process, so nothing of it can be left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Callable

import numpy as np

from testbed.errors import KernelError
from testbed.kernel.bpf import load_object, map_array
from testbed.kernel.layout import PROBE_PROGRAM
from testbed.kernel.links import create_veth, set_link_up
from testbed.kernel.namespaces import entered
from testbed.kernel.netlink import RouteSocket
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.rps import SYSCTL, cpu_mask, has_default_mask, steer_ports
from testbed.kernel.tc import TC_H_INGRESS_HOOK, attach_filter, create_clsact

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_FRAME = bytes.fromhex("020000000002020000000001 88b5".replace(" ", "")) + bytes(
    46
)  # IEEE local experimental EtherType
_IFLA_OPERSTATE, _IF_OPER_UP = 16, 6
_UP_TIMEOUT_S = 10.0
_LOOK_S = 0.0005


class ProbeLink:
    """Sends probe frames and reads when they arrived.

    Args:
        cpu: The CPU whose backlog is probed.
        now_ns: CLOCK_MONOTONIC.
    """

    def __init__(self, cpu: int, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._sent = 0
        self._sent_ns = 0
        self._refused_ns = 0
        self._waits: list[int] = []
        origin = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.unshare(_CLONE_NEWNET) < 0:
                raise KernelError("unshare --net", ctypes.get_errno())
            try:
                self._netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                if has_default_mask():
                    with open(f"/proc/sys/{SYSCTL}", "w") as file:
                        file.write(cpu_mask(cpu))
            finally:
                _libc.setns(origin, _CLONE_NEWNET)
        finally:
            os.close(origin)
        loaded = load_object(map_entries={"tb_probe": 2}, initial_values={}, programs=(PROBE_PROGRAM,))
        # [0] time of the last arrival, [1] number of arrivals
        self._arrival = np.frombuffer(map_array(loaded.maps["tb_probe"], 16), np.uint64, count=2)
        with entered(self._netns), RouteSocket() as route, contextlib.closing(loaded):
            route.request(
                [
                    create_veth(
                        ifname="probe0",
                        index=2,
                        mac="02:00:00:00:00:01",
                        mtu=1500,
                        peer_ifname="probe1",
                        peer_index=3,
                        peer_mac="02:00:00:00:00:02",
                        peer_netns_fd=self._netns,
                    ),
                    create_clsact(3, "probe1"),
                    attach_filter(3, "probe1", TC_H_INGRESS_HOOK, loaded.programs[PROBE_PROGRAM], PROBE_PROGRAM),
                    set_link_up(2, "probe0"),
                    set_link_up(3, "probe1"),
                ]
            )
            _wait_until_up(route, 2, "probe0")
            self._socket = open_packet_socket("probe0")
        if not has_default_mask():
            steer_ports(self._netns, ["probe1"], cpu)

    def send(self, now_ns: int) -> None:
        """Note the last probe's wait and send the next, unless one is still under way."""
        if self._sent and not self._refused_ns:
            if int(self._arrival[1]) < self._sent:
                return
            self._waits.append(max(0, int(self._arrival[0]) - self._sent_ns))
        start_ns = self._refused_ns or self._now_ns()
        try:
            self._socket.send(_FRAME)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            # The CPU's backlog is full: this probe waits outside, from now until it is let in.
            self._refused_ns = start_ns
            return
        self._sent_ns, self._refused_ns = start_ns, 0
        self._sent += 1

    def restart(self) -> None:
        """Forget the waits so far."""
        self._waits = []

    def waits_ns(self) -> list[int]:
        """Return the wait of every probe so far, and the age of one that has not arrived."""
        pending = self._sent and int(self._arrival[1]) < self._sent
        return self._waits + ([self._now_ns() - self._sent_ns] if pending else [])

    def close(self) -> None:
        """Close socket and namespace; the kernel removes the links."""
        self._socket.close()
        os.close(self._netns)


def _wait_until_up(route: RouteSocket, index: int, ifname: str) -> None:
    """Wait until a link that was set up passes frames.

    The kernel says so a moment later, from a worker that waits for the lock of all links, which the removal of an earlier fabric
    may hold for long. Until then frames are dropped, and a probe that was would be waited for ever after.

    Raises:
        KernelError: It never does.

    Source:
        Linux, net/core/link_watch.c, linkwatch_do_dev().
    """
    deadline = time.monotonic() + _UP_TIMEOUT_S
    while route.read_link(index).get(_IFLA_OPERSTATE, b"\0")[0] != _IF_OPER_UP:
        if time.monotonic() > deadline:
            raise KernelError(f"ip link set {ifname} up", errno.ENETDOWN)
        time.sleep(_LOOK_S)
