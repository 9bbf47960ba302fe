"""From a scenario to a plan. Pure: the machine's capacity is an argument."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from testbed.collectives import (
    Flow,
    IntraHostLinks,
    Schedule,
    build_flows,
    busiest_nic_bytes,
    find_algorithm,
    ideal_cct_ns,
    incast_flows,
    largest_frame_wire_bytes,
    permutation_flows,
    ring_order,
)
from testbed.errors import PlanError
from testbed.plan.dilation import choose_dilation, choose_tick_ns
from testbed.plan.lint import find_warnings
from testbed.plan.model import Plan, PlannedWorkload
from testbed.plan.predict import predict_cct_ratio
from testbed.plan.qos import notification_interval_ns, response_ns
from testbed.roce.queue_pairs import Connection, Endpoint, build_connections
from testbed.roce.wire import IP_PROTOCOL_UDP, LINK_OVERHEAD_BYTES, ROCE_UDP_PORT, Opcode, frame_bytes
from testbed.routing import FlowKey, ForwardingTables, Path, routing_scheme, trace_path
from testbed.scenario import (
    CollectiveWorkload,
    FlowsWorkload,
    IncastWorkload,
    PermutationWorkload,
    Scenario,
    StarFabric,
    UdpSourcePort,
    Workload,
    expand_sizes,
)
from testbed.topology import LinkSpec, RankMap, Topology, build_clos, build_star

# Retransmission timeout "auto": several loop times beside what the deepest queue of the path can add.
_TIMEOUT_LOOPS = 4
_TIMEOUT_QUEUES = 2

# What is drawn at random beside QPs: each has a stream of its own, so that one does not change with the other.
_ORDER_STREAM, _PERMUTATION_STREAM = 1, 2


class _Traffic(NamedTuple):
    """A workload item as a schedule, the ranks that take part, busbw / algbw, and where each flow's connection is."""

    schedule: Schedule
    order: tuple[int, ...]
    traffic_factor: float
    flow_order: tuple[int, ...] = ()


def build_topology(scenario: Scenario) -> Topology:
    """Return the nodes, ports and links of a scenario."""
    fabric = scenario.fabric
    host_link = LinkSpec(fabric.host_link.rate_bits_per_s, fabric.host_link.delay_ns)
    if isinstance(fabric, StarFabric):
        return build_star(hosts=fabric.nhosts, host_link=host_link, nics_per_host=fabric.nics_per_host)
    uplink = LinkSpec(fabric.uplink.rate_bits_per_s, fabric.uplink.delay_ns)
    return build_clos(
        hosts_per_leaf=fabric.host_counts,
        spines=fabric.spines,
        host_link=host_link,
        uplink=uplink,
        nics_per_host=fabric.nics_per_host,
    )


def build_rank_map(scenario: Scenario) -> RankMap:
    """Return which host, GPU and NIC each rank has."""
    fabric = scenario.fabric
    return RankMap(fabric.nhosts, fabric.gpus_per_host, fabric.nics_per_host)


def build_endpoints(topology: Topology, ranks: RankMap) -> list[Endpoint]:
    """Return the NIC of every rank as frames name it."""
    endpoints = []
    for rank in range(ranks.nranks):
        port = topology.nics[ranks.nic(rank)]
        next_hop = topology.port(port.peer)
        endpoints.append(Endpoint(rank, port.address, port.mac, next_hop.mac, ranks.nic(rank), ranks.host(rank)))
    return endpoints


def build_intra_host_links(scenario: Scenario) -> IntraHostLinks:
    """Return what joins the ranks of a host."""
    ranks, nvlink = build_rank_map(scenario), scenario.fabric.nvlink
    hosts = np.array([ranks.host(rank) for rank in range(ranks.nranks)], np.int64)
    return IntraHostLinks(hosts, nvlink.rate_bits_per_s, nvlink.delay_ns)


def compile_plan(
    scenario: Scenario, *, capacity_packets_per_s: float | None, wall_tick_lateness_ns: int | None = None
) -> Plan:
    """Return the plan of a scenario.

    Args:
        scenario: A valid scenario.
        capacity_packets_per_s: Packets per second this machine carries over four hops; None where it was not
            measured, then fidelity alone sets an automatic dilation.
        wall_tick_lateness_ns: How late this machine's ticks are at their 99th percentile; None where it was not measured.

    Raises:
        PlanError: No fabric can be planned from it.
    """
    topology = build_topology(scenario)
    scheme = routing_scheme(str(scenario.routing.scheme))
    tables = scheme.build_tables(topology, hash_seed=scenario.routing.hash_seed)
    workloads = tuple(
        _plan_workload(index, one_size, scenario, topology, tables)
        for index, item in enumerate(scenario.workload)
        for one_size in expand_sizes(item)
    )
    if not workloads:
        raise PlanError("the workload is empty")

    frame_bits = 8 * (frame_bytes(Opcode.WRITE_MIDDLE, scenario.transport.mtu_bytes) + LINK_OVERHEAD_BYTES)
    offered, hops, most_senders = 0.0, 1.0, 1
    for planned in workloads:
        senders = {path.ports[0] for path in planned.paths}
        most_senders = max(most_senders, len(senders))
        load = sum(topology.port(nic).rate_bits_per_s for nic in senders) / frame_bits
        if senders and load >= offered:
            offered, hops = load, float(np.mean([len(path.ports) for path in planned.paths]))
    # Connections of one NIC differ in their paths; the shortest way in use sets the smallest time.
    delays = [path.delay_ns for planned in workloads for path in planned.paths if path.delay_ns > 0]
    times = [(min(delays), "one-way path delay")] if delays else []
    if scenario.qos.pfc.enabled:
        pauses = [(2 * port.delay_ns + response_ns(port.rate_bits_per_s)) for port in topology.ports]
        times.append((int(min(pauses)), "response to a pause"))
    if notification_interval_ns(scenario.transport):
        times.append((notification_interval_ns(scenario.transport), "CNP interval"))
    smallest, smallest_name = min(times, default=(0, "none: links have no delay"))
    dilation = choose_dilation(
        scenario.time_dilation,
        offered_packets_per_s=offered,
        mean_hops=hops,
        capacity_packets_per_s=capacity_packets_per_s,
        smallest_time_ns=smallest,
        smallest_time_name=smallest_name,
        wall_tick_ns=choose_tick_ns(most_senders),
    )
    tick_ns = round(dilation.wall_tick_ns / dilation.value)
    workloads = tuple(
        replace(
            planned,
            # More latency can, by luck, let connections share a NIC better: never below 0.
            resolution_error_fraction=max(
                0.0, _ideal_cct_ns(planned, topology, scenario, tick_ns) / planned.ideal_cct_ns - 1.0
            ),
        )
        for planned in workloads
    )
    plan = Plan(
        scenario=scenario,
        topology=topology,
        tables=tables,
        dilation=dilation,
        workloads=workloads,
        wall_tick_lateness_ns=wall_tick_lateness_ns,
        retransmit_timeout_ns=_retransmit_timeout_ns(scenario, topology, workloads),
        warnings=(),
    )
    return replace(plan, warnings=find_warnings(plan))


def _build_traffic(item: Workload, scenario: Scenario) -> _Traffic:
    """Return the schedule of a workload item, the ranks that take part in order, and busbw / algbw.

    Slices below a packet would only add headers: where chunks are small they are cut into fewer. Connections inside hosts
    have the last numbers.
    """
    traffic = _collective(item, scenario) if isinstance(item, CollectiveWorkload) else _pattern(item, scenario)
    inside = build_intra_host_links(scenario).find_connections(traffic.schedule)
    pairs = traffic.schedule.connections
    ranked = sorted(range(len(pairs)), key=lambda index: (bool(inside[index]), pairs[index]))
    place = {index: number for number, index in enumerate(ranked)}
    order = tuple(place[index] for index in range(len(pairs)))
    return traffic._replace(schedule=traffic.schedule.sorted_by_sender(last=inside), flow_order=order)


def _collective(item: CollectiveWorkload, scenario: Scenario) -> _Traffic:
    kind = item.order if isinstance(item.order, tuple) else str(item.order)
    order = ring_order(kind, scenario.fabric.rank_counts, np.random.default_rng([scenario.seed, _ORDER_STREAM]))
    algorithm = find_algorithm(str(item.collective), str(item.algorithm)).on_hosts(scenario.fabric.gpus_per_host)
    most = algorithm.chunk_bytes(item.size_bytes, len(order)) // scenario.transport.mtu_bytes
    slices = max(1, min(algorithm.slices_per_chunk(len(order)), most))
    schedule = algorithm.build_schedule(order, item.size_bytes, slices)
    return _Traffic(schedule, order, algorithm.traffic_factor(len(order)))


def _pattern(item: IncastWorkload | PermutationWorkload | FlowsWorkload, scenario: Scenario) -> _Traffic:
    nranks = scenario.fabric.nranks
    if isinstance(item, IncastWorkload):
        flows = incast_flows(item.fan_in, item.size_bytes)
        total = item.size_bytes
    elif isinstance(item, PermutationWorkload):
        rng = np.random.default_rng([scenario.seed, _PERMUTATION_STREAM])
        flows = permutation_flows(nranks, item.size_bytes, rng)
        total = item.size_bytes
    else:
        flows = [Flow(flow.src, flow.dst, flow.size_bytes, flow.start_ns) for flow in item.flows]
        total = sum(flow.nbytes for flow in flows)
    ranks = tuple(sorted({rank for flow in flows for rank in (flow.src, flow.dst)}))
    schedule = build_flows(nranks, flows, min_slice_bytes=scenario.transport.mtu_bytes)
    return _Traffic(schedule, ranks, busiest_nic_bytes(flows) / total)


def _plan_workload(
    index: int, item: Workload, scenario: Scenario, topology: Topology, tables: ForwardingTables
) -> PlannedWorkload:
    mtu = scenario.transport.mtu_bytes
    schedule, order, traffic_factor, flow_order = _build_traffic(item, scenario)
    intra_host = build_intra_host_links(scenario)
    networked = int(np.count_nonzero(~intra_host.find_connections(schedule)))
    connections = build_connections(
        list(schedule.connections[:networked]),
        build_endpoints(topology, build_rank_map(scenario)),
        source_port_per_qp=scenario.transport.udp_source_port is UdpSourcePort.PER_QP,
        rng=np.random.default_rng(scenario.seed),
    )
    paths = tuple(trace_connection(connection, topology, tables) for connection in connections)
    wire = _largest_frame(schedule, networked, mtu)
    frame_ns = [[8e9 * wire / topology.port(port).rate_bits_per_s for port in path.ports] for path in paths]
    one_way = np.array(
        [round(path.delay_ns + sum(times)) for path, times in zip(paths, frame_ns, strict=True)], np.int64
    )
    planned = PlannedWorkload(
        item=index,
        workload=item,
        order=order,
        schedule=schedule,
        connections=tuple(connections),
        paths=paths,
        one_way_ns=one_way,
        ideal_cct_ns=0.0,
        intra_host=intra_host,
        predicted_cct_ratio=predict_cct_ratio(topology, schedule, paths, intra_host.rate_bits_per_s),
        traffic_factor=traffic_factor,
        resolution_error_fraction=0.0,
        flow_order=flow_order,
    )
    return replace(planned, ideal_cct_ns=_ideal_cct_ns(planned, topology, scenario, 0))


def _largest_frame(schedule: Schedule, networked: int, mtu: int) -> int:
    """Return the wire bytes of the largest frame on the first ``networked`` connections; 0 where there are none."""
    nbytes = schedule.nbytes[schedule.connection < networked]
    return largest_frame_wire_bytes(nbytes, mtu) if len(nbytes) else 0


def _ideal_cct_ns(planned: PlannedWorkload, topology: Topology, scenario: Scenario, extra_ns: int) -> float:
    """Return the completion time over a non-blocking core with ``extra_ns`` more latency on every path."""
    mtu, schedule = scenario.transport.mtu_bytes, planned.schedule
    wire = _largest_frame(schedule, len(planned.connections), mtu)
    # The first frame time is part of the NIC's own time.
    first_frame_ns = [round(8e9 * wire / topology.port(path.ports[0]).rate_bits_per_s) for path in planned.paths]
    latency_ns = np.zeros(len(schedule.connections), np.int64)
    latency_ns[: len(planned.connections)] = planned.one_way_ns - np.array(first_frame_ns, np.int64) + extra_ns
    ranks = build_rank_map(scenario)
    return ideal_cct_ns(
        schedule,
        nic_rate_bits_per_s=np.array([nic.rate_bits_per_s for nic in topology.nics]),
        latency_ns=latency_ns,
        mtu=mtu,
        nic_of_rank=np.array([ranks.nic(rank) for rank in range(ranks.nranks)]),
        intra_host=planned.intra_host,
    )


def flow_of(connection: Connection) -> FlowKey:
    """Return the header fields that switches hash of a connection's data."""
    requester = connection.requester
    return FlowKey(
        src_address=requester.local.address,
        dst_address=requester.remote.address,
        src_port=requester.udp_source_port,
        dst_port=ROCE_UDP_PORT,
        protocol=IP_PROTOCOL_UDP,
        dst_qp=requester.peer_qpn,
    )


def trace_connection(connection: Connection, topology: Topology, tables: ForwardingTables) -> Path:
    """Return the path of a connection's data."""
    return trace_path(topology, tables, topology.nics[connection.requester.local.nic].id, flow_of(connection))


def _retransmit_timeout_ns(scenario: Scenario, topology: Topology, workloads: tuple[PlannedWorkload, ...]) -> int:
    if scenario.transport.retransmit_timeout_ns is not None:
        return scenario.transport.retransmit_timeout_ns
    loop_ns = 2 * max(int(planned.one_way_ns.max(initial=0)) for planned in workloads)
    slowest = min(port.rate_bits_per_s for port in topology.ports)
    queue_ns = 8_000_000_000 * scenario.fabric.switch.buffer_bytes // slowest
    return _TIMEOUT_LOOPS * loop_ns + _TIMEOUT_QUEUES * queue_ns
