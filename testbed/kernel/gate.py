"""Gates: the queues that a PFC frame stops, and the sockets that carry PFC frames past them.

A gate holds back the frames of a port's queue of one priority and lets them go again. How, is a back end's: `gate_tbf` turns
down the shaper, on every kernel; `gate_plug` uses the qdisc that is made for it, where the kernel has it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from testbed.errors import KernelError
from testbed.kernel.namespaces import RouteSockets, entered
from testbed.kernel.netlink import Message, RouteSocket

_SOL_PACKET, _PACKET_QDISC_BYPASS = 263, 20
_MAC_CONTROL, _PFC_OPCODE = 0x8808, 0x0101
_PFC_ADDRESS = bytes.fromhex("0180c2000001")
_KICK_ETHERTYPE = 0x88B5
_MIN_FRAME_BYTES = 60

QueueKey = tuple[int, int]
"""A queue: port id and priority."""


@dataclass(frozen=True, slots=True)
class DataQueue:
    """A port's queue of one priority, as its qdiscs are made.

    Attributes:
        index: Interface index.
        ifname: Interface.
        priority: Its priority.
        parent: Class that its qdiscs hang under.
        is_class: Whether that is one of several that share the port's rate; else this queue's shaper makes the rate.
        wall_rate_bytes_per_s: Of the port.
        burst_bytes: Its bucket.
        frame_wire_bytes: The largest frame with what the shaper charges beside.
        overhead_bytes: Charged per frame beside its length.
    """

    index: int
    ifname: str
    priority: int
    parent: int
    is_class: bool
    wall_rate_bytes_per_s: int
    burst_bytes: int
    frame_wire_bytes: int
    overhead_bytes: int


class GateBackEnd(Protocol):
    """Builds, closes and opens one kind of gate.

    Attributes:
        name: How the scenario names it.
        is_shaper: Whether the gate is a token bucket filter, which a queue then needs in any case.
        needs_kick: Whether an opened queue stands until a frame is added to it.
    """

    name: str
    is_shaper: bool
    needs_kick: bool

    def create(self, queue: DataQueue, parent: int) -> list[Message]:
        """Return what hangs the gate under a class, open; nothing where it is the shaper above."""

    def close(self, queue: DataQueue) -> Message:
        """Return what holds the queue back."""

    def open(self, queue: DataQueue) -> Message:
        """Return what lets it go again."""


@dataclass(frozen=True, slots=True)
class GatedQueue:
    """A queue that can be stopped.

    Attributes:
        port: Port id.
        peer: Port id of the other end.
        netns: Descriptor of its namespace.
        queue: Its qdiscs.
    """

    port: int
    peer: int
    netns: int
    queue: DataQueue


class QueueGates:
    """The gates of a fabric's queues.

    Args:
        queues: The queues.
        sockets: A bypassing socket on the other end of each, by port id; see :func:`open_bypass_socket`.
        back_end: How they are closed and opened.
    """

    def __init__(
        self, queues: Sequence[GatedQueue], sockets: Mapping[int, socket.socket], back_end: GateBackEnd
    ) -> None:
        self._back_end = back_end
        self._queues = {(one.port, one.queue.priority): one.queue for one in queues}
        self._sockets: dict[QueueKey, socket.socket] = {}
        self._close: dict[QueueKey, Message] = {}
        self._open: dict[QueueKey, Message] = {}
        self._route: dict[QueueKey, RouteSocket] = {}
        self._routes = RouteSockets(one.netns for one in queues)
        for one in queues:
            key = one.port, one.queue.priority
            self._sockets[key] = sockets[one.peer]
            self._close[key], self._open[key] = back_end.close(one.queue), back_end.open(one.queue)
            self._route[key] = self._routes[one.netns]

    def close(self) -> None:
        """Close the netlink sockets; gates stay as they are."""
        self._routes.close()

    def set_rates(self, wall_rates_bytes_per_s: Mapping[int, int]) -> None:
        """Let ports have another rate when they are next opened; ports without a gate do not matter."""
        for key, queue in self._queues.items():
            rate = wall_rates_bytes_per_s.get(key[0])
            if rate is not None:
                self._open[key] = self._back_end.open(replace(queue, wall_rate_bytes_per_s=rate))

    def move(self, close: Sequence[QueueKey], open: Sequence[QueueKey]) -> None:
        """Close some gates and open others, a request per namespace, and kick what was opened.

        Raises:
            KernelError: The kernel refused.
        """
        requests: dict[RouteSocket, list[Message]] = {}
        for key in close:
            requests.setdefault(self._route[key], []).append(self._close[key])
        for key in open:
            requests.setdefault(self._route[key], []).append(self._open[key])
        for route, messages in requests.items():
            route.request(messages)
        for key in open if self._back_end.needs_kick else ():
            _transmit(self._sockets[key], kick_frame(key[1]))


def kick_frame(priority: int) -> bytes:
    """Return the small frame that the other end turns round into a port's queue of a priority."""
    return bytes(12) + struct.pack("!HH", _KICK_ETHERTYPE, priority) + bytes(_MIN_FRAME_BYTES - 16)


class PauseSender:
    """Sends PFC frames out of ports.

    Args:
        sockets: A bypassing socket on each port, by port id.
        macs: MAC address of each port, by port id.
    """

    def __init__(self, sockets: Mapping[int, socket.socket], macs: Mapping[int, bytes]) -> None:
        self._sockets = sockets
        self._heads = {
            port: _PFC_ADDRESS + mac + struct.pack("!HH", _MAC_CONTROL, _PFC_OPCODE) for port, mac in macs.items()
        }

    def send(self, port: int, priority: int, quanta: int) -> None:
        """Send one frame about one priority: ``quanta`` > 0 is XOFF, 0 is XON."""
        field = struct.pack("!9H", 1 << priority, *(quanta if number == priority else 0 for number in range(8)))
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
