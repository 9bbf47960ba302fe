"""A plan: everything that will be done and expected, computed before anything exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.plan.dilation import TimeDilation
from testbed.plan.operations import (
    AddAddress,
    AddRoute,
    AttachPrograms,
    CreateLink,
    CreateNamespace,
    LinkEnd,
    Operation,
    ShapePort,
)
from testbed.roce.queue_pairs import Connection
from testbed.roce.wire import LINK_OVERHEAD_BYTES
from testbed.routing import ForwardingTables, Path
from testbed.scenario import CollectiveWorkload, FlowsWorkload, Scenario, Workload
from testbed.topology import NodeKind, Topology

# Shapers run faster than the links they stand for: at exactly equal rates a drained token bucket never refills, and then every
# frame waits for a timer of its own (7 µs each). NICs are paced by the engine at the exact rate, so their shapers, which only
# the kernel's own traffic feels, may be faster still; where a switch port is the bottleneck, its speedup is the error.
SWITCH_SHAPER_SPEEDUP = 1.003
NIC_SHAPER_SPEEDUP = 1.05
# A bucket holds at least this many full frames, and some ticks' worth: hops without a queue then need no timers, also when a
# tick comes late.
MIN_BURST_FRAMES = 8
BURST_TICKS = 3
# Room for the largest headers beside the payload (IP, UDP, BTH, RETH, ICRC: 60 bytes).
_MTU_HEADROOM_BYTES = 104
_MIN_MTU_BYTES = 1500


@dataclass(frozen=True, eq=False)
class PlannedWorkload:
    """One item of the workload, ready to run.

    Attributes:
        workload: The item.
        order: Ranks that take part, in the order of the collective.
        schedule: Its transfers.
        connections: A QP pair per connection of the schedule.
        paths: The path of each connection's data.
        one_way_ns: Propagation and one frame time per hop of each path, shape ``(connections,)``.
        ideal_cct_ns: Completion time over a non-blocking core.
        predicted_cct_ratio: Expected CCT over ideal, from the forwarding tables.
        traffic_factor: busbw / algbw: the bytes that the busiest NIC must carry each way per byte of `size_bytes`.
        resolution_error_fraction: What a tick more of latency adds to the ideal completion time: how coarse the engine's
            reaction is for this workload.
    """

    workload: Workload
    order: tuple[int, ...]
    schedule: Schedule
    connections: tuple[Connection, ...]
    paths: tuple[Path, ...]
    one_way_ns: npt.NDArray[np.int64]
    ideal_cct_ns: float
    predicted_cct_ratio: float
    traffic_factor: float
    resolution_error_fraction: float

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
    def nranks(self) -> int:
        """Return the number of ranks that take part."""
        return len(self.order)


@dataclass(frozen=True, eq=False)
class Plan:
    """What ``run`` will build and expect.

    Attributes:
        scenario: The scenario it was made from.
        topology: Nodes, ports, links.
        tables: Forwarding tables.
        dilation: Time dilation and what set it.
        workloads: The workload, ready to run.
        buffer_bytes: Shared packet memory of each switch.
        retransmit_timeout_ns: Emulated.
        warnings: What the lint found.
    """

    scenario: Scenario
    topology: Topology
    tables: ForwardingTables
    dilation: TimeDilation
    workloads: tuple[PlannedWorkload, ...]
    buffer_bytes: int
    retransmit_timeout_ns: int
    warnings: tuple[str, ...]

    @property
    def frame_wire_bytes(self) -> int:
        """Return the wire bytes of a full data frame."""
        return self.scenario.transport.mtu_bytes + 58 + LINK_OVERHEAD_BYTES

    def wall_rate_bytes_per_s(self, rate_bits_per_s: int) -> float:
        """Return what a link rate is on this machine's clock."""
        return rate_bits_per_s / 8 / self.dilation.value

    def burst_bytes(self, rate_bits_per_s: int) -> int:
        """Return the bucket of a port's shaper."""
        tick_bytes = self.wall_rate_bytes_per_s(rate_bits_per_s) * self.dilation.wall_tick_ns / 1e9
        return max(MIN_BURST_FRAMES, round(BURST_TICKS * tick_bytes / self.frame_wire_bytes)) * self.frame_wire_bytes

    def operations(self, namespaces: Sequence[str]) -> tuple[Operation, ...]:
        """Return what builds the fabric, in order.

        Args:
            namespaces: Name of each node's namespace.
        """
        topology = self.topology
        mtu = max(_MIN_MTU_BYTES, self.scenario.transport.mtu_bytes + _MTU_HEADROOM_BYTES)
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
                speedup = NIC_SHAPER_SPEEDUP if node.kind is NodeKind.HOST else SWITCH_SHAPER_SPEEDUP
                rate = self.wall_rate_bytes_per_s(port.rate_bits_per_s) * speedup
                result.append(
                    ShapePort(
                        node.index,
                        port.id,
                        port.ifname,
                        round(rate),
                        self.burst_bytes(port.rate_bits_per_s),
                        LINK_OVERHEAD_BYTES,
                    )
                )
                result.append(AttachPrograms(node.index, port.id, port.ifname, node.kind is NodeKind.HOST))
                result.append(AddAddress(node.index, port.id, port.ifname, port.address, 31, peer.address, peer.mac))
            for route in topology.kernel_routes(node):
                hops = tuple((hop.address, hop.port) for hop in route.next_hops)
                result.append(AddRoute(node.index, route.prefix, route.prefix_length, hops))
        return tuple(result)
