"""Gates: the queues that a PFC frame stops, and the sockets that carry PFC frames past them.

A gate holds back the frames of a port's data queue and lets them go again. ``TbfGates`` does so with the shaper that is there
anyway: closed, its rate is a crawl, which lets the one frame go that a real port would finish; open, it has its rate again.
A token bucket filter does not look at its queue when it is changed, so a kick follows: a small frame through the queue.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from testbed.errors import KernelError
from testbed.kernel import tc
from testbed.kernel.namespaces import entered
from testbed.kernel.netlink import Message, RouteSocket

_SOL_PACKET, _PACKET_QDISC_BYPASS = 263, 20
# A frame a week: it never sends a second one, and the kernel's arithmetic holds.
_CRAWL_BYTES_PER_S = 1
_MAC_CONTROL, _PFC_OPCODE = 0x8808, 0x0101
_PFC_ADDRESS = bytes.fromhex("0180c2000001")
_KICK_ETHERTYPE = 0x88B5
_MIN_FRAME_BYTES = 60


class Gates(Protocol):
    """Holds back and lets go the data queues of ports, by port id."""

    def move(self, close: Sequence[int], open: Sequence[int]) -> None:
        """Close some gates and open others.

        Raises:
            KernelError: The kernel refused.
        """

    def set_rates(self, wall_rates_bytes_per_s: Mapping[int, int]) -> None:
        """Let ports have another rate when they are next opened; ports without a gate do not matter."""


@dataclass(frozen=True, slots=True)
class GatedPort:
    """A port whose data queue can be stopped.

    Attributes:
        port: Port id.
        peer: Port id of the other end.
        index: Interface index.
        ifname: Interface.
        netns: Descriptor of its namespace.
        wall_rate_bytes_per_s: Of its shaper.
        burst_bytes: Its bucket.
        frame_wire_bytes: The largest frame with what the shaper charges beside.
        overhead_bytes: Charged per frame beside its length.
    """

    port: int
    peer: int
    index: int
    ifname: str
    netns: int
    wall_rate_bytes_per_s: int
    burst_bytes: int
    frame_wire_bytes: int
    overhead_bytes: int


class TbfGates:
    """Gates that are the token bucket filters of the ports.

    Args:
        ports: The ports.
        sockets: A bypassing socket on the other end of each, by port id; see :func:`open_bypass_socket`.
    """

    def __init__(self, ports: Sequence[GatedPort], sockets: Mapping[int, socket.socket]) -> None:
        self._ports = {port.port: port for port in ports}
        self._sockets = {port.port: sockets[port.peer] for port in ports}
        self._close = {port.port: _shaper(port, _CRAWL_BYTES_PER_S, port.frame_wire_bytes) for port in ports}
        self._open = {port.port: _shaper(port, port.wall_rate_bytes_per_s, port.burst_bytes) for port in ports}
        self._route: dict[int, RouteSocket] = {}
        by_netns: dict[int, RouteSocket] = {}
        for port in ports:
            if port.netns not in by_netns:
                with entered(port.netns):
                    by_netns[port.netns] = RouteSocket()
            self._route[port.port] = by_netns[port.netns]
        self._kick = bytes(12) + struct.pack("!H", _KICK_ETHERTYPE) + bytes(_MIN_FRAME_BYTES - 14)

    def close(self) -> None:
        """Close the netlink sockets; gates stay as they are."""
        for route in set(self._route.values()):
            route.close()

    def set_rates(self, wall_rates_bytes_per_s: Mapping[int, int]) -> None:
        """Let ports have another rate when they are next opened; ports without a gate do not matter."""
        for port, rate in wall_rates_bytes_per_s.items():
            if port in self._ports:
                self._open[port] = _shaper(self._ports[port], rate, self._ports[port].burst_bytes)

    def move(self, close: Sequence[int], open: Sequence[int]) -> None:
        """Close some gates and open others, a request per namespace, and kick what was opened."""
        requests: dict[RouteSocket, list[Message]] = {}
        for port in close:
            requests.setdefault(self._route[port], []).append(self._close[port])
        for port in open:
            requests.setdefault(self._route[port], []).append(self._open[port])
        for route, messages in requests.items():
            route.request(messages)
        for port in open:
            _transmit(self._sockets[port], self._kick)


def _shaper(port: GatedPort, rate: int, burst: int) -> Message:
    return tc.create_tbf(
        port.index,
        port.ifname,
        tc.ROOT_HANDLE + 1,
        tc.DATA_HANDLE,
        rate_bytes_per_s=rate,
        burst_bytes=burst,
        overhead_bytes=port.overhead_bytes,
    )


class PauseSender:
    """Sends PFC frames out of ports.

    Args:
        sockets: A bypassing socket on each port, by port id.
        macs: MAC address of each port, by port id.
        priority: The priority that the frames stop.
    """

    def __init__(self, sockets: Mapping[int, socket.socket], macs: Mapping[int, bytes], priority: int) -> None:
        self._sockets = sockets
        self._heads = {
            port: _PFC_ADDRESS + mac + struct.pack("!HHH", _MAC_CONTROL, _PFC_OPCODE, 1 << priority)
            for port, mac in macs.items()
        }
        self._priority = priority

    def send(self, port: int, quanta: int) -> None:
        """Send one frame: ``quanta`` > 0 is XOFF, 0 is XON."""
        field = struct.pack("!8H", *(quanta if number == self._priority else 0 for number in range(8)))
        frame = self._heads[port] + field
        _transmit(self._sockets[port], frame + bytes(_MIN_FRAME_BYTES - len(frame)))


def _transmit(opened: socket.socket, frame: bytes) -> None:
    try:
        opened.send(frame)
    except OSError as error:
        raise KernelError("send a control frame", error.errno or 0) from error


def open_bypass_socket(ifname: str) -> socket.socket:
    """Return a send-only packet socket on an interface of the calling thread's namespace that passes by its queues.

    A MAC control frame does not wait behind data; ``tcpdump`` sees it at the receiving end of the link.

    Raises:
        KernelError: No permission, or no such interface.
    """
    opened = None
    try:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        opened.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
        opened.bind((ifname, 0))
    except OSError as error:
        if opened is not None:
            opened.close()
        raise KernelError(f"open a packet socket on {ifname}", error.errno or 0) from error
    return opened


@contextlib.contextmanager
def bypass_sockets(ports: Sequence[tuple[int, str, int]]) -> Iterator[dict[int, socket.socket]]:
    """Open a bypassing socket on each of some ports for the block.

    Args:
        ports: Port id, interface and descriptor of the namespace of each.
    """
    opened: dict[int, socket.socket] = {}
    try:
        for port, ifname, netns in ports:
            with entered(netns):
                opened[port] = open_bypass_socket(ifname)
        yield opened
    finally:
        for one in opened.values():
            with contextlib.suppress(OSError):
                one.close()


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Close file descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
