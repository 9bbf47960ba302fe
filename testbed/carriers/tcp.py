"""Kernel TCP as a transport: what training on CPUs used. A connection of the plan is a TCP connection between the hosts."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from testbed.carriers.buffers import Bytes, RankBuffers
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.kernel.namespaces import entered, open_namespace
from testbed.plan.model import PlannedWorkload
from testbed.roce.wire import ROCE_UDP_PORT, data_tos

_CONNECT_TIMEOUT_S = 10.0
# Room for all that a tick of a fast link brings, so that the window is TCP's decision and not the buffer's.
_SOCKET_BUFFER_BYTES = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_READ_BYTES = 1 << 20
_ECN_BITS = 0b11
# struct tcp_info, include/uapi/linux/tcp.h: tcpi_total_retrans is the 32-bit word at byte 100.
_TOTAL_RETRANSMITS_OFFSET = 100


class _Sender:
    """The requester's end: messages posted, and how much of the first the kernel has taken."""

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened
        self.posted: deque[memoryview] = deque()

    def pump(self) -> None:
        """Give the kernel what it takes."""
        with contextlib.suppress(BlockingIOError):
            while self.posted:
                left = self.posted[0]
                taken = self.socket.send(left)
                if taken < len(left):
                    self.posted[0] = left[taken:]
                else:
                    self.posted.popleft()


class _Receiver:
    """The responder's end: the stream cut into messages again."""

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened
        self.expected: deque[tuple[int, int]] = deque()  # transfer and size
        self.data = np.empty(_READ_BYTES, np.uint8)
        self.filled = 0

    def expect(self, transfer: int, nbytes: int) -> None:
        """Take note of the next message."""
        self.expected.append((transfer, nbytes))

    def pump(self) -> Iterator[tuple[int, Bytes]]:
        """Read what has come; yield each message that is whole."""
        with contextlib.suppress(BlockingIOError):
            while self.expected:
                transfer, nbytes = self.expected[0]
                if len(self.data) < nbytes:
                    self.data = np.concatenate((self.data[: self.filled], np.empty(nbytes - self.filled, np.uint8)))
                got = self.socket.recv_into(self.data[self.filled : nbytes].data)
                if not got:
                    raise RunError("a TCP connection was closed while bytes were under way")
                self.filled += got
                if self.filled == nbytes:
                    yield transfer, self.data[:nbytes]
                    self.expected.popleft()
                    self.filled = 0


class TcpTransport:
    """TCP connections between the hosts of a fabric.

    Args:
        fabric: The fabric.
        planned: The workload; each of its connections is one of TCP.
        buffers: The ranks' buffers.

    Raises:
        RunError: A connection cannot be made.
    """

    def __init__(self, fabric: Fabric, planned: PlannedWorkload, buffers: RankBuffers) -> None:
        self._buffers = buffers
        self._nbytes = planned.schedule.nbytes.tolist()
        self._senders: list[_Sender] = []
        self._receivers: list[_Receiver] = []
        tos = data_tos(fabric.plan.scenario.qos.lossless_priority) & ~_ECN_BITS  # which are TCP's own
        try:
            self._connect_all(fabric, planned, tos)
        except BaseException:
            self.close()
            raise

    def _connect_all(self, fabric: Fabric, planned: PlannedWorkload, tos: int) -> None:
        topology = fabric.plan.topology
        with contextlib.ExitStack() as stack:
            netns: dict[int, int] = {}
            for connection in planned.connections:
                for end in (connection.requester.local, connection.responder.local):
                    node = topology.nics[end.nic].node
                    if node not in netns:
                        netns[node] = open_namespace(fabric.namespace_of(topology.nodes[node].name))
                        stack.callback(os.close, netns[node])
            for connection in planned.connections:
                source, target = connection.requester.local, connection.responder.local
                with entered(netns[topology.nics[target.nic].node]), _tcp_socket(tos) as listener:
                    listener.bind((_dotted(target.address), ROCE_UDP_PORT))
                    listener.listen(1)
                    with entered(netns[topology.nics[source.nic].node]):
                        sender = _tcp_socket(tos)
                    self._senders.append(_Sender(sender))
                    sender.settimeout(_CONNECT_TIMEOUT_S)
                    try:
                        # The ports of the plan, by which switches hash: paths are then those that it predicts.
                        sender.bind((_dotted(source.address), connection.requester.udp_source_port))
                        sender.connect((_dotted(target.address), ROCE_UDP_PORT))
                        accepted, _ = listener.accept()
                    except OSError as error:
                        raise RunError(
                            f"TCP from rank {source.rank} to rank {target.rank}: {error.strerror or error}",
                            hint="`testbed exec HOST -- ping ADDRESS` in a deployed lab shows whether hosts reach each other",
                        ) from None
                accepted.setblocking(False)
                sender.setblocking(False)
                self._receivers.append(_Receiver(accepted))

    def post(self, connection: int, transfer: int) -> None:
        """Begin to send a transfer."""
        self._receivers[connection].expect(transfer, self._nbytes[transfer])
        sender = self._senders[connection]
        sender.posted.append(self._buffers.source(transfer).data)
        sender.pump()

    def poll(self) -> Sequence[tuple[int, int]]:
        """Move what can be moved; return connection and transfer of each message that is whole."""
        whole = []
        for connection, receiver in enumerate(self._receivers):
            for transfer, data in receiver.pump():
                self._buffers.deliver(transfer, data)
                whole.append((connection, transfer))
        for sender in self._senders:
            if sender.posted:
                sender.pump()
        return whole

    def react(self, now_ns: int) -> None:
        """Do nothing: TCP has a congestion control of its own."""

    def retransmitted_packets(self) -> int:
        """Return how many segments all senders have sent again."""
        total = 0
        for sender in self._senders:
            info = sender.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("=I", info, _TOTAL_RETRANSMITS_OFFSET)[0]
        return total

    def predicted_cct_ratio(self) -> float | None:
        """Return None: the paths are the plan's, and so is the prediction."""
        return None

    def close(self) -> None:
        """Close every connection."""
        for opened in [one.socket for one in self._senders] + [one.socket for one in self._receivers]:
            opened.close()


def _tcp_socket(tos: int) -> socket.socket:
    """Return a socket of the namespace that the thread is in, in the data's priority."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    opened.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Ports are used again by the next item of a workload: no TIME_WAIT may hold them.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        opened.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
    return opened


def _dotted(address: int) -> str:
    return socket.inet_ntoa(struct.pack("!I", address))
