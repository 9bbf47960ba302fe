"""DCQCN for the kernel's own queue pairs, which neither send CNPs nor heed them.

The fabric's programs are the notification point: they see CE at the receiving NIC and send a CNP back through the fabric,
which ends at the sending NIC and is counted there. The reaction points are the engine's, one for each queue pair, told every
tick; the rates that they set are those of the queue pairs' classes below the NIC's shaper.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from testbed.fabric import Fabric
from testbed.kernel import bpf, layout
from testbed.kernel.qp_shaper import QpShaper
from testbed.plan.model import PlannedWorkload
from testbed.roce.congestion import CongestionControl, Feedback, make
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, qp_index
from testbed.roce.wire import source_port

# What waits at a NIC at the end has this long to leave: it does not where the NIC is paused, or its last frame was a slow one.
_WALL_DRAIN_S = 2.0
_WALL_LOOK_S = 0.001


class Reaction:
    """The reaction points of a workload's queue pairs.

    Args:
        control: The algorithm, a row for each connection.
        shaper: Its actuator.
        qps: The fabric's QP table, in which the queue pairs have the rows of the plan's.
        time_dilation: Wall time per emulated time.

    Attributes:
        control: The algorithm.
        wall_rates_bytes_per_s: The rates as the kernel has them.
    """

    def __init__(
        self, control: CongestionControl, shaper: QpShaper, qps: npt.NDArray[np.void], time_dilation: float
    ) -> None:
        count = len(control.rate_bytes_per_s)
        self.control = control
        self._shaper = shaper
        self._cnps = qps["cnps_packets"][qp_index(0, REQUESTER) : 2 * count : 2]
        self._arrived = qps["rx_payload_bytes"][qp_index(0, RESPONDER) : 2 * count : 2]
        self._cnps_seen, self._arrived_seen = self._read()
        self._dilation = time_dilation
        self._begun = False
        self.wall_rates_bytes_per_s = self._wall_rates()

    def tick(self, now_ns: int, active: npt.NDArray[np.bool_]) -> None:
        """Tell the reaction points what has happened since the last tick, and the kernel what they make of it.

        Args:
            now_ns: The clock.
            active: Whether each queue pair has something to send or under way.

        Raises:
            KernelError: The kernel refused a rate.
        """
        emulated_ns = now_ns / self._dilation
        cnps, arrived = self._read()
        if not self._begun:
            self._begun = True
            self.control.restart(emulated_ns)
        else:
            # What has arrived stands for what was sent, less the packets under way.
            arrived_bytes = arrived - self._arrived_seen
            self.control.advance(
                emulated_ns,
                Feedback(
                    cnps=cnps - self._cnps_seen,
                    sent_bytes=arrived_bytes,
                    acked_bytes=arrived_bytes,
                    rtt_ns=np.full(len(cnps), np.nan),
                    active=active,
                ),
            )
        self._cnps_seen, self._arrived_seen = cnps, arrived
        rates = self._wall_rates()
        changed = np.flatnonzero(rates != self.wall_rates_bytes_per_s)
        if len(changed):
            self._shaper.change({int(one): int(rates[one]) for one in changed})
            self.wall_rates_bytes_per_s = rates

    def _read(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self._cnps.astype(np.int64), self._arrived.astype(np.int64)

    def _wall_rates(self) -> npt.NDArray[np.int64]:
        rates: npt.NDArray[np.int64] = np.rint(self.control.rate_bytes_per_s / self._dilation).astype(np.int64)
        return np.maximum(rates, 1)


@contextlib.contextmanager
def reaction(fabric: Fabric, planned: PlannedWorkload, numbers: Sequence[tuple[int, int]]) -> Iterator[Reaction]:
    """Have the queue pairs of a workload observed and shaped for the block, at whose end they send no more.

    What they have sent may wait at their NICs then: it leaves at the line's rate before the classes go. Where it does not, the
    classes stay, without a limit of their own.

    Args:
        fabric: The fabric.
        planned: The workload.
        numbers: Of each connection the queue pair numbers that the kernel gave its requester and its responder.

    Raises:
        KernelError: The kernel refused a class or an entry of a map.
        LabError: The fabric was deployed with gates that leave no place for classes.
    """
    plan = fabric.plan
    topology, transport = plan.topology, plan.scenario.transport
    nics = [topology.nics[connection.requester.local.nic] for connection in planned.connections]
    line_rates = np.array([nic.rate_bits_per_s / 8 for nic in nics])
    control = make(str(transport.congestion_control), transport.congestion_parameters, line_rates)
    with contextlib.ExitStack() as stack:
        senders: dict[int, list[int]] = {}
        for connection, nic in enumerate(nics):
            senders.setdefault(nic.id, []).append(connection)
        shaper = stack.enter_context(fabric.qp_shaper(senders))
        stack.callback(_delete_when_drained, fabric, shaper, list(senders))
        shaper.create()
        _configure(fabric, planned, numbers, stack)
        stack.callback(shaper.lift)
        yield Reaction(control, shaper, fabric.arrays.qps, plan.dilation.value)


def _delete_when_drained(fabric: Fabric, shaper: QpShaper, ports: Sequence[int]) -> None:
    """Delete the classes once nothing waits at the NICs: what waits in a qdisc that goes is never counted out of its queue.

    By the ports' flags the next run on a lab that stays knows of classes that stay, too.
    """
    queues = fabric.arrays.queues
    deadline = time.monotonic() + _WALL_DRAIN_S
    while True:
        left = int(queues["deq_bytes"][ports].sum())  # before what entered
        if left == int(queues["enq_bytes"][ports].sum()):
            shaper.delete()
            layout.forget_kernel_qps(fabric.arrays)
            return
        if time.monotonic() > deadline:
            return
        time.sleep(_WALL_LOOK_S)


def _configure(
    fabric: Fabric, planned: PlannedWorkload, numbers: Sequence[tuple[int, int]], stack: contextlib.ExitStack
) -> None:
    """Write the rows of the queue pairs, and how frames lead to them."""
    plan, topology, arrays = fabric.plan, fabric.plan.topology, fabric.arrays
    descriptor = bpf.open_map(fabric.state.details["maps"][layout.KERNEL_QPS])
    stack.callback(os.close, descriptor)
    layout.clear_kernel_qps(descriptor)
    stack.callback(layout.clear_kernel_qps, descriptor)
    arrays.qps[:] = np.zeros(1, arrays.qps.dtype)
    observed: set[int] = set()
    for index, (connection, (sender_qpn, receiver_qpn)) in enumerate(zip(planned.connections, numbers, strict=True)):
        source, target = (topology.nics[end.local.nic] for end in (connection.requester, connection.responder))
        sending, receiving = qp_index(index, REQUESTER), qp_index(index, RESPONDER)
        for row, port, qpn, peer_qpn in (
            (sending, source, sender_qpn, receiver_qpn),
            (receiving, target, receiver_qpn, sender_qpn),
        ):
            arrays.qps["port"][row] = port.id
            arrays.qps["peer_qpn"][row] = peer_qpn
            arrays.qps["udp_source_port"][row] = int(source_port(qpn, peer_qpn))
            layout.write_kernel_qp(descriptor, port=port.id, dst_address=port.address, qpn=qpn, row=row)
        arrays.qps["cnp_interval_ns"][receiving] = round(plan.cnp_interval_ns * plan.dilation.value)
        layout.write_kernel_qp(descriptor, port=source.id, dst_address=target.address, qpn=receiver_qpn, row=sending)
        observed |= {source.id, target.id}
    for port_id in sorted(observed):
        arrays.ports["flags"][port_id] |= layout.PORT_KERNEL_QPS
