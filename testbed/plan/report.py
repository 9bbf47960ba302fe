"""What a plan says to people and scripts: the paths of its flows, and its figures as plain data."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.collectives import wire_bytes
from testbed.plan.admission import forecast_peak_bytes
from testbed.plan.model import Plan, PlannedJob, PlannedWorkload
from testbed.plan.operations import BackEnds, CreateLink, Operation
from testbed.roce.wire import LINK_OVERHEAD_BYTES
from testbed.routing import find_collisions, link_loads
from testbed.scenario import Carrier, ZonesFabric
from testbed.topology import NodeKind, Topology, format_address


@dataclass(frozen=True, slots=True)
class FlowPath:
    """One flow and the way its data takes.

    Attributes:
        name: Its two hosts and QP, such as ``host0>host4#0x100``; hosts with several NICs with theirs, such as ``host0/eth1``.
        workload: Index of the workload item it belongs to.
        src: Sending host.
        dst: Receiving host.
        qpn: QP of the sender.
        dst_qpn: QP of the receiver.
        udp_source_port: Source port of its frames.
        path: Names of the nodes visited, both hosts included; where a switch spreads the flow's packets, all that it spreads
            them to, such as ``spine0|spine1``.
        ports: The port it leaves each node by, such as ``leaf0/up1`` or ``leaf0/up0|leaf0/up1``.
        spread: Over how many paths switches spread its packets; 1 for a flow that keeps its path.
        may_change: Whether it may take another path after a pause (flowlets); ``path`` is then the first.
    """

    name: str
    workload: int
    src: str
    dst: str
    qpn: int
    dst_qpn: int
    udp_source_port: int
    path: tuple[str, ...]
    ports: tuple[str, ...]
    spread: int = 1
    may_change: bool = False


@dataclass(frozen=True, slots=True)
class LinkLoad:
    """What one direction of a link is asked to carry.

    Attributes:
        name: Its two ports, such as ``leaf0/up1>spine1/down0``.
        workload: Index of the workload item.
        flows: Number of flows that cross it, whole or in part.
        load_fraction: What they offer when every NIC sends at line rate, over the link's rate; above 1 they must slow down.
    """

    name: str
    workload: int
    flows: int
    load_fraction: float


@dataclass(frozen=True, slots=True)
class PathCollision:
    """A switch port that several flows leave by.

    Attributes:
        port: Such as ``leaf0/up1``.
        workload: Index of the workload item.
        flows: Names of the flows.
    """

    port: str
    workload: int
    flows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PathReport:
    """Every flow's path and what follows from them, before anything is built.

    Items of a workload run one after the other: loads and collisions are those of each item alone. The sizes of a sweep
    take the same paths and stand here once.

    Attributes:
        flows: All flows, item by item.
        links: Every direction of every link that a flow crosses.
        collisions: Switch ports with more than one flow; a port towards a host is among them.
        predicted_cct_ratio: Completion time over that of a non-blocking core, of the worst item; None where the workload is of
            applications: they open their flows themselves.
    """

    flows: tuple[FlowPath, ...]
    links: tuple[LinkLoad, ...]
    collisions: tuple[PathCollision, ...]
    predicted_cct_ratio: float | None


def describe_paths(plan: Plan) -> PathReport:
    """Return the path of every flow of a plan, the load of every link and the prediction."""
    flows: list[FlowPath] = []
    links: list[LinkLoad] = []
    collisions: list[PathCollision] = []
    for planned in plan.largest_workloads:
        index = planned.item
        described = _describe_flows(plan, index, planned)
        flows += described
        links += _describe_loads(plan, index, planned)
        # What is spread packet by packet meets everything and collides with nothing.
        paths = {flow.name: path for flow, path in zip(described, planned.paths, strict=True) if flow.spread == 1}
        collisions += [
            PathCollision(collision.port_name, index, collision.flows)
            for collision in find_collisions(plan.topology, paths)
        ]
    worst = max((planned.predicted_cct_ratio for planned in plan.workloads), default=None)
    return PathReport(tuple(flows), tuple(links), tuple(collisions), worst)


@dataclass(frozen=True, slots=True)
class LinkComparison:
    """What one direction of a link carried in a run, beside what its paths had promised.

    Attributes:
        name: Its two ports, such as ``leaf0/up1>spine1/down0``.
        predicted_bytes: Data frames without FCS, over all measured iterations; None where applications sent them.
        measured_bytes: All frames without FCS: what was sent again, ACKs and pauses too.
    """

    name: str
    predicted_bytes: int | None
    measured_bytes: int


@dataclass(frozen=True, slots=True)
class RatioComparison:
    """Completion time over ideal of one row of the results, as predicted and as measured."""

    title: str
    predicted_cct_ratio: float | None
    measured_cct_ratio: float | None


@dataclass(frozen=True, slots=True)
class PathComparison:
    """A run beside its prediction.

    Attributes:
        rows: The rows of the results.
        links: Every direction of a link that data crossed, or was to cross.
    """

    rows: tuple[RatioComparison, ...]
    links: tuple[LinkComparison, ...]


def predict_port_bytes(plan: Plan) -> npt.NDArray[np.float64]:
    """Return the bytes of data frames, without FCS, that every port sends in all measured iterations, by port id.

    Every flow is taken to keep its first path, and nothing to be sent twice.
    """
    mtu = plan.scenario.transport.mtu_bytes
    total = np.zeros(len(plan.topology.ports) + 1)
    for planned in plan.workloads:
        schedule, count = planned.schedule, len(planned.connections)
        frames = wire_bytes(schedule.nbytes, mtu) - LINK_OVERHEAD_BYTES * -(-schedule.nbytes // mtu)
        carried = np.bincount(schedule.connection, frames, len(schedule.connections))[:count] * planned.workload.iters
        ways = [(route, nbytes) for routes, nbytes in zip(planned.routes, carried, strict=True) for route in routes]
        weights = [route.share * nbytes for route, nbytes in ways]
        total += link_loads(plan.topology, [route.path for route, _ in ways], weights)
    return total


def compare_links(plan: Plan, measured_bytes: Mapping[str, int | None]) -> tuple[LinkComparison, ...]:
    """Return every direction of a link that data crossed, or was to cross, the fullest first.

    Args:
        plan: The plan of the run.
        measured_bytes: What each port sent, by its name.
    """
    topology, predicted = plan.topology, predict_port_bytes(plan)
    found = [
        LinkComparison(
            f"{topology.port_name(port.id)}>{topology.port_name(port.peer)}",
            None if plan.applications else round(predicted[port.id]),
            measured_bytes.get(topology.port_name(port.id)) or 0,
        )
        for port in topology.ports
    ]
    return tuple(
        sorted(
            (one for one in found if one.predicted_bytes or one.measured_bytes),
            key=lambda one: -(one.measured_bytes if one.predicted_bytes is None else one.predicted_bytes),
        )
    )


def _describe_flows(plan: Plan, index: int, planned: PlannedWorkload) -> list[FlowPath]:
    topology = plan.topology
    flows = []
    for connection, routes, possible in zip(planned.connections, planned.routes, planned.possible_routes, strict=True):
        end = connection.requester
        nodes = _merge([[topology.nodes[node].name for node in route.path.nodes] for route in routes])
        ports = routes[0].path.ports
        last = topology.port(ports[-1]).peer
        flows.append(
            FlowPath(
                name=f"{_nic_name(topology, ports[0])}>{_nic_name(topology, last)}#{end.qpn:#x}",
                workload=index,
                src=nodes[0],
                dst=nodes[-1],
                qpn=end.qpn,
                dst_qpn=end.peer_qpn,
                udp_source_port=end.udp_source_port,
                path=nodes,
                ports=_merge([[topology.port_name(port) for port in route.path.ports] for route in routes]),
                spread=len(routes),
                may_change=len(possible) > len(routes),
            )
        )
    return flows


def _merge(ways: list[list[str]]) -> tuple[str, ...]:
    """Return the names at each hop of several ways of equal length, joined where they differ."""
    return tuple("|".join(dict.fromkeys(names)) for names in zip(*ways, strict=True))


def _nic_name(topology: Topology, port_id: int) -> str:
    """Return the host of a NIC, and which NIC it is where the host has several."""
    host = topology.nodes[topology.port(port_id).node]
    return host.name if len(host.ports) == 1 else topology.port_name(port_id)


def _describe_loads(plan: Plan, index: int, planned: PlannedWorkload) -> list[LinkLoad]:
    topology = plan.topology
    used = [{port for route in routes for port in route.path.ports} for routes in planned.routes]
    flows = Counter(port for ports in used for port in ports)
    # The flows of a NIC share its rate.
    nics = [path.ports[0] for path in planned.paths]
    ways = [(route, nic) for routes, nic in zip(planned.routes, nics, strict=True) for route in routes]
    weights = [route.share * topology.port(nic).rate_bits_per_s / flows[nic] for route, nic in ways]
    offered = link_loads(topology, [route.path for route, _ in ways], weights)
    return [
        LinkLoad(
            name=f"{topology.port_name(port.id)}>{topology.port_name(port.peer)}",
            workload=index,
            flows=flows[port.id],
            load_fraction=round(float(offered[port.id]) / port.rate_bits_per_s, 9),
        )
        for port in topology.ports
        if flows[port.id]
    ]


def describe_back_ends(plan: Plan, back_ends: BackEnds) -> dict[str, str | None]:
    """Return what does the work: what shares the ports; the gate and the marker where anything is paused or marked; what delays,
    where links have a delay and the engine does not; where soft-RoCE devices stand."""
    delays = plan.scenario.transport.carrier is not Carrier.ENGINE and any(
        link.delay_ns for link in plan.topology.links
    )
    return {
        "scheduler": back_ends.scheduler if len(plan.queue_classes) > 1 else "tbf",
        "gate": back_ends.gate if plan.pausing else None,
        "marker": back_ends.marker if plan.marking else None,
        "link_delay": back_ends.link_delay if delays else None,
        "rxe": back_ends.rxe,
    }


def describe_plan(plan: Plan, *, operations: bool = False, back_ends: BackEnds | None = None) -> dict[str, Any]:
    """Return what ``testbed plan`` shows, as plain data for JSON.

    Args:
        plan: The plan.
        operations: Add ``operations[]``: the equal shell commands, in order, each with its node.
        back_ends: What a fabric would be made with on this kernel, where that was found out.
    """
    topology, dilation, fabric = plan.topology, plan.dilation, plan.scenario.fabric
    paused = plan.scenario.qos.paused_priorities
    ports: list[Mapping[str, Any]] = [
        {
            "name": topology.port_name(port.id),
            "node": topology.nodes[port.node].name,
            "ifname": port.ifname,
            "mac": port.mac,
            "address": format_address(port.address),
            "peer": topology.port_name(port.peer),
            "rate_bits_per_s": port.rate_bits_per_s,
            "wall_rate_bytes_per_s": plan.wall_rate_bytes_per_s(port.rate_bits_per_s),
            "delay_ns": port.delay_ns,
        }
        for port in topology.ports
    ]
    report: dict[str, Any] = {
        "name": plan.scenario.name,
        "oversubscription": float(fabric.oversubscription) if isinstance(fabric, ZonesFabric) else None,
        "time_dilation": dilation.value,
        "dilation": {
            "value": dilation.value,
            "bound": str(dilation.bound),
            "capacity_value": dilation.capacity_value,
            "fidelity_value": dilation.fidelity_value,
            "smallest_time_ns": dilation.smallest_time_ns,
            "smallest_time_name": dilation.smallest_time_name,
            "wall_tick_ns": dilation.wall_tick_ns,
            "offered_packets_per_s": dilation.offered_packets_per_s,
            "capacity_packets_per_s": dilation.capacity_packets_per_s,
        },
        "nodes": [
            {"name": node.name, "kind": str(node.kind), "ports": [topology.port(port).ifname for port in node.ports]}
            for node in topology.nodes
        ],
        "ports": ports,
        "links": [
            {
                "name": link.name,
                "ends": [topology.port_name(link.a), topology.port_name(link.b)],
                "rate_bits_per_s": link.rate_bits_per_s,
                "wall_rate_bytes_per_s": plan.wall_rate_bytes_per_s(link.rate_bits_per_s),
                "delay_ns": link.delay_ns,
                "loss_fraction": float(plan.losses.get(link.a, 0)),
            }
            for link in topology.links
        ],
        "workloads": [_describe_row(plan, planned, row) for planned in plan.workloads for row in planned.rows],
        "switches": _describe_switches(plan),
        "data_priorities": [
            {"priority": one.priority, "lossless": one.priority in paused, "weight": one.weight}
            for one in plan.scenario.qos.data_priorities
        ],
        "back_ends": None if back_ends is None else describe_back_ends(plan, back_ends),
        "wall_tick_lateness_ns": plan.wall_tick_lateness_ns,
        "wall_gate_allowance_ns": plan.wall_gate_allowance_ns if plan.pausing else None,
        "retransmit_timeout_ns": plan.retransmit_timeout_ns,
        "warnings": list(plan.warnings),
    }
    if plan.applications:
        report["applications"] = [
            {
                "application": one.application,
                "hosts": sorted({command.host for command in one.commands}),
                "commands": len(one.commands),
                "iters": one.iters,
                "warmup_iters": one.warmup_iters,
                "wall_timeout_ns": one.wall_timeout_ns,
            }
            for one in plan.applications
        ]
    if plan.faults.incidents:
        report["faults"] = [
            {"text": one.text, "at_ns": one.begin_ns, "until_ns": one.end_ns} for one in plan.faults.incidents
        ]
        report["table_changes_ns"] = [
            step.at_ns for before, step in itertools.pairwise(plan.faults.steps) if step.tables is not before.tables
        ]
    if operations:
        names = [node.name for node in topology.nodes]
        report["operations"] = [
            {"node": names[_node_of(operation)], "command": operation.describe()}
            for operation in plan.operations(names, any_workload=False, back_ends=back_ends)
        ]
    return report


def _describe_admission(plan: Plan, planned: PlannedWorkload) -> dict[str, Any] | None:
    """Return what receiver-driven admission should lead to; None without it."""
    found = planned.admission
    return {**asdict(found), "peak_bound_bytes": forecast_peak_bytes(plan, planned)} if found else None


def _describe_row(plan: Plan, planned: PlannedWorkload, row: PlannedWorkload | PlannedJob) -> dict[str, Any]:
    """Return a workload item, or one of the jobs that run at the same time, whose connections and transfers are those of all."""
    job = row if isinstance(row, PlannedJob) else None
    return {
        "job": job.name if job else None,
        "hosts": list(job.hosts) if job else None,
        "beside": [other.name for other in planned.jobs if other is not job] if job else None,
        "collective": row.collective_name,
        "algorithm": row.algorithm_name,
        "size_bytes": row.size_bytes,
        "nranks": row.nranks,
        "iters": planned.workload.iters,
        "warmup_iters": planned.workload.warmup_iters,
        "connections": len(planned.connections),
        "transfers": len(planned.schedule.nbytes),
        "nvlink_bytes": row.nvlink_bytes,
        "cct_ideal_ns": row.ideal_cct_ns,
        "predicted_cct_ratio": row.predicted_cct_ratio,
        "wall_duration_ns": expected_wall_ns(plan, planned),
        "admission": _describe_admission(plan, planned),
    }


def _describe_switches(plan: Plan) -> list[dict[str, Any]]:
    """Return the memory and thresholds of every kind of switch port: switches and ports that are alike once."""
    topology = plan.topology
    rows: dict[tuple[Any, ...], list[str]] = {}
    for node in topology.nodes:
        for port_id in node.ports if node.kind is not NodeKind.HOST else ():
            port, marks, pause = topology.port(port_id), plan.marking.get(port_id), plan.pausing.get(port_id)
            key = (str(node.kind), port.ifname.rstrip("0123456789"), plan.buffer_bytes(node.index), marks, pause)
            rows.setdefault(key, []).append(topology.port_name(port_id))
    return [
        {
            "kind": kind,
            "ports": ports,
            "buffer_bytes": buffer_bytes,
            "kmin_bytes": marks.kmin_bytes if marks else None,
            "kmax_bytes": marks.kmax_bytes if marks else None,
            "pmax_fraction": marks.pmax if marks else None,
            "xoff_bytes": pause.xoff_bytes if pause else None,
            "alpha_fraction": float(pause.alpha) if pause and pause.xoff_bytes is None else None,
            "xon_below_xoff_bytes": pause.hysteresis_bytes if pause else None,
            "headroom_bytes": pause.headroom_bytes if pause else None,
            "needed_headroom_bytes": pause.needed_headroom_bytes if pause else None,
            "pause_delay_ns": pause.delay_ns if pause else None,
        }
        for (kind, _, buffer_bytes, marks, pause), ports in rows.items()
    ]


def _node_of(operation: Operation) -> int:
    """Return the node in whose namespace an operation happens; a link is made from its first end."""
    return operation.a.node if isinstance(operation, CreateLink) else operation.node


def expected_wall_ns(plan: Plan, planned: PlannedWorkload) -> float:
    """Return how long all iterations of a workload should take on this machine's clock."""
    rounds = planned.workload.iters + planned.workload.warmup_iters
    return planned.ideal_cct_ns * planned.predicted_cct_ratio * plan.dilation.value * rounds
