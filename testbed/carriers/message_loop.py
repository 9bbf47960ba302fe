"""Runs a schedule over a transport that carries whole messages: the tick loop of the carriers that are not the engine.

The transport moves real bytes between real buffers and paces them itself; the loop decides what may be sent, and delays what
has arrived by what its path takes and the wire does not: frame times, and propagation where no qdisc delays. A transport's own
control loop (TCP's window, an acknowledgement) then sees a path without delay, which a warning says.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from testbed.carriers.buffers import RankBuffers
from testbed.carriers.flow_control import flow_control
from testbed.carriers.jobs import job_cct_ns
from testbed.carriers.protocol import ProgressListener, WorkloadSamples
from testbed.carriers.ticks import FabricTicks
from testbed.collectives import Schedule
from testbed.collectives.schedule import Collective
from testbed.engine.flow_control import FlowControl, NoFlowControl
from testbed.engine.intra_host import IntraHostTransfers
from testbed.engine.progress import Progress
from testbed.engine.stream import PacketStreams
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.kernel.host_tuning import tuned_host
from testbed.kernel.probe_link import ProbeLink
from testbed.kernel.scheduling import MonotonicClock, choose_cpus, engine_thread
from testbed.measure.samples import MachineSamples
from testbed.plan.model import Plan, PlannedWorkload
from testbed.scenario import CollectiveWorkload, LinkDelay

# Nothing has arrived for this long on the wall clock, with everything open: it never will.
_STALL_S = 20.0
# Both buffers and the check take memory in proportion to ranks and size: beyond this the contents are not checked.
_MAX_CHECKED_BYTES = 1 << 30


class MessageTransport(Protocol):
    """Carries messages on the connections of one workload, each connection's in order."""

    def post(self, connection: int, transfer: int) -> None:
        """Begin to send a transfer, behind those posted before on its connection."""

    def poll(self) -> Sequence[tuple[int, int]]:
        """Move what can be moved; return connection and transfer of each message that is whole at its receiver.

        Its bytes are in the receiver's buffer, and `RankBuffers.deliver` was done, when it is returned.
        """

    def react(self, now_ns: int) -> None:
        """Let a congestion control that is ours act on what has come back by now."""

    def retransmitted_packets(self) -> int:
        """Return how many packets were sent again since the transport was opened."""

    def predicted_cct_ratio(self) -> float | None:
        """Return the predicted completion time over the ideal, None where the connections take the plan's paths."""

    def close(self) -> None:
        """Close every connection."""


OpenTransport = Callable[[Fabric, PlannedWorkload, RankBuffers], MessageTransport]


@dataclass
class _Iteration:
    """What one iteration found, in wall time."""

    wall_ns: int
    wall_seen_ns: int
    retransmitted_packets: int
    machine: MachineSamples
    wall_paused_ns: npt.NDArray[np.float64]
    wall_end_ns: npt.NDArray[np.float64]
    together_bytes_per_wall_s: npt.NDArray[np.float64]
    nvlink_bytes: int
    wall_inside_end_ns: npt.NDArray[np.float64]
    wrong_elements: int | None


class _BufferedProgress(Progress):
    """Progress that moves the bytes of the transfers inside hosts as the model says they arrive."""

    buffers: RankBuffers

    def record_inside(self, transfer: int, time_ns: float) -> None:
        """Move the bytes, then take note."""
        self.buffers.deliver(transfer, self.buffers.source(transfer))
        super().record_inside(transfer, time_ns)


class MessageCarrier:
    """Runs workloads over a transport.

    Args:
        fabric: The fabric.
        open_transport: Opens a workload's connections.
        probe: The fidelity probe.
        clock: Source of time.
        flow: PFC on the fabric.
    """

    def __init__(
        self,
        fabric: Fabric,
        open_transport: OpenTransport,
        probe: ProbeLink,
        clock: MonotonicClock,
        flow: FlowControl | NoFlowControl,
    ) -> None:
        self._fabric = fabric
        self._open = open_transport
        self._clock = clock
        self._ticks = FabricTicks(fabric, probe, clock, flow)
        self._delays = fabric.back_ends.link_delay == LinkDelay.CARRIER
        self._warnings: list[str] = []
        if self._delays and any(link.delay_ns for link in fabric.plan.topology.links):
            self._warnings.append(
                "link delay is added to what has arrived (transport.link_delay: carrier): acknowledgements come back without it"
            )

    def warnings(self) -> list[str]:
        """Return what a reader of the figures should know."""
        return self._warnings

    def run(self, workload: int, listener: ProgressListener) -> WorkloadSamples:
        """Run all iterations of a workload.

        Raises:
            RunError: Nothing arrives any more.
        """
        plan = self._fabric.plan
        planned = plan.workloads[workload]
        buffers = RankBuffers(planned.schedule, plan.scenario.seed)
        warmups, iters = planned.workload.warmup_iters, planned.workload.iters
        found: list[_Iteration] = []
        with contextlib.closing(self._open(self._fabric, planned, buffers)) as transport:
            predicted = transport.predicted_cct_ratio()
            for number in range(warmups + iters):
                warmup = number < warmups
                listener.iteration(number if warmup else number - warmups, warmups if warmup else iters, warmup=warmup)
                buffers.restart()
                one = self._run_once(plan, planned, transport, buffers)
                if not warmup:
                    found.append(one)
        dilation = plan.dilation.value
        wrong = [one.wrong_elements for one in found]
        return WorkloadSamples(
            cct_ns=tuple(one.wall_ns / dilation for one in found),
            wall_cct_ns=tuple(one.wall_seen_ns for one in found),
            retransmitted_packets=sum(one.retransmitted_packets for one in found),
            machine=tuple(one.machine for one in found),
            wall_paused_ns=np.sum([one.wall_paused_ns for one in found], axis=0),
            end_ns=np.median([one.wall_end_ns for one in found], axis=0) / dilation,
            together_bytes_per_s=np.median([one.together_bytes_per_wall_s for one in found], axis=0) * dilation,
            nvlink_bytes=tuple(one.nvlink_bytes for one in found),
            job_cct_ns=tuple(
                tuple(
                    job_cct_ns(planned, job, one.wall_end_ns / dilation, one.wall_inside_end_ns / dilation)
                    for one in found
                )
                for job in planned.jobs
            ),
            predicted_cct_ratio=predicted,
            wrong_elements=None if None in wrong else sum(one for one in wrong if one is not None),
        )

    def _run_once(
        self, plan: Plan, planned: PlannedWorkload, transport: MessageTransport, buffers: RankBuffers
    ) -> _Iteration:
        schedule, networked = planned.schedule, len(planned.connections)
        dilation = plan.dilation.value
        clock, ticks = self._clock, self._ticks
        on_wire_ns = np.array([0 if self._delays else path.delay_ns for path in planned.paths], np.int64)
        wall_unseen_ns = np.rint((planned.one_way_ns - on_wire_ns) * dilation).astype(np.int64).tolist()
        intra_host = IntraHostTransfers(schedule, planned.intra_host, dilation)
        streams = _message_streams(schedule, networked)
        posted = [0] * networked
        begin = ticks.restart()
        intra_host.begin(begin)
        progress = _BufferedProgress(schedule, streams, intra_host.release)
        progress.buffers = buffers
        starts_ns = [begin + round(float(start) * dilation) for start in schedule.start_ns[:networked]]
        retransmitted_before = transport.retransmitted_packets()
        under_way: list[deque[tuple[int, int]]] = [deque() for _ in range(networked)]
        arrived = [0] * networked
        arrived_at = np.zeros(len(schedule))
        arrived_bytes = np.zeros(networked, np.int64)
        end_ns = np.full(networked, float(begin))
        together_ns, together_bytes = 0, np.zeros(networked, np.int64)
        totals = streams.messages.tolist()
        last_arrival = moved = begin
        while True:
            now = ticks.begin()
            transport.react(now)
            for connection, transfer in transport.poll():
                under_way[connection].append((clock.now_ns() + wall_unseen_ns[connection], transfer))
                arrived_bytes[connection] += schedule.nbytes[transfer]
                moved = now
            ready: list[int] = []
            for connection, waiting in enumerate(under_way):
                while waiting and waiting[0][0] <= now:
                    at, transfer = waiting.popleft()
                    arrived[connection] += 1
                    arrived_at[transfer] = at
                    if not ready or ready[-1] != connection:
                        ready.append(connection)
                    if arrived[connection] == totals[connection]:
                        end_ns[connection] = at
                        if not together_ns:
                            together_ns, together_bytes = now, arrived_bytes.copy()
            if ready:
                latest = progress.record_arrivals(
                    ready, [arrived[one] for one in ready], lambda _, one: arrived_at[one]
                )
                last_arrival = max(last_arrival, round(latest))
            if intra_host.busy:
                last_arrival = max(last_arrival, round(intra_host.advance(now, progress)))
                moved = now
            if not progress.pending_transfers:
                break
            for connection, released in enumerate(progress.released_packets.tolist()):
                if posted[connection] < released and starts_ns[connection] <= now:
                    for transfer in streams.transfers_of[connection][posted[connection] : released].tolist():
                        transport.post(connection, transfer)
                    posted[connection] = released
                    moved = now
            if any(starts_ns[one] > now for one in range(networked)):
                moved = now
            if now - moved > _STALL_S * 1e9:
                raise RunError(
                    f"nothing arrived for {_STALL_S:g} s on this machine's clock",
                    hint="`testbed run --pcap` shows what is on the wire",
                )
            ticks.end()
        wall_ns = last_arrival - begin
        return _Iteration(
            wall_ns=wall_ns,
            wall_seen_ns=moved - begin,
            retransmitted_packets=transport.retransmitted_packets() - retransmitted_before,
            machine=ticks.samples(wall_ns, planned.resolution_error_fraction),
            wall_paused_ns=ticks.wall_paused_ns(clock.now_ns()),
            wall_end_ns=end_ns - begin,
            together_bytes_per_wall_s=together_bytes * 1e9 / max(1, together_ns - begin),
            nvlink_bytes=intra_host.arrived_bytes,
            wall_inside_end_ns=np.maximum(np.array(intra_host.end_ns) - begin, 0.0),
            wrong_elements=_count_wrong(planned, buffers),
        )


def _message_streams(schedule: Schedule, networked: int) -> PacketStreams:
    """Return a schedule as streams whose packets are whole messages: what is released is then counted in messages."""
    connections = len(schedule.connections)
    transfers = tuple(np.flatnonzero(schedule.connection == connection) for connection in range(connections))
    end = np.zeros(len(schedule), np.int64)
    for of_one in transfers[:networked]:
        end[of_one] = np.arange(1, len(of_one) + 1)
    first = np.concatenate(([0], np.cumsum([len(of_one) for of_one in transfers[:networked]]))).astype(np.int64)
    nothing = np.zeros(0, np.int64)
    return PacketStreams(
        first_packet=first,
        opcode=nothing.astype(np.uint8),
        payload_bytes=nothing.astype(np.uint16),
        message=nothing.astype(np.int32),
        wire_bytes_before=nothing,
        message_end_packet=end,
        transfers_of=transfers,
    )


def _count_wrong(planned: PlannedWorkload, buffers: RankBuffers) -> int | None:
    """Return how many elements are wrong at their receivers; None for several jobs, or where there are too many to be checked."""
    if planned.jobs or buffers.inputs.size * 4 > _MAX_CHECKED_BYTES:
        return None
    if not isinstance(planned.workload, CollectiveWorkload):
        return buffers.count_undelivered()
    return buffers.count_wrong_elements(Collective(str(planned.workload.collective)), planned.order)


@contextlib.contextmanager
def message_carrier(
    fabric: Fabric, open_transport: OpenTransport, waiting: Callable[[], None] = lambda: None
) -> Iterator[tuple[MessageCarrier, list[str]]]:
    """Open a transport's carrier on a fabric for the block.

    Args:
        fabric: The fabric; built for any workload, for the transport's frames are not the plan's.
        open_transport: Opens a workload's connections.
        waiting: Called when another run has the machine; this one then waits for it.

    Yields:
        The carrier, and warnings about what the machine refused.
    """
    clock = MonotonicClock()
    engine_cpu, port_cpus = choose_cpus()
    with (
        contextlib.closing(ProbeLink(fabric.probe_cpu, clock.now_ns)) as probe,
        tuned_host(port_cpus, waiting) as host_warnings,
        engine_thread(engine_cpu) as warnings,
        flow_control(fabric, clock.now_ns()) as flow,
    ):
        yield MessageCarrier(fabric, open_transport, probe, clock, flow), host_warnings + warnings
