"""The kernel's soft-RoCE as a transport: reliable connections through verbs, RDMA WRITE from and to real buffers.

A connection of the plan is a pair of queue pairs on the rxe devices of the two NICs. Transfers that are copied are written
where they belong; those that are added are written beside, and added when the completion tells that they are whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from testbed.carriers.buffers import Bytes, RankBuffers
from testbed.carriers.reaction import Reaction, reaction
from testbed.carriers.verbs import VerbsDevice, connect_rc, create_rc, import_verbs, stop_rc
from testbed.collectives.schedule import TransferOp
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.kernel.rxe import read_rxe_counters
from testbed.plan.flows import trace_connection_routes
from testbed.plan.model import PlannedWorkload
from testbed.plan.predict import predict_cct_ratio
from testbed.roce.wire import data_tos, source_port
from testbed.scenario import Carrier, CongestionControl

# Messages posted to a queue pair at a time, and completions that a device may hold.
_QUEUE_MESSAGES = 256
_POLL_COMPLETIONS = 64
_MAX_COMPLETIONS = 16_384
# 4.096 us * 2^18, about a second: rxe's own timers are wall time, and a dilated fabric is slow.
_ACK_TIMEOUT_EXPONENT = 18
_PSN_MASK = 0xFFFFFF
# What rxe counts that says a packet was sent again: it came twice, or behind a gap.
_AGAIN_COUNTERS = ("duplicate_request", "out_of_seq_request")


class _End:
    """One end of a connection."""

    def __init__(self, queue_pair: Any, device: VerbsDevice) -> None:
        self.qp = queue_pair
        self.device = device
        self.waiting: deque[int] = deque()  # transfers not yet given to the device
        self.under_way: deque[int] = deque()  # given, not yet completed
        self.expected: deque[int] = deque()  # not yet arrived


class RxeTransport:
    """Queue pairs of rxe between the hosts of a fabric.

    Args:
        fabric: The fabric.
        planned: The workload; each of its connections is a pair of queue pairs.
        buffers: The ranks' buffers.

    Raises:
        MachineError: The kernel or pyverbs is missing, or this machine's namespace cannot have the devices.
        RunError: A queue pair cannot be made.
    """

    def __init__(self, fabric: Fabric, planned: PlannedWorkload, buffers: RankBuffers) -> None:
        self._buffers = buffers
        self._plan, self._planned = fabric.plan, planned
        self._schedule = planned.schedule
        self._verbs = import_verbs()
        self._stack = contextlib.ExitStack()
        try:
            self._open(fabric, planned)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, fabric: Fabric, planned: PlannedWorkload) -> None:
        self._stage(len(planned.connections))
        self._devices = self._open_devices(fabric, planned)
        tos = data_tos(fabric.plan.scenario.qos.lossless_priority)
        mtu = fabric.plan.scenario.transport.mtu_bytes
        self._senders: list[_End] = []
        self._receivers: list[_End] = []
        self._sender_of: dict[tuple[str, int], int] = {}
        self._receiver_of: dict[tuple[str, int], int] = {}
        for index, connection in enumerate(planned.connections):
            source, target = connection.requester.local, connection.responder.local
            sender, receiver = self._create_end(self._devices[source.nic]), self._create_end(self._devices[target.nic])
            try:
                for end, other in ((sender, receiver), (receiver, sender)):
                    self._connect(end, other, tos=tos, mtu=mtu, psn=connection.initial_psn & _PSN_MASK)
            except Exception as error:  # pyverbs' errors have no base of their own
                raise RunError(f"queue pairs of rank {source.rank} and rank {target.rank}: {error}") from error
            self._senders.append(sender)
            self._receivers.append(receiver)
            self._sender_of[sender.device.name, int(sender.qp.qp_num)] = index
            self._receiver_of[receiver.device.name, int(receiver.qp.qp_num)] = index
            for _ in range(_QUEUE_MESSAGES):
                self._post_receive(receiver)
        self._reaction: Reaction | None = None
        if fabric.plan.scenario.transport.congestion_control is not CongestionControl.NONE:
            numbers = [
                (int(sender.qp.qp_num), int(receiver.qp.qp_num))
                for sender, receiver in zip(self._senders, self._receivers, strict=True)
            ]
            self._reaction = self._stack.enter_context(reaction(fabric, planned, numbers))
            # First of all at the end, so that what waits at the NICs can leave before what it waits in goes. They are closed
            # after: a queue pair is there as long as a frame of it.
            for end in (*self._senders, *self._receivers):
                self._stack.callback(stop_rc, self._verbs, end.qp)

    def _stage(self, networked: int) -> None:
        """Give every transfer that is added a place of its own, where it arrives before it is."""
        schedule = self._schedule
        reduced = (schedule.connection < networked) & (schedule.op == TransferOp.REDUCE)
        sizes = np.where(reduced, schedule.nbytes, 0)
        ends = np.cumsum(sizes)
        self._staging: Bytes = np.zeros(max(1, int(ends[-1])), np.uint8)
        self._staged_at = (ends - sizes).tolist()
        self._reduced = reduced.tolist()
        self._nbytes = schedule.nbytes.tolist()
        self._regions: dict[tuple[str, int], Any] = {}

    def _open_devices(self, fabric: Fabric, planned: PlannedWorkload) -> dict[int, VerbsDevice]:
        """Open a device for each NIC that takes part, made for it unless it is a deployed lab's."""
        topology, stack = fabric.plan.topology, self._stack
        ends = {end.nic for one in planned.connections for end in (one.requester.local, one.responder.local)}
        ports = {nic: topology.nics[nic] for nic in sorted(ends)}
        names = stack.enter_context(fabric.run_devices(ports.values()))
        return {
            nic: VerbsDevice(self._verbs, names[port.id], _dotted(port.address), _MAX_COMPLETIONS, stack)
            for nic, port in ports.items()
        }

    def _create_end(self, device: VerbsDevice) -> _End:
        return _End(create_rc(self._verbs, device, _QUEUE_MESSAGES, self._stack), device)

    def _connect(self, end: _End, other: _End, *, tos: int, mtu: int, psn: int) -> None:
        connect_rc(
            self._verbs,
            end.qp,
            end.device,
            remote_gid=other.device.gid,
            remote_qpn=other.qp.qp_num,
            tos=tos,
            mtu_bytes=mtu,
            psn=psn,
            ack_timeout_exponent=_ACK_TIMEOUT_EXPONENT,
        )

    def _post_receive(self, end: _End) -> None:
        """Let one more message announce itself; nothing is written where the request points, but pyverbs wants a place."""
        wr = self._verbs.wr
        place = wr.SGE(self._staging.ctypes.data, 1, self._region(end.device, self._staging).lkey)
        end.qp.post_recv(wr.RecvWR(num_sge=1, sg=[place]))

    def _region(self, device: VerbsDevice, array: Bytes) -> Any:
        """Return an array as memory that a device may read and write; registered once."""
        key = (device.name, array.ctypes.data)
        if key not in self._regions:
            enums = self._verbs.enums
            access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
            region = self._verbs.mr.MR(device.pd, array.nbytes, access, address=array.ctypes.data)
            self._stack.callback(region.close)
            self._regions[key] = region
        return self._regions[key]

    def post(self, connection: int, transfer: int) -> None:
        """Begin to send a transfer."""
        self._receivers[connection].expected.append(transfer)
        self._senders[connection].waiting.append(transfer)
        self._feed(connection)

    def _feed(self, connection: int) -> None:
        """Give the device what it has room for."""
        sender = self._senders[connection]
        while sender.waiting and len(sender.under_way) < _QUEUE_MESSAGES:
            transfer = sender.waiting.popleft()
            self._write(sender, self._receivers[connection].device, transfer)
            sender.under_way.append(transfer)

    def _write(self, sender: _End, target: VerbsDevice, transfer: int) -> None:
        wr, enums = self._verbs.wr, self._verbs.enums
        schedule, buffers = self._schedule, self._buffers
        local = self._region(sender.device, buffers.outputs if schedule.in_place else buffers.inputs)
        if self._reduced[transfer]:
            remote, address = self._region(target, self._staging), self._staging.ctypes.data + self._staged_at[transfer]
        else:
            remote = self._region(target, buffers.outputs)
            row = buffers.outputs[int(schedule.dst[transfer])]
            address = row.ctypes.data + int(schedule.dst_offset_bytes[transfer])
        request = wr.SendWR(
            wr_id=transfer,
            num_sge=1,
            sg=[wr.SGE(buffers.source(transfer).ctypes.data, self._nbytes[transfer], local.lkey)],
            opcode=enums.IBV_WR_RDMA_WRITE_WITH_IMM,
            send_flags=enums.IBV_SEND_SIGNALED,
            imm_data=transfer,
        )
        request.set_wr_rdma(remote.rkey, address)
        sender.qp.post_send(request)

    def poll(self) -> Sequence[tuple[int, int]]:
        """Take completions; return connection and transfer of each message that is whole.

        Raises:
            RunError: A queue pair failed.
        """
        whole: list[tuple[int, int]] = []
        for device in self._devices.values():
            count = _POLL_COMPLETIONS
            while count == _POLL_COMPLETIONS:
                count, completions = device.cq.poll(_POLL_COMPLETIONS)
                for one in completions or ():
                    self._take(device, one, whole)
        return whole

    def _take(self, device: VerbsDevice, completion: Any, whole: list[tuple[int, int]]) -> None:
        key = (device.name, int(completion.qp_num))
        connection = self._receiver_of.get(key)
        index = self._sender_of[key] if connection is None else connection
        if completion.status != self._verbs.enums.IBV_WC_SUCCESS:
            raise RunError(
                f"connection {index}, queue pair {key[1]:#x} of {device.name}: completion status {completion.status}",
                hint="`testbed run --pcap` shows what is on the wire",
            )
        if connection is None:
            self._senders[index].under_way.popleft()
            self._feed(index)
            return
        receiver = self._receivers[connection]
        transfer = receiver.expected.popleft()
        self._post_receive(receiver)
        if self._reduced[transfer]:
            begin = self._staged_at[transfer]
            self._buffers.deliver(transfer, self._staging[begin : begin + self._nbytes[transfer]])
        whole.append((connection, transfer))

    def react(self, now_ns: int) -> None:
        """Let the reaction points act on the CNPs that have come back, where there are any."""
        if self._reaction is not None:
            self._reaction.tick(now_ns, np.array([bool(one.under_way) for one in self._senders]))

    def retransmitted_packets(self) -> int:
        """Return how many packets came twice or behind a gap, as the receiving devices counted them."""
        counters = [read_rxe_counters(device.name) for device in self._devices.values()]
        return sum(one.get(name, 0) for one in counters for name in _AGAIN_COUNTERS)

    def predicted_cct_ratio(self) -> float | None:
        """Return the completion time over the ideal that the kernel's own queue pair numbers and source ports lead to."""
        plan = self._plan
        routes = []
        for index, connection in enumerate(self._planned.connections):
            local, remote = int(self._senders[index].qp.qp_num), int(self._receivers[index].qp.qp_num)
            port = int(source_port(local, remote))
            requester = dataclasses.replace(connection.requester, peer_qpn=remote, udp_source_port=port)
            taken = dataclasses.replace(connection, requester=requester)
            routes.append(trace_connection_routes(taken, plan.topology, plan.tables, Carrier.RXE))
        return predict_cct_ratio(plan.topology, self._schedule, routes, plan.scenario.fabric.nvlink.rate_bits_per_s)

    def close(self) -> None:
        """Close every queue pair and delete the devices."""
        self._stack.close()


def _dotted(address: int) -> str:
    return socket.inet_ntoa(struct.pack("!I", address))
