"""A rate for each queue pair of a NIC: below the NIC's own shaper an HTB with a class for each, whose rate may change.

The class is named by ``skb->priority``, which the host's egress program sets by the destination QP (TB_QP_CLASS in
bpf/fabric.h). A new rate holds for the frames that wait already, as it does in a NIC; what is not of such a queue pair has a
class without a limit.

Source:
    Linux net/sched/sch_htb.c: ``htb_classify()``; ``htb_change_class()`` leaves the tokens of a class as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from testbed.kernel import tc
from testbed.kernel.delay_netem import netem_handle
from testbed.kernel.egress import Egress
from testbed.kernel.gate_tbf import shaper_handle
from testbed.kernel.namespaces import RouteSockets
from testbed.kernel.netlink import Message

_HTB_HANDLE, _FIFO_HANDLE = 0x70_0000, 0x71_0000
_OTHERS_CLASS = _HTB_HANDLE + 1
_FIRST_QP_CLASS = _HTB_HANDLE + 0x100
# The NIC's shaper limits what is of no queue pair.
_OTHERS_SPEEDUP = 16
_MIN_BURST_FRAMES = 2
MOST_WALL_DEBT_S = 60.0
"""How long a class owes at most for its last frame, whatever its rate is after (``htb_class.mbuffer``)."""


@dataclass(frozen=True, slots=True)
class QpPort:
    """A NIC whose queue pairs have rates.

    Attributes:
        netns: Descriptor of its namespace.
        egress: How its egress was made; with one data priority, and no qdisc that is a gate.
        connections: Numbers of the connections that send from it.
    """

    netns: int
    egress: Egress
    connections: Sequence[int]


class QpShaper:
    """Shapes queue pairs; close it to let go of its sockets.

    Args:
        ports: The NICs.
    """

    def __init__(self, ports: Sequence[QpPort]) -> None:
        self._ports = ports
        self._port_of = {connection: port for port in ports for connection in port.connections}
        self._sockets = RouteSockets(port.netns for port in ports)

    def close(self) -> None:
        """Close the sockets; rates stay as they are."""
        self._sockets.close()

    def create(self) -> None:
        """Hang the classes below the NICs' shapers, each at its NIC's rate, while nothing is under way.

        An HTB that stands already keeps what waits in it.

        Raises:
            KernelError: The kernel refused.
        """
        for port in self._ports:
            egress = port.egress
            messages = [] if self._stands(port) else [_create_htb(egress)]
            rates = [(_OTHERS_CLASS, egress.wall_rate_bytes_per_s * _OTHERS_SPEEDUP)]
            rates += [(_FIRST_QP_CLASS + one, egress.wall_rate_bytes_per_s) for one in port.connections]
            for classid, rate in rates:
                messages.append(_create_class(egress, classid, rate))
                messages.append(tc.create_pfifo(egress.index, egress.ifname, classid, 0, tc.MOST_PACKETS))
            self._sockets[port.netns].request(messages)

    def lift(self) -> None:
        """Let every class that there is, an earlier run's too, send at its NIC's rate: what waits leaves, in time.

        Each still owes for its last frame at the rate that it had.

        Raises:
            KernelError: The kernel refused.
        """
        for port in self._ports:
            egress, route = port.egress, self._sockets[port.netns]
            classes = tc.read_classes(route, egress.index, egress.ifname)
            route.request(
                _create_class(egress, one, egress.wall_rate_bytes_per_s)
                for one in classes
                if _FIRST_QP_CLASS <= one < _FIFO_HANDLE
            )

    def delete(self) -> None:
        """Let the NICs send as they did before, while nothing is under way: what waits is thrown away and never accounted.

        Raises:
            KernelError: The kernel refused.
        """
        for port in self._ports:
            if self._stands(port):
                self._sockets[port.netns].request([_create_fifo(port.egress)])

    def _stands(self, port: QpPort) -> bool:
        qdiscs = tc.read_qdiscs(self._sockets[port.netns])
        return any((index, handle) == (port.egress.index, _HTB_HANDLE) for index, handle, _, _ in qdiscs)

    def change(self, wall_rates_bytes_per_s: Mapping[int, int]) -> None:
        """Give the queue pairs of some connections another rate.

        Raises:
            KernelError: The kernel refused.
        """
        requests: dict[int, list[Message]] = {}
        for connection, rate in wall_rates_bytes_per_s.items():
            port = self._port_of[connection]
            message = _create_class(port.egress, _FIRST_QP_CLASS + connection, rate)
            requests.setdefault(port.netns, []).append(message)
        for netns, messages in requests.items():
            self._sockets[netns].request(messages)


def _parent(egress: Egress) -> int:
    """Return the class that the frames of a NIC's data queue wait in."""
    queue = egress.queue(egress.weights[0][0])
    return (netem_handle(queue.priority) if egress.wall_delay_ns else shaper_handle(queue)) + 1


def _create_fifo(egress: Egress) -> Message:
    return tc.create_pfifo(egress.index, egress.ifname, _parent(egress), _FIFO_HANDLE, tc.MOST_PACKETS)


def _create_htb(egress: Egress) -> Message:
    return tc.create_htb(egress.index, egress.ifname, _parent(egress), _HTB_HANDLE, _OTHERS_CLASS)


def _create_class(egress: Egress, classid: int, wall_rate_bytes_per_s: int) -> Message:
    # What the NIC may make up for when this machine was late, a class may in proportion.
    burst_bytes = egress.burst_bytes * wall_rate_bytes_per_s // egress.wall_rate_bytes_per_s
    return tc.create_htb_class(
        egress.index,
        egress.ifname,
        _HTB_HANDLE,
        classid,
        rate_bytes_per_s=wall_rate_bytes_per_s,
        ceil_bytes_per_s=wall_rate_bytes_per_s,
        burst_bytes=max(_MIN_BURST_FRAMES * egress.frame_wire_bytes, burst_bytes),
        quantum_bytes=egress.frame_wire_bytes,
        overhead_bytes=egress.overhead_bytes,
    )
