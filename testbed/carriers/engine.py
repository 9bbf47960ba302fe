"""The engine as a carrier: our own RoCEv2 over packet sockets, the tick loop and the eBPF responder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from testbed.carriers.admission import admission
from testbed.carriers.faults import FabricFaults, fabric_faults, port_rates_of, workload_faults
from testbed.carriers.flow_control import flow_control
from testbed.carriers.jobs import job_cct_ns
from testbed.carriers.protocol import ProgressListener, WorkloadSamples
from testbed.carriers.recording import Recording, recording
from testbed.engine.dispatch import QpDispatcher
from testbed.engine.faults import Faults, NoFaults
from testbed.engine.flow_control import FlowControl, NoFlowControl
from testbed.engine.intra_host import run_inside_hosts
from testbed.engine.loop import TickLoop
from testbed.engine.rate_limit import CongestionLimit, NoRateLimit, RateLimit
from testbed.engine.setup import EngineSetup
from testbed.engine.stream import build_streams
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.kernel.host_tuning import tuned_host
from testbed.kernel.probe_link import ProbeLink
from testbed.kernel.scheduling import MonotonicClock, choose_cpus, engine_thread, read_max_backlog
from testbed.measure.samples import MachineSamples
from testbed.plan.faults import broken_at
from testbed.plan.model import SHARED_SHAPER_SPEEDUP, Plan, PlannedWorkload
from testbed.roce.congestion import CongestionControl, make
from testbed.scenario import CongestionControl as ControlName
from testbed.scenario import LossRecovery

# Round trips by which packets may overtake each other where they are spread over several paths: queues of links that carry all
# they can differ by more than one. Repairs come later for it, which costs little while the window is open.
SPREAD_REORDER_LOOPS = 4


class EngineCarrier:
    """Runs workloads over the QPs of the engine.

    Args:
        fabric: The fabric.
        sockets: Descriptor of each NIC's packet socket.
        probe: The fidelity probe.
        clock: Source of time.
        flow: PFC on the fabric; also an attribute.
        recording: The time series that is written along the run, if any.
        faults: What breaks, if anything does.
    """

    def __init__(
        self,
        fabric: Fabric,
        sockets: list[int],
        probe: ProbeLink,
        clock: MonotonicClock,
        flow: FlowControl | NoFlowControl,
        recording: Recording | None = None,
        faults: FabricFaults | None = None,
    ) -> None:
        self._fabric = fabric
        self._faults = faults
        self.flow = flow
        self._sockets = sockets
        self._probe = probe
        self._clock = clock
        self._recording = recording

    def run(self, workload: int, listener: ProgressListener) -> WorkloadSamples:
        """Run all iterations of a workload.

        Raises:
            RunError: A QP ran out of retries or the fabric stalled.
        """
        plan = self._fabric.plan
        planned = plan.workloads[workload]
        if not planned.connections:
            return _run_inside_hosts(plan, planned, listener)
        limit, recorder = rate_limit(plan, workload), self._recording.recorder if self._recording else None
        if recorder is not None:
            recorder.begin_workload(workload, len(planned.connections), self.flow.closed, control_of(limit))
        queues = self._fabric.arrays.queues

        def lost_frames() -> npt.NDArray[np.int64]:
            lost: npt.NDArray[np.int64] = (queues["drop_packets"] + queues["lost_packets"]).sum(axis=1).astype(np.int64)
            return lost

        lost_before, drops_before = lost_frames(), queues["drop_packets"].sum()
        loop = TickLoop(
            engine_setup(plan, workload),
            queues=self._fabric.arrays.queues,
            qps=self._fabric.arrays.qps,
            windows=self._fabric.arrays.windows,
            sockets=self._sockets,
            clock=self._clock,
            probe=self._probe,
            describe_connection=lambda index: describe_connection(plan, workload, index, lost_frames() - lost_before),
            flow_control=self.flow,
            rate_limit=limit,
            admission=admission(plan, workload, self._fabric.arrays.qps, self._sockets),
            recorder=recorder,
        )
        mtu, networked = plan.scenario.transport.mtu_bytes, len(planned.connections)
        schedule = planned.pieces or planned.schedule
        streams = (
            QpDispatcher(schedule, planned.qps_per_connection, mtu, networked // planned.qps_per_connection)
            if planned.pieces is not None
            else build_streams(schedule, mtu, networked)
        )
        warmups, iters = planned.workload.warmup_iters, planned.workload.iters
        faults = workload_faults(self._fabric, workload, self._faults)
        results, sightings, warm = [], [], []
        for number in range(warmups + iters):
            warmup = number < warmups
            shown = number if warmup else number - warmups
            listener.iteration(shown, warmups if warmup else iters, warmup=warmup)
            if recorder is not None:
                recorder.begin_iteration(shown, warmup=warmup)
            try:
                result = loop.run_iteration(schedule, streams, None if warmup else faults)
            except RunError as error:
                dropped = int(queues["drop_packets"].sum() - drops_before)
                raise explained_error(error, plan, None if warmup else faults, dropped) from None
            if warmup:
                warm.append(result.wall_ns / plan.dilation.value)
                continue
            results.append(result)
            if isinstance(faults, Faults):
                sightings.append(faults.sightings())
        dilation = plan.dilation.value
        return WorkloadSamples(
            tuple(result.wall_ns / plan.dilation.value for result in results),
            tuple(result.wall_seen_ns for result in results),
            sum(result.retransmitted_packets for result in results),
            tuple(result.machine for result in results),
            np.sum([result.wall_paused_ns for result in results], axis=0),
            np.median([result.wall_end_ns for result in results], axis=0) / plan.dilation.value,
            np.median(
                [
                    result.together_bytes * 1e9 * plan.dilation.value / max(1, result.wall_together_ns)
                    for result in results
                ],
                axis=0,
            ),
            nvlink_bytes=tuple(result.nvlink_bytes for result in results),
            admission=tuple(result.admission for result in results if result.admission is not None),
            job_cct_ns=tuple(
                tuple(
                    job_cct_ns(planned, job, one.wall_end_ns / dilation, one.wall_inside_end_ns / dilation)
                    for one in results
                )
                for job in planned.jobs
            ),
            warmup_cct_ns=tuple(warm),
            faults=tuple(sightings),
            timeouts=sum(result.timeouts for result in results),
        )

    def warnings(self) -> list[str]:
        """Return what a reader of the time series should know."""
        return self._recording.warnings() if self._recording else []


def explained_error(error: RunError, plan: Plan, faults: Faults | NoFaults | None, drops_packets: int) -> RunError:
    """Return an error that says what was broken when it happened, or that buffers were full."""
    step = plan.faults.steps[faults.step if isinstance(faults, Faults) else 0]
    broken = broken_at(plan.faults.incidents, step.at_ns)
    if not broken and drops_packets and not error.hint:
        return RunError(
            f"{error.message}; full buffers dropped {drops_packets} frames",
            hint="turn on `qos.pfc.enabled` or a `transport.congestion_control`, or send less than collapses",
        )
    if not broken:
        return error
    return RunError(
        f"{error.message}; broken then: {', '.join(broken)}",
        hint="no way was left, or routing found it too late: see `routing.convergence_time`, `transport.retransmit_timeout`",
    )


def _run_inside_hosts(plan: Plan, planned: PlannedWorkload, listener: ProgressListener) -> WorkloadSamples:
    """Run a workload that no packet carries: its time is the model's, whatever the machine does."""
    iters = planned.workload.iters
    samples = []
    for number in range(iters):
        listener.iteration(number, iters, warmup=False)
        samples.append(run_inside_hosts(planned.schedule, planned.intra_host))
    nothing = np.zeros(0, np.int64)
    machine = tuple(
        MachineSamples(
            wall_tick_ns=plan.dilation.wall_tick_ns,
            wall_lateness_ns=nothing,
            wall_busy_ns=nothing,
            wall_probe_ns=nothing,
            wall_duration_ns=max(1, round(cct_ns * plan.dilation.value)),
            resolution_error_fraction=0.0,
        )
        for cct_ns, _ in samples
    )
    return WorkloadSamples(
        cct_ns=tuple(cct_ns for cct_ns, _ in samples),
        wall_cct_ns=(),
        retransmitted_packets=0,
        machine=machine,
        wall_paused_ns=np.zeros(len(plan.topology.ports) + 1),
        nvlink_bytes=tuple(nbytes for _, nbytes in samples),
        job_cct_ns=tuple((job.ideal_cct_ns,) * iters for job in planned.jobs),  # the same model computed it
        timeouts=0,
    )


def engine_setup(plan: Plan, workload: int) -> EngineSetup:
    """Return what the tick loop needs to know of a planned workload."""
    topology, planned = plan.topology, plan.workloads[workload]
    burst_ns = np.zeros(len(topology.ports) + 1)
    gain = np.zeros(len(topology.ports) + 1)
    for port in topology.ports:
        if port.id not in plan.unshared_ports:  # elsewhere a backlog is the machine's, and nothing is gained by it
            bytes_per_s = plan.wall_rate_bytes_per_s(port.rate_bits_per_s)
            burst_ns[port.id] = 1e9 * plan.burst_bytes(port.id, shared=True) / bytes_per_s
            gain[port.id] = SHARED_SHAPER_SPEEDUP - 1.0
    return EngineSetup(
        connections=planned.connections,
        one_way_ns=planned.one_way_ns,
        time_dilation=plan.dilation.value,
        wall_tick_ns=plan.dilation.wall_tick_ns,
        mtu=plan.scenario.transport.mtu_bytes,
        nic_port=np.array([nic.id for nic in topology.nics], np.int64),
        wall_port_rate_bytes_per_s=port_rates_of(plan, plan.faults.steps[0]),
        priority_weights={one.priority: one.weight for one in plan.scenario.qos.data_priorities},
        retransmit_timeout_ns=plan.retransmit_timeout_ns,
        wall_burst_ns=burst_ns,
        shaper_gain_fraction=gain,
        max_backlog_frames=read_max_backlog(),
        resolution_error_fraction=planned.resolution_error_fraction,
        intra_host=planned.intra_host,
        wall_cnp_interval_ns=round(plan.cnp_interval_ns * plan.dilation.value),
        selective=plan.scenario.transport.loss_recovery is LossRecovery.SELECTIVE,
        reorder_time_ns=plan.scenario.transport.reorder_time_ns,
        reorder_loops=SPREAD_REORDER_LOOPS if any(len(ways) > 1 for ways in planned.possible_routes) else 1,
    )


def rate_limit(plan: Plan, workload: int) -> RateLimit:
    """Return the congestion control of a workload's QPs."""
    transport = plan.scenario.transport
    if transport.congestion_control is ControlName.NONE:
        return NoRateLimit()
    planned = plan.workloads[workload]
    nics = [plan.topology.nics[connection.requester.local.nic] for connection in planned.connections]
    rates = np.array([nic.rate_bits_per_s / 8 for nic in nics])
    return CongestionLimit(
        make(str(transport.congestion_control), transport.congestion_parameters, rates),
        time_dilation=plan.dilation.value,
        frame_wire_bytes=plan.frame_wire_bytes,
        wall_tick_ns=plan.dilation.wall_tick_ns,
    )


def control_of(limit: RateLimit) -> CongestionControl | None:
    """Return the reaction points behind a limit, if there are any."""
    return limit.control if isinstance(limit, CongestionLimit) else None


def describe_connection(
    plan: Plan, workload: int, index: int, lost_packets: npt.NDArray[np.int64] | None = None
) -> str:
    """Name a connection by its ranks, QP and path, and the link that lost most of the frames.

    Args:
        plan: The plan.
        workload: Index of the workload.
        index: Index of the connection.
        lost_packets: Frames that were dropped before each port or lost behind it, shape ``(ports + 1,)``.
    """
    planned, topology = plan.workloads[workload], plan.topology
    connection = planned.connections[index]
    requester = connection.requester
    path = planned.paths[index].describe(topology)
    text = f"rank {requester.local.rank} to {requester.remote.rank}, QP {requester.qpn:#x} ({path})"
    if lost_packets is None or not lost_packets.any():
        return text
    # Of its own ways first, there and back; its ACKs may come back by others.
    own = {port for route in planned.possible_routes[index] for port in route.path.ports}
    own |= {topology.port(port).peer for port in own}
    candidates = [port for port in sorted(own) if lost_packets[port]] or np.flatnonzero(lost_packets).tolist()
    worst = max(candidates, key=lambda port: int(lost_packets[port]))
    link = topology.links[topology.port(worst).link].name
    return f"{text}; most frames were lost on {link}, {int(lost_packets[worst])} from {topology.port_name(worst)}"


@contextlib.contextmanager
def engine_carrier(
    fabric: Fabric, waiting: Callable[[], None] = lambda: None, *, series: Path | None = None
) -> Iterator[tuple[EngineCarrier, list[str]]]:
    """Open the engine on a fabric for the block.

    Args:
        fabric: The fabric.
        waiting: Called when another run has the machine; this one then waits for it.
        series: Folder for the time series of the run; None for none.

    Yields:
        The carrier, and warnings about what the machine refused.
    """
    clock = MonotonicClock()
    engine_cpu, port_cpus = choose_cpus()
    recorded: contextlib.AbstractContextManager[Recording | None] = contextlib.nullcontext()
    if series is not None:
        recorded = recording(fabric, series, control_of(rate_limit(fabric.plan, 0)))
    with (
        recorded as written,  # first: its process does not inherit the engine's CPU and priority
        fabric.packet_sockets() as sockets,
        contextlib.closing(ProbeLink(fabric.probe_cpu, clock.now_ns)) as probe,
        tuned_host(port_cpus, waiting) as host_warnings,
        engine_thread(engine_cpu) as warnings,
        flow_control(fabric, clock.now_ns()) as flow,
        fabric_faults(fabric, flow, clock.now_ns()) as faults,
    ):
        yield (
            EngineCarrier(fabric, [one.fileno() for one in sockets], probe, clock, flow, written, faults),
            host_warnings + warnings,
        )
