"""Our RoCEv2 against the kernel's: the engine writes into rxe's memory, and rxe to a responder that keeps the bytes.

A queue pair of rxe stands in the place of one end of the first connection of a fabric's first workload. What the two ends must
know of each other (QP numbers, PSN, key, address) is exchanged in the process that has both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

from testbed.carriers.buffers import Bytes
from testbed.carriers.engine import describe_connection, engine_setup
from testbed.carriers.flow_control import flow_control
from testbed.carriers.verbs import VerbsDevice, connect_rc, create_rc, import_verbs
from testbed.collectives.schedule import ScheduleBuilder
from testbed.engine.frames import ForeignMemory
from testbed.engine.loop import TickLoop
from testbed.engine.setup import IterationResult
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.kernel.namespaces import entered, open_namespace
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.probe_link import ProbeLink
from testbed.kernel.roce_socket import read_frame, roce_listener
from testbed.kernel.rxe import read_rxe_counters
from testbed.kernel.scheduling import MonotonicClock
from testbed.roce.queue_pairs import QPN_BASE, REQUESTER, RESPONDER, Connection, QueuePair, qp_index
from testbed.roce.responder import StoreQueuePair, StoreResponder
from testbed.roce.wire import data_tos, source_port
from testbed.topology import Port, format_address

_MESSAGES = 64
# 4.096 us * 2^14 = 67 ms: far above a round trip of the labs this is for, and soon enough after a loss at a message's end.
_ACK_TIMEOUT_EXPONENT = 14


class RxeEnd:
    """A reliable queue pair of rxe at a NIC, with a buffer that its peer may write into.

    Args:
        verbs: pyverbs' modules.
        device: The NIC's device.
        buffer: The memory.
        stack: Closes what is opened.

    Attributes:
        qpn: Its QP number.
        rkey: The buffer's key.
        virtual_address: Where the buffer begins.
    """

    def __init__(self, verbs: Any, device: VerbsDevice, buffer: Bytes, stack: contextlib.ExitStack) -> None:
        self._verbs, self._device, self._buffer = verbs, device, buffer
        self._qp = create_rc(verbs, device, _MESSAGES, stack)
        enums = verbs.enums
        access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
        self._region = verbs.mr.MR(device.pd, buffer.nbytes, access, address=buffer.ctypes.data)
        stack.callback(self._region.close)
        self.qpn = int(self._qp.qp_num)
        self.rkey = int(self._region.rkey)
        self.virtual_address = buffer.ctypes.data

    def connect(self, remote_address: int, remote_qpn: int, psn: int, *, mtu_bytes: int, tos: int) -> None:
        """Connect it to the other end; both count their packets from ``psn``.

        Raises:
            RunError: The kernel refused it.
        """
        gid = self._verbs.addr.GID(
            f"0000:0000:0000:0000:0000:ffff:{remote_address >> 16:04x}:{remote_address & 0xFFFF:04x}"
        )
        try:
            connect_rc(
                self._verbs,
                self._qp,
                self._device,
                remote_gid=gid,
                remote_qpn=remote_qpn,
                tos=tos,
                mtu_bytes=mtu_bytes,
                psn=psn,
                ack_timeout_exponent=_ACK_TIMEOUT_EXPONENT,
            )
        except Exception as error:  # pyverbs' errors have no base of their own
            raise RunError(f"queue pair {self.qpn:#x} of {self._device.name}: {error}") from error

    def write(self, offset: int, nbytes: int, *, virtual_address: int, rkey: int, immediate: int | None = None) -> None:
        """Post an RDMA WRITE of a part of the buffer."""
        enums = self._verbs.enums
        opcode = enums.IBV_WR_RDMA_WRITE if immediate is None else enums.IBV_WR_RDMA_WRITE_WITH_IMM
        request = self._request(offset, nbytes, opcode, immediate or 0)
        request.set_wr_rdma(rkey, virtual_address)
        self._qp.post_send(request)

    def send(self, offset: int, nbytes: int) -> None:
        """Post a SEND of a part of the buffer."""
        self._qp.post_send(self._request(offset, nbytes, self._verbs.enums.IBV_WR_SEND, 0))

    def _request(self, offset: int, nbytes: int, opcode: int, immediate: int) -> Any:
        wr = self._verbs.wr
        place = wr.SGE(self.virtual_address + offset, nbytes, self._region.lkey)
        flags = self._verbs.enums.IBV_SEND_SIGNALED
        return wr.SendWR(num_sge=1, sg=[place], opcode=opcode, send_flags=flags, imm_data=immediate)

    def poll(self) -> list[int]:
        """Return the status of each request completed since, 0 for success."""
        _, completions = self._device.cq.poll(_MESSAGES)
        return [int(one.status) for one in completions or ()]

    def counters(self) -> dict[str, int]:
        """Return the device's counters by the kernel's names."""
        return read_rxe_counters(self._device.name)


@contextlib.contextmanager
def rxe_end(fabric: Fabric, nic: int, buffer: Bytes) -> Iterator[RxeEnd]:
    """Have a device of rxe at a NIC, and a queue pair on it, for the block.

    Raises:
        MachineError: The kernel or pyverbs is missing, or this machine's namespace cannot have the device.
    """
    verbs = import_verbs()
    port = fabric.plan.topology.nics[nic]
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(fabric.run_devices([port]))[port.id]
        yield RxeEnd(verbs, VerbsDevice(verbs, name, format_address(port.address), _MESSAGES, stack), buffer, stack)


class StoreEndpoint:
    """Serves a responder that keeps what it gets, at a NIC.

    Args:
        store: The responder with its addresses.
        listener: Where frames come from.
        sender: Where answers go.
        disturb: What becomes of each frame before the responder sees it: itself, another, or nothing.
    """

    def __init__(
        self,
        store: StoreQueuePair,
        listener: socket.socket,
        sender: socket.socket,
        disturb: Callable[[bytes], bytes | None] | None,
    ) -> None:
        self._store, self._listener, self._sender, self._disturb = store, listener, sender, disturb

    def serve(self, wait_s: float) -> int:
        """Take what has come and answer it; wait for the first frame. Return how many there were."""
        select.select([self._listener], [], [], wait_s)
        count = 0
        while (frame := read_frame(self._listener)) is not None:
            count += 1
            seen = frame if self._disturb is None else self._disturb(frame)
            answer = None if seen is None else self._store.receive(seen)
            if answer is not None:
                self._sender.send(answer)
        return count


@contextlib.contextmanager
def store_endpoint(
    fabric: Fabric, store: StoreQueuePair, disturb: Callable[[bytes], bytes | None] | None = None
) -> Iterator[StoreEndpoint]:
    """Have the responder in user space at its NIC for the block.

    Raises:
        RunError: The fabric's own responder has that queue pair.
        KernelError: The kernel refused a socket.
    """
    row = store.qp.qpn - QPN_BASE
    if 0 <= row < len(fabric.arrays.qps) and fabric.arrays.qps["active"][row]:
        raise RunError(f"queue pair {store.qp.qpn:#x} is answered by the fabric")
    port = fabric.plan.topology.nics[store.qp.local.nic]
    with contextlib.ExitStack() as stack:
        with entered(_open_namespace_of(fabric, port, stack)):
            listener = stack.enter_context(roce_listener(format_address(port.address)))
            sender = stack.enter_context(open_packet_socket(port.ifname))
        yield StoreEndpoint(store, listener, sender, disturb)


def connect_rxe(fabric: Fabric, end: RxeEnd, role: int) -> None:
    """Connect a queue pair of rxe in the place of the requester or of the responder."""
    connection = _connection_of(fabric)
    other = connection.responder if role == REQUESTER else connection.requester
    end.connect(
        other.local.address,
        other.qpn,
        connection.initial_psn,
        mtu_bytes=fabric.plan.scenario.transport.mtu_bytes,
        tos=data_tos(connection.priority),
    )


def aim(end: QueuePair, foreign_qpn: int) -> QueuePair:
    """Return an end of a connection whose other end is a queue pair that is not ours, on the same NIC as ours was."""
    return dataclasses.replace(end, peer_qpn=foreign_qpn, udp_source_port=int(source_port(end.qpn, foreign_qpn)))


def store_responder(
    fabric: Fabric, foreign_qpn: int, memory: bytearray, *, virtual_address: int, rkey: int
) -> StoreQueuePair:
    """Return a responder that keeps what a queue pair that is not ours, in the requester's place, sends to it."""
    connection = _connection_of(fabric)
    responder = StoreResponder(
        mtu=fabric.plan.scenario.transport.mtu_bytes,
        first_psn=connection.initial_psn,
        memory=memory,
        virtual_address=virtual_address,
        rkey=rkey,
    )
    return StoreQueuePair(aim(connection.responder, foreign_qpn), responder)


def answer_foreign(fabric: Fabric, foreign_qpn: int) -> Any:
    """Let the fabric's own responder, in eBPF, answer a requester that is not ours; it counts the payload and lets it go.

    Returns:
        The row of the QP table.
    """
    connection = _connection_of(fabric)
    responder = aim(connection.responder, foreign_qpn)
    row = fabric.arrays.qps[qp_index(0, RESPONDER)]
    for name in ("active", *row.dtype.names):
        row[name] = 0
    row["peer_qpn"], row["udp_source_port"] = responder.peer_qpn, responder.udp_source_port
    row["port"] = fabric.plan.topology.nics[responder.local.nic].id
    row["initial_rx_psn"] = connection.initial_psn
    row["active"] = 1
    return row


def write_to_foreign(
    fabric: Fabric, foreign_qpn: int, memory: ForeignMemory, virtual_address: int, *, message_bytes: int
) -> IterationResult:
    """Let the engine write a buffer into a queue pair that is not ours, and return when all of it is acknowledged.

    The engine is that of every run: tick loop, pacing, go-back-N, the frames it writes ahead, and the eBPF program that reads
    ACKs and NAKs.

    Args:
        fabric: The fabric.
        foreign_qpn: QP number in the responder's place.
        memory: What is written, and the key.
        virtual_address: Where to.
        message_bytes: Length of each WRITE but the last.

    Raises:
        RunError: It ran out of retries, or nothing moves any more.
    """
    plan, planned = fabric.plan, fabric.plan.workloads[0]
    connection = _connection_of(fabric)
    requester = aim(connection.requester, foreign_qpn)
    setup = dataclasses.replace(
        engine_setup(plan, 0),
        connections=[dataclasses.replace(connection, requester=requester)],
        one_way_ns=planned.one_way_ns[:1],
        foreign=[memory],
        intra_host=None,
    )
    source, target, nbytes = requester.local.rank, requester.remote.rank, len(memory.contents)
    builder = ScheduleBuilder(max(source, target) + 1, virtual_address + nbytes)
    for offset in range(0, nbytes, message_bytes):
        builder.add(
            source,
            target,
            offset_bytes=offset,
            nbytes=min(message_bytes, nbytes - offset),
            dst_offset_bytes=virtual_address + offset,
        )
    clock = MonotonicClock()
    with (
        fabric.packet_sockets() as sockets,
        contextlib.closing(ProbeLink(fabric.probe_cpu, clock.now_ns)) as probe,
        flow_control(fabric, clock.now_ns()) as flow,
    ):
        loop = TickLoop(
            setup,
            queues=fabric.arrays.queues,
            qps=fabric.arrays.qps,
            sockets=[one.fileno() for one in sockets],
            clock=clock,
            probe=probe,
            describe_connection=lambda _: describe_connection(plan, 0, 0),
            flow_control=flow,
        )
        try:
            return loop.run_iteration(builder.build())
        finally:
            fabric.arrays.qps["active"] = 0


def _connection_of(fabric: Fabric) -> Connection:
    return fabric.plan.workloads[0].connections[0]


def _open_namespace_of(fabric: Fabric, port: Port, stack: contextlib.ExitStack) -> int:
    descriptor = open_namespace(fabric.namespace_of(fabric.plan.topology.nodes[port.node].name))
    stack.callback(os.close, descriptor)
    return descriptor
