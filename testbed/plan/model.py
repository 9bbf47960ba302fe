"""A plan: everything that will be done and expected, computed before anything exists."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from testbed.collectives import IntraHostLinks, Schedule
from testbed.plan.admission import AdmissionForecast, grants_share_queue
from testbed.plan.dilation import TimeDilation
from testbed.plan.faults import FaultPlan
from testbed.plan.loss import link_losses
from testbed.plan.operations import (
    MAIN_TABLE,
    AddAddress,
    AddRoute,
    AddRule,
    AttachPrograms,
    BackEnds,
    CreateLink,
    CreateNamespace,
    KernelMarking,
    LinkEnd,
    Operation,
    QueueClass,
    ShapePort,
)
from testbed.plan.qos import (
    PAUSABLE_BURST_TICKS,
    Marking,
    PauseThresholds,
    gate_allowance_ns,
    marking_of,
    notification_interval_ns,
    pause_thresholds,
    shared_bytes,
    switch_of,
)
from testbed.roce.queue_pairs import Connection
from testbed.roce.wire import LINK_OVERHEAD_BYTES
from testbed.routing import ForwardingTables, Path, Route
from testbed.scenario import ApplicationWorkload, CollectiveWorkload, FlowsWorkload, Scenario, Workload
from testbed.topology import NodeKind, Topology
from testbed.units import format_size

# Shapers run faster than the links they stand for: at exactly equal rates a drained token bucket never refills, and then every
# frame waits for a timer of its own (7 µs each), which can overload the fabric's CPU for good. The engine paces NICs at the exact
# rate, so a port that only one NIC feeds never limits anything, and its shaper may be faster still; where several NICs share a
# switch port the speedup is the error.
SHARED_SHAPER_SPEEDUP = 1.003
UNSHARED_SHAPER_SPEEDUP = 1.05
# A bucket holds at least this many full frames, and some ticks' worth: hops without a queue then need no timers, also when a
# tick comes late. What the bucket of a shared port has saved leaves faster than the link would, so it is smaller.
MIN_BURST_FRAMES = 8
SHARED_BURST_TICKS = 3
UNSHARED_BURST_TICKS = 6
# Room for the largest headers beside the payload (IP, UDP, BTH, RETH, ICRC: 60 bytes).
_MTU_HEADROOM_BYTES = 104
_MIN_MTU_BYTES = 1500
# The routing tables of a host's several NICs; clear of the kernel's own, 253 to 255.
_FIRST_SOURCE_TABLE = 100
_ETHERNET_HEADER_BYTES = 14
# Collectives whose call takes one rank's share of the buffer as its count.
_COUNTED_BY_SHARE = frozenset({"reduce_scatter", "all_gather", "all_to_all", "gather", "scatter"})


class _Item:
    """What is called how of a workload item that is planned.

    Attributes:
        workload: The item, at one size.
        order: Ranks that take part, in the order of the collective.
    """

    workload: Workload
    order: tuple[int, ...]

    @property
    def collective_name(self) -> str:
        """Return the collective or the pattern, such as ``all_reduce`` or ``incast``."""
        item = self.workload
        return str(item.collective if isinstance(item, CollectiveWorkload) else item.pattern)

    @property
    def algorithm_name(self) -> str:
        """Return the algorithm; patterns are ``direct``, all flows at once."""
        return str(self.workload.algorithm) if isinstance(self.workload, CollectiveWorkload) else "direct"

    @property
    def size_bytes(self) -> int:
        """Return the size that algbw refers to.

        The buffer of a collective; what each rank sends in an incast (algbw is then one sender's share, busbw what the
        receiver gets) or a permutation; all flows' sizes together (busbw is then what the busiest NIC carries).
        """
        item = self.workload
        return sum(flow.size_bytes for flow in item.flows) if isinstance(item, FlowsWorkload) else item.size_bytes

    @property
    def count(self) -> int:
        """Return the elements, of a byte each, that a rank passes to the collective's call, as nccl-tests' column.

        That is a rank's share of the larger buffer where the ranks' shares differ from it, rounded down.

        Source:
            nccl-tests, src/all_gather.cu and its neighbours (``…GetCollByteCount``, ``paramcount``).
        """
        return self.size_bytes // self.nranks if self.collective_name in _COUNTED_BY_SHARE else self.size_bytes

    @property
    def nranks(self) -> int:
        """Return the number of ranks that take part."""
        return len(self.order)

    @property
    def title(self) -> str:
        """Return what is run, in words."""
        return f"{self.collective_name} ({self.algorithm_name}) of {format_size(self.size_bytes)}"


@dataclass(frozen=True, eq=False)
class PlannedJob(_Item):
    """One job's part of what runs at the same time.

    Attributes:
        name: Of the job.
        workload: What it runs, at one size.
        order: Ranks of the fabric that take part, in the order of the collective.
        hosts: Numbers of its hosts; its rank 0 is on the first.
        start_ns: When it begins, from the beginning of the iteration.
        connections: Its connections in `PlannedWorkload.messages`, in the order in which its own schedule has them.
        ideal_cct_ns: Completion time over a non-blocking core.
        predicted_cct_ratio: Expected CCT over ideal beside the other jobs.
        traffic_factor: busbw / algbw.
        nvlink_bytes: Payload that stays inside hosts, in an iteration.
        flow_order: Index in ``connections`` of each flow of a pattern, in the order in which the scenario lists them.
    """

    name: str
    workload: Workload
    order: tuple[int, ...]
    hosts: tuple[int, ...]
    start_ns: int
    connections: npt.NDArray[np.int64]
    ideal_cct_ns: float
    predicted_cct_ratio: float
    traffic_factor: float
    nvlink_bytes: int
    flow_order: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class PlannedWorkload(_Item):
    """One item of the workload at one of its sizes, ready to run; or one of every job, to run together.

    Attributes:
        item: Index of the item in the scenario; the sizes of a sweep share it. Of jobs all that is run.
        workload: The item, at this size alone; of jobs the first's, whose iterations are those of all.
        order: Ranks that take part, in the order of the collective.
        messages: What the collective asks for: its transfers before they are spread over queue pairs. Its ideal completion
            time is the item's.
        schedule: The transfers as they are sent, with a connection per queue pair. With `pieces`, as they would be sent if all
            queue pairs were alike.
        pieces: What is given to the queue pairs of each connection of `messages` as they have credit; None where `schedule`
            says beforehand what each of them sends.
        connections: A QP pair for each of the schedule's first connections, those between hosts. The others join ranks of
            one host and have none.
        paths: The path of each QP pair's data; one of several where switches spread its packets.
        routes: All ways of each QP pair's packets, as long as it does not pause.
        possible_routes: The same with those that it may change to after a pause (flowlets).
        one_way_ns: Propagation and one frame time per hop of each path, shape ``(paths,)``.
        intra_host: What carries the schedule's other connections.
        ideal_cct_ns: Completion time over a non-blocking core.
        predicted_cct_ratio: Expected CCT over ideal, from the forwarding tables.
        traffic_factor: busbw / algbw: the bytes that the busiest NIC must carry each way per byte of `size_bytes`.
        resolution_error_fraction: What a tick more of latency adds to the ideal completion time: how coarse the engine's
            reaction is for this workload.
        flow_order: Index of each flow's connection in `messages`, in the order in which the scenario lists the flows.
        qps_per_connection: QP pairs that each connection of `messages` between hosts has; those of one follow each other.
        admission: What receiver-driven admission should lead to; None without it.
        jobs: The jobs that run at the same time; empty where the scenario has none.
    """

    item: int
    workload: Workload
    order: tuple[int, ...]
    messages: Schedule
    schedule: Schedule
    pieces: Schedule | None
    connections: tuple[Connection, ...]
    paths: tuple[Path, ...]
    routes: tuple[tuple[Route, ...], ...]
    possible_routes: tuple[tuple[Route, ...], ...]
    one_way_ns: npt.NDArray[np.int64]
    intra_host: IntraHostLinks
    ideal_cct_ns: float
    predicted_cct_ratio: float
    traffic_factor: float
    resolution_error_fraction: float
    flow_order: tuple[int, ...] = ()
    qps_per_connection: int = 1
    admission: AdmissionForecast | None = None
    jobs: tuple[PlannedJob, ...] = ()

    @property
    def rows(self) -> tuple[PlannedWorkload | PlannedJob, ...]:
        """Return what has a row of its own in the results: each job, or the item."""
        return self.jobs or (self,)

    @property
    def collective_name(self) -> str:
        """Return the collective or the pattern; of jobs what any of them runs."""
        return "+".join(dict.fromkeys(job.collective_name for job in self.jobs)) or super().collective_name

    @property
    def algorithm_name(self) -> str:
        """Return the algorithm; of jobs that of any of them."""
        return "+".join(dict.fromkeys(job.algorithm_name for job in self.jobs)) or super().algorithm_name

    @property
    def size_bytes(self) -> int:
        """Return the size that algbw refers to; of jobs the largest."""
        return max((job.size_bytes for job in self.jobs), default=0) or super().size_bytes

    @property
    def title(self) -> str:
        """Return what is run, in words."""
        if not self.jobs:
            return super().title
        return "; ".join(f"job {job.name}: {job.title}" for job in self.jobs)

    @property
    def nvlink_bytes(self) -> int:
        """Return the payload that stays inside hosts, in an iteration."""
        return int(self.schedule.nbytes[self.schedule.connection >= len(self.connections)].sum())


@dataclass(frozen=True, eq=False)
class Plan:
    """What ``run`` will build and expect.

    Attributes:
        scenario: The scenario it was made from.
        topology: Nodes, ports, links.
        tables: Forwarding tables.
        dilation: Time dilation and what set it.
        workloads: The workload, ready to run: one per item and size; empty where it is of applications.
        wall_tick_lateness_ns: How late this machine's ticks are at their 99th percentile; None where it was not measured.
        retransmit_timeout_ns: Emulated.
        warnings: What the lint found.
        faults: What goes wrong in an iteration.
    """

    scenario: Scenario
    topology: Topology
    tables: ForwardingTables
    dilation: TimeDilation
    workloads: tuple[PlannedWorkload, ...]
    wall_tick_lateness_ns: int | None
    retransmit_timeout_ns: int
    warnings: tuple[str, ...]
    faults: FaultPlan

    @property
    def applications(self) -> tuple[ApplicationWorkload, ...]:
        """Return the applications to run; empty where the workload is of collectives and patterns."""
        return self.scenario.applications

    @property
    def largest_workloads(self) -> tuple[PlannedWorkload, ...]:
        """Return each item of the workload once, at its largest size."""
        return tuple({planned.item: planned for planned in self.workloads}.values())

    @property
    def frame_wire_bytes(self) -> int:
        """Return the wire bytes of a full data frame."""
        return self.scenario.transport.mtu_bytes + 58 + LINK_OVERHEAD_BYTES

    @property
    def port_mtu_bytes(self) -> int:
        """Return the MTU of every port."""
        return max(_MIN_MTU_BYTES, self.scenario.transport.mtu_bytes + _MTU_HEADROOM_BYTES)

    @property
    def largest_frame_wire_bytes(self) -> int:
        """Return the wire bytes of the largest frame that any port sends."""
        return self.port_mtu_bytes + _ETHERNET_HEADER_BYTES + LINK_OVERHEAD_BYTES

    def wall_rate_bytes_per_s(self, rate_bits_per_s: int) -> float:
        """Return what a link rate is on this machine's clock."""
        return rate_bits_per_s / 8 / self.dilation.value

    @cached_property
    def unshared_ports(self) -> frozenset[int]:
        """Return the ports that data of at most one NIC crosses in any workload item, at a rate that they carry.

        They are NICs, and switch ports that no two flows of different NICs share. Ports without data are not among them. Where
        grants share the data's queue every switch port may carry those of other NICs.
        Where links fail while traffic runs flows change their ways: then only NICs are among them.
        """
        if grants_share_queue(self.scenario) or self.faults.is_eventful:
            return self.nic_ports()
        shared: set[int] = set()
        crossed: set[int] = set()
        for planned in self.workloads:
            feeders: dict[int, int] = {}
            for path in (route.path for routes in planned.possible_routes for route in routes):
                nic = path.ports[0]
                for port in path.ports:
                    crossed.add(port)
                    slower = self.topology.port(port).rate_bits_per_s < self.topology.port(nic).rate_bits_per_s
                    if feeders.setdefault(port, nic) != nic or slower:
                        shared.add(port)
        return frozenset(crossed - shared) | self.nic_ports()

    @cached_property
    def marking(self) -> dict[int, Marking]:
        """Return the ECN thresholds of every switch port that marks, by port id."""
        switches = [port for port in self.topology.ports if self.topology.nodes[port.node].kind is not NodeKind.HOST]
        found = {port.id: marking_of(self.scenario, port) for port in switches}
        return {port: marks for port, marks in found.items() if marks is not None}

    @cached_property
    def losses(self) -> dict[int, Fraction]:
        """Return the share of its frames that each lossy port's link loses in that direction, by port id."""
        return link_losses(self.scenario, self.topology)

    @cached_property
    def pausing(self) -> dict[int, PauseThresholds]:
        """Return the PFC thresholds of every switch port's lossless priority, by port id."""
        bursts = {port.id: self.burst_bytes(port.id, shared=True) for port in self.topology.ports}
        return pause_thresholds(self.scenario, self.topology, self.dilation, bursts, self.wall_tick_lateness_ns)

    @property
    def wall_gate_allowance_ns(self) -> int:
        """Return how late this machine may obey a pause: what the headroom makes room for."""
        return round(gate_allowance_ns(self.dilation, self.wall_tick_lateness_ns))

    @property
    def cnp_interval_ns(self) -> int:
        """Return the time in which a responder sends at most one CNP per QP; 0 where nobody listens to CNPs."""
        return notification_interval_ns(self.scenario.transport)

    def buffer_bytes(self, node: int) -> int:
        """Return the packet memory of a switch."""
        return switch_of(self.scenario, self.topology.nodes[node]).buffer_bytes

    def shared_bytes(self, node: int) -> int:
        """Return what of a switch's packet memory is not headroom."""
        found = self.topology.nodes[node]
        return shared_bytes(switch_of(self.scenario, found), found, self.pausing)

    def is_pausable(self, port: int) -> bool:
        """Return whether the other end of a port's link can pause it."""
        peer = self.topology.port(self.topology.port(port).peer)
        return self.scenario.qos.pfc.enabled and self.topology.nodes[peer.node].kind is not NodeKind.HOST

    def burst_bytes(self, port: int, *, shared: bool) -> int:
        """Return the bucket of a port's shaper."""
        ticks: float = SHARED_BURST_TICKS if shared else UNSHARED_BURST_TICKS
        if self.is_pausable(port):
            ticks = PAUSABLE_BURST_TICKS
        rate = self.wall_rate_bytes_per_s(self.topology.port(port).rate_bits_per_s)
        tick_bytes = rate * self.dilation.wall_tick_ns / 1e9
        return max(MIN_BURST_FRAMES, round(ticks * tick_bytes / self.frame_wire_bytes)) * self.frame_wire_bytes

    def nic_ports(self) -> frozenset[int]:
        """Return the port ids of all NICs."""
        return frozenset(port.id for port in self.topology.nics)

    def _kernel_marking(self, port: int) -> KernelMarking | None:
        marks = self.marking.get(port)
        return None if marks is None else KernelMarking(marks.kmin_bytes, marks.kmax_bytes, marks.pmax)

    @property
    def queue_classes(self) -> tuple[QueueClass, ...]:
        """Return the data priorities and their weights, in the order in which a port serves them."""
        return tuple(QueueClass(one.priority, one.weight) for one in self.scenario.qos.served_priorities)

    @property
    def rest_priority(self) -> int:
        """Return the data priority that takes what has none: the lowest lossy one, which asks for nothing, or the usual one."""
        qos = self.scenario.qos
        return next((one.priority for one in qos.data_priorities if not one.lossless), qos.lossless_priority)

    def operations(
        self, namespaces: Sequence[str], *, any_workload: bool, back_ends: BackEnds | None = None
    ) -> tuple[Operation, ...]:
        """Return what builds the fabric, in order.

        Args:
            namespaces: Name of each node's namespace.
            any_workload: Other workloads than the plan's will run: every switch port may be shared.
            back_ends: What does the work; those that every kernel has without.
        """
        back_ends = back_ends or BackEnds()
        unshared = self.nic_ports() if any_workload else self.unshared_ports
        topology = self.topology
        mtu = self.port_mtu_bytes
        result: list[Operation] = [
            CreateNamespace(node.index, namespaces[node.index], node.kind is not NodeKind.HOST)
            for node in topology.nodes
        ]
        for link in topology.links:
            a, b = topology.port(link.a), topology.port(link.b)
            ends = [LinkEnd(port.node, port.id, port.ifname, port.mac) for port in (a, b)]
            result.append(CreateLink(ends[0], ends[1], mtu))
        for node in topology.nodes:
            for port_id in node.ports:
                port = topology.port(port_id)
                peer = topology.port(port.peer)
                shared = port.id not in unshared
                speedup = SHARED_SHAPER_SPEEDUP if shared else UNSHARED_SHAPER_SPEEDUP
                rate = self.wall_rate_bytes_per_s(port.rate_bits_per_s) * speedup
                result.append(
                    ShapePort(
                        node.index,
                        port.id,
                        port.ifname,
                        round(rate),
                        self.burst_bytes(port.id, shared=shared),
                        LINK_OVERHEAD_BYTES,
                        self.largest_frame_wire_bytes,
                        self.queue_classes,
                        self.rest_priority,
                        gate=back_ends.gate if self.is_pausable(port.id) else None,
                        marking=self._kernel_marking(port.id) if back_ends.marker == "red" else None,
                        scheduler=back_ends.scheduler,
                        wall_delay_ns=round(port.delay_ns * self.dilation.value)
                        if back_ends.link_delay == "netem"
                        else 0,
                    )
                )
                result.append(AttachPrograms(node.index, port.id, port.ifname, node.kind is NodeKind.HOST))
                result.append(AddAddress(node.index, port.id, port.ifname, port.address, 31, peer.address, peer.mac))
            tables = itertools.count(_FIRST_SOURCE_TABLE)
            for route in topology.kernel_routes(node):
                hops = tuple((hop.address, hop.port) for hop in route.next_hops)
                table = MAIN_TABLE if route.source is None else next(tables)
                result.append(AddRoute(node.index, route.prefix, route.prefix_length, hops, table))
                if route.source is not None:
                    result.append(AddRule(node.index, route.source, table))
        return tuple(result)
