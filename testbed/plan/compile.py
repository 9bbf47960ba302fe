"""From a scenario to a plan. Pure: the machine's capacity is an argument."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from testbed.collectives import (
    CollectiveAlgorithm,
    Flow,
    IntraHostLinks,
    Schedule,
    build_flows,
    busiest_nic_bytes,
    cut_into_pieces,
    deal_over_qps,
    find_algorithm,
    ideal_arrivals_ns,
    incast_flows,
    keep_connections,
    largest_frame_wire_bytes,
    merge_schedules,
    permutation_flows,
    place_schedule,
    ring_order,
    split_over_qps,
)
from testbed.errors import PlanError
from testbed.plan.admission import forecast_admission
from testbed.plan.dilation import WALL_TICK_NS, TimeDilation, choose_dilation, choose_tick_ns
from testbed.plan.faults import FaultPlan, build_changes, build_steps
from testbed.plan.jobs import fluid_ends_ns, job_hosts, measured_sets, port_times_ns, ranks_of_hosts
from testbed.plan.limits import check_emulation_limits
from testbed.plan.lint import find_warnings
from testbed.plan.model import Plan, PlannedJob, PlannedWorkload
from testbed.plan.predict import predict_cct_ratio
from testbed.plan.qos import notification_interval_ns, response_ns
from testbed.roce.queue_pairs import NIC_QUEUE_FRAMES, Connection, Endpoint, build_connections
from testbed.roce.wire import IP_PROTOCOL_TCP, IP_PROTOCOL_UDP, LINK_OVERHEAD_BYTES, ROCE_UDP_PORT, Opcode, frame_bytes
from testbed.routing import (
    Demand,
    FlowKey,
    ForwardingTables,
    Knowledge,
    LinkState,
    Path,
    Route,
    RoutingSettings,
    build_tables,
    port_rates,
    routing_scheme,
    trace_path,
    trace_routes,
)
from testbed.scenario import (
    Carrier,
    CollectiveWorkload,
    FlowsWorkload,
    IncastWorkload,
    PermutationWorkload,
    QpStrategy,
    Scenario,
    StarFabric,
    UdpSourcePort,
    Workload,
    ZonesFabric,
    expand_sizes,
    job_rounds,
)
from testbed.scenario.rules import MAX_CONNECTIONS
from testbed.topology import LinkSpec, RankMap, Topology, build_clos, build_star, build_zones, check_port_numbers

# Retransmission timeout "auto": several loop times beside what the deepest queue of the path can add.
_TIMEOUT_LOOPS = 4
_TIMEOUT_QUEUES = 2
# Not below this much wall time: timers are looked at every 16 ticks, and ticks of a busy machine come tens of milliseconds late.
_TIMEOUT_TICKS = 64

# What is drawn at random beside QPs: each has a stream of its own, so that one does not change with the other.
_ORDER_STREAM, _PERMUTATION_STREAM = 1, 2


# A class per priority costs CPU time at every hop: 14.3 µs a packet over four hops instead of 10.9 µs.
CLASSES_CAPACITY_SHARE = 10.9 / 14.3

# What a queue pair is given at a time under `qp_strategy: dynamic`; NCCLX's default.
DYNAMIC_PIECE_BYTES = 512 * 1024


class _Traffic(NamedTuple):
    """A workload item as a schedule, its ranks, busbw / algbw, each flow's connection, and each connection's priority.

    Of several jobs at once: what each of them sends, and where its connections are.
    """

    schedule: Schedule
    order: tuple[int, ...]
    traffic_factor: float
    flow_order: tuple[int, ...] = ()
    priorities: tuple[int, ...] = ()
    jobs: tuple[_JobTraffic, ...] = ()


class _JobTraffic(NamedTuple):
    """What one of several jobs sends, and its connections among those of all."""

    name: str
    item: Workload
    hosts: tuple[int, ...]
    start_ns: int
    traffic: _Traffic
    connections: npt.NDArray[np.int64]


class _Sent(NamedTuple):
    """A workload item as it is sent: over which queue pairs."""

    traffic: _Traffic
    schedule: Schedule
    pieces: Schedule | None
    connections: tuple[Connection, ...]


def build_topology(scenario: Scenario) -> Topology:
    """Return the nodes, ports and links of a scenario."""
    fabric = scenario.fabric
    host_link = LinkSpec(fabric.host_link.rate_bits_per_s, fabric.host_link.delay_ns)
    if isinstance(fabric, StarFabric):
        return build_star(hosts=fabric.nhosts, host_link=host_link, nics_per_host=fabric.nics_per_host)
    uplink = LinkSpec(fabric.uplink.rate_bits_per_s, fabric.uplink.delay_ns)
    if isinstance(fabric, ZonesFabric):
        between = fabric.superspine_link
        return build_zones(
            zones=fabric.zones,
            hosts_per_leaf=fabric.host_counts,
            spines=fabric.spines,
            superspines=fabric.superspines,
            host_link=host_link,
            uplink=uplink,
            superspine_link=LinkSpec(between.rate_bits_per_s, between.delay_ns),
            nics_per_host=fabric.nics_per_host,
        )
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
    scenario: Scenario,
    *,
    capacity_packets_per_s: float | None,
    wall_tick_lateness_ns: int | None = None,
    wall_tick_ns: int = WALL_TICK_NS,
) -> Plan:
    """Return the plan of a scenario.

    Args:
        scenario: A valid scenario.
        capacity_packets_per_s: Packets per second this machine carries over four hops; None where it was not
            measured, then fidelity alone sets an automatic dilation.
        wall_tick_lateness_ns: How late this machine's ticks are at their 99th percentile; None where it was not measured.
        wall_tick_ns: Length of the engine's tick with few senders.

    Raises:
        PlanError: No fabric can be planned from it.
    """
    topology = build_topology(scenario)
    check_emulation_limits(scenario, topology)
    check_port_numbers(topology)
    items = [
        (index, item, _spread_over_qps(traffic, scenario, topology)) for index, item, traffic in _all_traffic(scenario)
    ]
    if not items and not scenario.applications:
        raise PlanError("the workload is empty")
    settings = routing_settings(
        scenario, tuple(_demands(sent, topology, scenario.transport.carrier) for _, _, sent in items)
    )
    scheme = routing_scheme(str(scenario.routing.scheme))

    def tables_for(knowledge: Knowledge) -> ForwardingTables:
        seed = scenario.routing.hash_seed
        return build_tables(topology, scheme, hash_seed=seed, settings=settings, knowledge=knowledge)

    changes, incidents = build_changes(scenario, topology)
    faults = FaultPlan(build_steps(changes, scenario, tables_for), tables_for, incidents)
    tables, links = faults.steps[0].tables, faults.steps[0].state.links
    _check_reachable(items, topology, tables, links)
    workloads = tuple(
        planned
        for index, item, sent in items
        for planned in _plan_workload(index, item, sent, scenario, topology, tables, links)
    )

    frame_bits = 8 * (frame_bytes(Opcode.WRITE_MIDDLE, scenario.transport.mtu_bytes) + LINK_OVERHEAD_BYTES)
    offered, hops, most_senders = 0.0, 1.0, 1
    for planned in workloads:
        senders = {path.ports[0] for path in planned.paths}
        most_senders = max(most_senders, len(senders))
        load = sum(topology.port(nic).rate_bits_per_s for nic in senders) / frame_bits
        if planned.admission:  # a CTS frame for every grant
            load *= 1.0 + planned.admission.grants * scenario.transport.mtu_bytes / planned.admission.window_bytes
        if senders and load >= offered:
            offered, hops = load, float(np.mean([len(path.ports) for path in planned.paths]))
    if scenario.applications:
        offered = sum(nic.rate_bits_per_s for nic in topology.nics) / frame_bits
        hops = _longest_path_hops(scenario)
    # Connections of one NIC differ in their paths; the shortest way in use sets the smallest time.
    delays = [path.delay_ns for planned in workloads for path in planned.paths if path.delay_ns > 0]
    times = [(min(delays), "one-way path delay")] if delays else []
    times += [(group.gap_ns, "flowlet gap") for group in tables.groups if group.gap_ns]
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
        capacity_packets_per_s=capacity_packets_per_s and capacity_packets_per_s * _capacity_share(scenario),
        smallest_time_ns=smallest,
        smallest_time_name=smallest_name,
        wall_tick_ns=choose_tick_ns(most_senders, wall_tick_ns),
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
        retransmit_timeout_ns=_retransmit_timeout_ns(scenario, topology, workloads, dilation),
        warnings=(),
        faults=faults,
    )
    return replace(plan, warnings=find_warnings(plan))


def _longest_path_hops(scenario: Scenario) -> float:
    """Return the links of the longest path: what any two programs may talk over is not known."""
    fabric = scenario.fabric
    if isinstance(fabric, ZonesFabric) and fabric.zones > 1:
        return 6.0
    return 2.0 if isinstance(fabric, StarFabric) or fabric.leaves == 1 else 4.0


def routing_settings(scenario: Scenario, traffic: tuple[tuple[Demand, ...], ...]) -> RoutingSettings:
    """Return what routing schemes may go by beside topology and seed."""
    routing = scenario.routing
    return RoutingSettings(
        flowlet_gap_ns=routing.flowlet_gap_ns or 0,
        spray_order=str(routing.spray_order),
        adaptive_scope=str(routing.adaptive_scope),
        traffic=traffic,
        hash_seed_per_tier=routing.hash_seed_per_tier,
        hash_functions=(routing.hash_function, routing.spine_hash_function, routing.superspine_hash_function),
        resilient_hashing=routing.resilient_hashing,
    )


def _all_traffic(scenario: Scenario) -> Iterator[tuple[int, Workload, _Traffic]]:
    """Yield what is run one after the other, each as the number of its item, an item and its traffic."""
    for index, item in enumerate(scenario.workload):
        for one_size in expand_sizes(item):
            yield index, one_size, build_traffic(one_size, scenario)
    if scenario.jobs:
        hosts = job_hosts(scenario)
        for index, items in job_rounds(scenario.jobs):
            yield index, items[0], _merge_jobs(items, hosts, scenario)


def _capacity_share(scenario: Scenario) -> float:
    """Return how much of this machine's capacity, which is measured with one data priority, its scheduler leaves."""
    return CLASSES_CAPACITY_SHARE if len(scenario.qos.data_priorities) > 1 else 1.0


def build_traffic(item: Workload, scenario: Scenario, hosts: Sequence[int] | None = None) -> _Traffic:
    """Return the schedule of a workload item, the ranks that take part in order, and busbw / algbw.

    Slices below a packet would only add headers: where chunks are small they are cut into fewer. Connections inside hosts
    have the last numbers.

    Args:
        item: The item, of one size.
        scenario: The scenario.
        hosts: Those of its job, rank 0's first; None for a workload on all hosts.
    """
    nranks = scenario.fabric.nranks
    ranks = tuple(range(nranks)) if hosts is None else ranks_of_hosts(scenario, hosts)
    traffic = (
        _collective(item, scenario, ranks)
        if isinstance(item, CollectiveWorkload)
        else _pattern(item, scenario, len(ranks))
    )
    schedule, place = _in_order(place_schedule(traffic.schedule, ranks, nranks), scenario)
    return traffic._replace(
        schedule=schedule,
        order=tuple(ranks[rank] for rank in traffic.order),
        flow_order=place,
        priorities=_moved(_priorities(item, scenario, len(place)), place),
    )


def _moved(values: Sequence[int], place: Sequence[int]) -> tuple[int, ...]:
    """Return values in the order of the connections: that of index ``i`` is at ``place[i]``."""
    moved = [0] * len(values)
    for value, index in zip(values, place, strict=True):
        moved[index] = value
    return tuple(moved)


def _in_order(schedule: Schedule, scenario: Scenario) -> tuple[Schedule, tuple[int, ...]]:
    """Return a schedule with its connections in the order of their senders, those inside hosts last, and where each is then."""
    inside = build_intra_host_links(scenario).find_connections(schedule)
    pairs = schedule.connections
    ranked = sorted(range(len(pairs)), key=lambda index: (bool(inside[index]), pairs[index]))
    place = {index: number for number, index in enumerate(ranked)}
    return schedule.sorted_by_sender(last=inside), tuple(place[index] for index in range(len(pairs)))


def _priorities(item: Workload, scenario: Scenario, connections: int) -> list[int]:
    """Return the priority of each connection of a workload item, in the order in which its traffic lists them."""
    usual = scenario.qos.lossless_priority if item.priority is None else item.priority
    if not isinstance(item, FlowsWorkload):
        return [usual] * connections
    return [usual if flow.priority is None else flow.priority for flow in item.flows]


def _merge_jobs(items: Sequence[Workload], hosts: Sequence[tuple[int, ...]], scenario: Scenario) -> _Traffic:
    """Return what all jobs send at the same time, as one schedule."""
    parts = [build_traffic(item, scenario, of_job) for item, of_job in zip(items, hosts, strict=True)]
    schedule, place = _in_order(
        merge_schedules(
            [
                replace(part.schedule, start_ns=part.schedule.start_ns + job.start_ns)
                for part, job in zip(parts, scenario.jobs, strict=True)
            ]
        ),
        scenario,
    )
    first = np.cumsum([0, *(len(part.schedule.connections) for part in parts)]).tolist()
    jobs = tuple(
        _JobTraffic(job.name, item, on, job.start_ns, part, np.array(place[begin:end], np.int64))
        for job, item, on, part, begin, end in zip(
            scenario.jobs, items, hosts, parts, first[:-1], first[1:], strict=True
        )
    )
    order = tuple(rank for part in parts for rank in part.order)
    priorities = _moved([priority for part in parts for priority in part.priorities], place)
    return _Traffic(schedule, order, 1.0, priorities=priorities, jobs=jobs)


def order_and_algorithm(
    item: CollectiveWorkload, scenario: Scenario, ranks: Sequence[int]
) -> tuple[tuple[int, ...], CollectiveAlgorithm]:
    """Return some ranks of the fabric, numbered in their order, as a collective visits them, and its algorithm."""
    kind = item.order if isinstance(item.order, tuple) else str(item.order)
    # Ranks are numbered rack after rack for the order, whatever the order of a job's hosts.
    ends = np.cumsum(scenario.fabric.rank_counts)
    leaf = np.searchsorted(ends, np.asarray(ranks), side="right")
    racked = np.argsort(leaf, kind="stable").tolist()
    counts = np.bincount(leaf, minlength=len(ends)).tolist()
    order = ring_order(kind, counts, np.random.default_rng([scenario.seed, _ORDER_STREAM]))
    if isinstance(kind, str):
        order = tuple(racked[place] for place in order)
    return order, find_algorithm(str(item.collective), str(item.algorithm)).on_hosts(scenario.fabric.gpus_per_host)


def _collective(item: CollectiveWorkload, scenario: Scenario, ranks: Sequence[int]) -> _Traffic:
    """Return the traffic of a collective among some ranks of the fabric, numbered in their order."""
    order, algorithm = order_and_algorithm(item, scenario, ranks)
    most = algorithm.chunk_bytes(item.size_bytes, len(order)) // scenario.transport.mtu_bytes
    slices = max(1, min(algorithm.slices_per_chunk(len(order)), most))
    schedule = algorithm.build_schedule(order, item.size_bytes, slices)
    return _Traffic(schedule, order, algorithm.traffic_factor(len(order)))


def _pattern(item: IncastWorkload | PermutationWorkload | FlowsWorkload, scenario: Scenario, nranks: int) -> _Traffic:
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


def _spread_over_qps(traffic: _Traffic, scenario: Scenario, topology: Topology) -> _Sent:
    """Return a workload item with every connection's transfers spread over its queue pairs.

    Raises:
        PlanError: There are more queue pairs than a fabric's table holds.
    """
    transport = scenario.transport
    schedule, qps = traffic.schedule, transport.qps_per_connection
    # Connections inside hosts come last and have no queue pairs.
    networked = int(np.count_nonzero(~build_intra_host_links(scenario).find_connections(schedule)))
    count = networked * qps
    if count > MAX_CONNECTIONS:
        raise PlanError(
            f"transport.qps_per_connection: {networked} connections with {qps} queue pairs each need "
            f"{count}, at most {MAX_CONNECTIONS} fit",
            hint="use fewer queue pairs per connection, or fewer hosts",
        )
    pieces = None
    if qps > 1 and transport.qp_strategy is QpStrategy.DYNAMIC:
        pieces = cut_into_pieces(schedule, DYNAMIC_PIECE_BYTES, networked)
        schedule = deal_over_qps(pieces, qps, networked)
    elif qps > 1 and transport.qp_strategy is QpStrategy.ROUND_ROBIN:
        schedule = deal_over_qps(schedule, qps, networked)
    elif qps > 1:
        schedule = split_over_qps(schedule, qps, transport.mtu_bytes, networked)
    connections = build_connections(
        list(schedule.connections[:count]),
        build_endpoints(topology, build_rank_map(scenario)),
        source_port_per_qp=transport.udp_source_port is UdpSourcePort.PER_QP,
        rng=np.random.default_rng(scenario.seed),
        priorities=[traffic.priorities[index // qps] for index in range(count)],
    )
    return _Sent(traffic, schedule, pieces, tuple(connections))


def _demands(sent: _Sent, topology: Topology, carrier: Carrier) -> tuple[Demand, ...]:
    """Return the traffic matrix of a workload item, an entry per queue pair that carries something."""
    carried = np.zeros(len(sent.schedule.connections), np.int64)
    np.add.at(carried, sent.schedule.connection, sent.schedule.nbytes)
    return tuple(
        Demand(topology.nics[connection.requester.local.nic].id, flow_of(connection, carrier), nbytes)
        for connection, nbytes in zip(sent.connections, carried.tolist(), strict=False)
        if nbytes
    )


def _plan_workload(
    index: int,
    item: Workload,
    sent: _Sent,
    scenario: Scenario,
    topology: Topology,
    tables: ForwardingTables,
    links: LinkState,
) -> list[PlannedWorkload]:
    """Return a workload item with its paths and times; of jobs every set of them that is to be run."""
    mtu = scenario.transport.mtu_bytes
    traffic, schedule, pieces, connections = sent
    carrier = scenario.transport.carrier
    paths = tuple(trace_connection(connection, topology, tables, carrier) for connection in connections)
    routes, possible_routes = (
        tuple(
            trace_connection_routes(connection, topology, tables, carrier, over_time=over_time)
            for connection in connections
        )
        for over_time in (False, True)
    )
    wire = _largest_frame(schedule, len(connections), mtu)
    frame_ns = [[8e9 * wire / topology.port(port).rate_bits_per_s for port in path.ports] for path in paths]
    one_way = np.array(
        [round(path.delay_ns + sum(times)) for path, times in zip(paths, frame_ns, strict=True)], np.int64
    )
    admission = forecast_admission(scenario, topology, traffic.schedule, connections, paths, one_way)
    predicted = _predict(sent, routes, scenario, topology, links)
    planned = PlannedWorkload(
        item=index,
        workload=item,
        order=traffic.order,
        messages=traffic.schedule,
        schedule=schedule,
        pieces=pieces,
        connections=connections,
        paths=paths,
        routes=routes,
        possible_routes=possible_routes,
        one_way_ns=one_way,
        ideal_cct_ns=0.0,
        intra_host=build_intra_host_links(scenario),
        predicted_cct_ratio=predicted,
        traffic_factor=traffic.traffic_factor,
        resolution_error_fraction=0.0,
        flow_order=traffic.flow_order,
        qps_per_connection=scenario.transport.qps_per_connection,
        admission=admission,
    )
    if not traffic.jobs:
        ideal_ns = _ideal_cct_ns(planned, topology, scenario, 0)
        if admission:
            predicted = max(predicted, admission.stretched_ns(ideal_ns) / ideal_ns)
        return [replace(planned, ideal_cct_ns=ideal_ns, predicted_cct_ratio=predicted)]
    alone = [_plan_job(job, sent, planned, scenario, topology, links) for job in traffic.jobs]
    return [
        _run_together(planned, [alone[job] for job in jobs], topology, scenario, links)
        for jobs in measured_sets(scenario)
    ]


def _plan_job(
    job: _JobTraffic,
    sent: _Sent,
    planned: PlannedWorkload,
    scenario: Scenario,
    topology: Topology,
    links: LinkState,
) -> PlannedJob:
    """Return one job as it would be alone, on the paths that it has among all."""
    messages = sent.traffic.schedule
    ideal_ns = _ideal_arrivals_ns(planned, topology, scenario, 0)[np.isin(messages.connection, job.connections)]
    schedule = job.traffic.schedule
    inside = build_intra_host_links(scenario).find_connections(schedule)
    ways = _ways_of_messages(sent, planned.routes, scenario)
    networked = [ways[connection] for connection in job.connections[~inside].tolist()]
    return PlannedJob(
        name=job.name,
        workload=job.item,
        order=job.traffic.order,
        hosts=job.hosts,
        start_ns=job.start_ns,
        connections=job.connections,
        ideal_cct_ns=float(ideal_ns.max()) - job.start_ns,
        predicted_cct_ratio=predict_cct_ratio(
            topology,
            schedule,
            networked,
            scenario.fabric.nvlink.rate_bits_per_s,
            shares_follow_rates=sent.pieces is not None,
            links=links,
        ),
        traffic_factor=job.traffic.traffic_factor,
        nvlink_bytes=int(schedule.nbytes[inside[schedule.connection]].sum()),
        flow_order=job.traffic.flow_order,
    )


def _run_together(
    planned: PlannedWorkload, jobs: Sequence[PlannedJob], topology: Topology, scenario: Scenario, links: LinkState
) -> PlannedWorkload:
    """Return the workload with these jobs alone; the queue pairs of others are there and send nothing."""
    mine = np.isin(np.arange(len(planned.messages.connections)), np.concatenate([job.connections for job in jobs]))
    together = replace(
        planned,
        messages=keep_connections(planned.messages, mine),
        schedule=keep_connections(planned.schedule, _qps_of(mine, planned)),
        pieces=None if planned.pieces is None else keep_connections(planned.pieces, mine),
    )
    rates, loads, starts = port_rates(topology, links), [], [float(job.start_ns) for job in jobs]
    for job in jobs:
        of_job = _qps_of(np.isin(np.arange(len(mine)), job.connections), planned)
        loads.append(port_times_ns(keep_connections(planned.schedule, of_job), planned.routes, rates))
    ends = fluid_ends_ns([times for times, _ in loads], [nbytes for _, nbytes in loads], starts)
    beside = []
    for job, (times, _), start, end in zip(jobs, loads, starts, ends, strict=True):
        slowdown = (end - start) / max(times.values()) if times else 1.0
        beside.append(replace(job, predicted_cct_ratio=job.predicted_cct_ratio * max(1.0, slowdown)))
    ideal_ns = max(job.start_ns + job.ideal_cct_ns for job in beside)
    expected_ns = max(job.start_ns + job.ideal_cct_ns * job.predicted_cct_ratio for job in beside)
    return replace(
        together,
        workload=beside[0].workload,
        order=tuple(rank for job in beside for rank in job.order),
        jobs=tuple(beside),
        ideal_cct_ns=ideal_ns,
        predicted_cct_ratio=expected_ns / ideal_ns,
    )


def _qps_of(chosen: npt.NDArray[np.bool_], planned: PlannedWorkload) -> npt.NDArray[np.bool_]:
    """Return which connections of the schedule belong to some of the messages': their queue pairs, and those inside hosts."""
    networked = len(planned.connections) // planned.qps_per_connection
    return np.concatenate((np.repeat(chosen[:networked], planned.qps_per_connection), chosen[networked:]))


def _check_reachable(
    items: Sequence[tuple[int, Workload, _Sent]], topology: Topology, tables: ForwardingTables, links: LinkState
) -> None:
    """Check that what is broken from the beginning leaves every connection a way.

    Raises:
        PlanError: One has none.
    """
    if not links.dead_ports:
        return
    for connection in (connection for _, _, sent in items for connection in sent.connections):
        for end in (connection.requester, connection.responder):
            flow = flow_of(connection) if end is connection.requester else answers_of(connection)
            try:
                trace_path(topology, tables, topology.nics[end.local.nic].id, flow)
            except PlanError as error:
                between = f"ranks {connection.requester.local.rank} and {connection.requester.remote.rank}"
                raise PlanError(
                    f"faults: what is broken from the beginning leaves no way between {between}: {error.message}",
                    hint="give the fault an `at` above 0 to see what happens, or break less",
                ) from None


def _predict(
    sent: _Sent, routes: Sequence[Sequence[Route]], scenario: Scenario, topology: Topology, links: LinkState
) -> float:
    """Return the expected CCT over ideal, from the ways of every queue pair's packets."""
    transport = scenario.transport
    nvlink = scenario.fabric.nvlink.rate_bits_per_s
    if sent.traffic.jobs:
        return 1.0  # each job has its own
    if transport.qp_strategy is QpStrategy.ROUND_ROBIN:
        return predict_cct_ratio(topology, sent.schedule, routes, nvlink, links=links)
    together = _ways_of_messages(sent, routes, scenario)
    return predict_cct_ratio(
        topology, sent.traffic.schedule, together, nvlink, shares_follow_rates=sent.pieces is not None, links=links
    )


def _ways_of_messages(sent: _Sent, routes: Sequence[Sequence[Route]], scenario: Scenario) -> list[list[Route]]:
    """Return the ways of each connection's bytes over all its queue pairs at once, as striped or piece by piece."""
    qps = scenario.transport.qps_per_connection
    carried = np.zeros(len(sent.schedule.connections), np.int64)
    np.add.at(carried, sent.schedule.connection, sent.schedule.nbytes)
    together: list[list[Route]] = []
    for first in range(0, len(routes), qps):
        total = int(carried[first : first + qps].sum())
        together.append(
            [
                Route(route.path, route.share * int(carried[qp]) / total)
                for qp in range(first, first + qps)
                for route in routes[qp]
                if carried[qp]
            ]
        )
    return together


def _largest_frame(schedule: Schedule, networked: int, mtu: int) -> int:
    """Return the wire bytes of the largest frame on the first ``networked`` connections; 0 where there are none."""
    nbytes = schedule.nbytes[schedule.connection < networked]
    return largest_frame_wire_bytes(nbytes, mtu) if len(nbytes) else 0


def _ideal_cct_ns(planned: PlannedWorkload, topology: Topology, scenario: Scenario, extra_ns: int) -> float:
    """Return the completion time over a non-blocking core with ``extra_ns`` more latency on every path."""
    return float(_ideal_arrivals_ns(planned, topology, scenario, extra_ns).max(initial=0.0))


def _ideal_arrivals_ns(
    planned: PlannedWorkload, topology: Topology, scenario: Scenario, extra_ns: int
) -> npt.NDArray[np.float64]:
    """Return when each message arrives over a non-blocking core with ``extra_ns`` more latency on every path.

    It is that of the messages: how many queue pairs carry them does not change what the NICs can do.
    """
    mtu, messages = scenario.transport.mtu_bytes, planned.messages
    wire = _largest_frame(planned.schedule, len(planned.connections), mtu)
    # The first frame time is part of the NIC's own time.
    first_frame_ns = [round(8e9 * wire / topology.port(path.ports[0]).rate_bits_per_s) for path in planned.paths]
    of_qps = planned.one_way_ns - np.array(first_frame_ns, np.int64) + extra_ns
    latency_ns = np.zeros(len(messages.connections), np.int64)
    if len(of_qps):  # a message is there when its last piece is
        of_messages = of_qps.reshape(-1, planned.qps_per_connection).max(axis=1)
        latency_ns[: len(of_messages)] = of_messages
    ranks = build_rank_map(scenario)
    return ideal_arrivals_ns(
        messages,
        nic_rate_bits_per_s=np.array([nic.rate_bits_per_s for nic in topology.nics]),
        latency_ns=latency_ns,
        mtu=mtu,
        nic_of_rank=np.array([ranks.nic(rank) for rank in range(ranks.nranks)]),
        intra_host=planned.intra_host,
    )


def flow_of(connection: Connection, carrier: Carrier = Carrier.ENGINE) -> FlowKey:
    """Return the header fields that switches hash of a connection's data."""
    requester = connection.requester
    tcp = carrier is Carrier.TCP
    return FlowKey(
        src_address=requester.local.address,
        dst_address=requester.remote.address,
        src_port=requester.udp_source_port,
        dst_port=ROCE_UDP_PORT,
        protocol=IP_PROTOCOL_TCP if tcp else IP_PROTOCOL_UDP,
        dst_qp=0 if tcp else requester.peer_qpn,
    )


def answers_of(connection: Connection) -> FlowKey:
    """Return the header fields that switches hash of what the responder sends back."""
    responder = connection.responder
    return FlowKey(
        src_address=responder.local.address,
        dst_address=responder.remote.address,
        src_port=responder.udp_source_port,
        dst_port=ROCE_UDP_PORT,
        protocol=IP_PROTOCOL_UDP,
        dst_qp=responder.peer_qpn,
    )


def trace_connection(connection: Connection, topology: Topology, tables: ForwardingTables, carrier: Carrier) -> Path:
    """Return the path of a connection's data."""
    nic = topology.nics[connection.requester.local.nic]
    return trace_path(topology, tables, nic.id, flow_of(connection, carrier))


def trace_connection_routes(
    connection: Connection,
    topology: Topology,
    tables: ForwardingTables,
    carrier: Carrier,
    *,
    over_time: bool = False,
) -> tuple[Route, ...]:
    """Return all ways of a connection's packets; ``over_time`` as for `testbed.routing.trace_routes`."""
    nic = topology.nics[connection.requester.local.nic]
    return trace_routes(topology, tables, nic.id, flow_of(connection, carrier), over_time=over_time)


def _retransmit_timeout_ns(
    scenario: Scenario, topology: Topology, workloads: tuple[PlannedWorkload, ...], dilation: TimeDilation
) -> int:
    """Return the retransmission timeout: long enough that only a loss makes it run out.

    A packet waits in switches, and under PFC in its NIC as well, beside what the other NICs hold for the same link. And on this
    machine's clock it is never shorter than a busy machine may stall: a late tick is no lost packet.
    """
    if scenario.transport.retransmit_timeout_ns is not None:
        return scenario.transport.retransmit_timeout_ns
    loop_ns = 2 * max((int(planned.one_way_ns.max(initial=0)) for planned in workloads), default=0)
    slowest = min(port.rate_bits_per_s for port in topology.ports)
    queue_ns = 8_000_000_000 * scenario.fabric.switch.buffer_bytes // slowest
    held_ns = 0
    if scenario.qos.pfc.enabled:
        frame_bits = 8 * (frame_bytes(Opcode.WRITE_MIDDLE, scenario.transport.mtu_bytes) + LINK_OVERHEAD_BYTES)
        sharing = max((_most_sharing(planned) for planned in workloads), default=1)
        held_ns = sharing * NIC_QUEUE_FRAMES * frame_bits * 10**9 // slowest
    stall_ns = math.ceil(_TIMEOUT_TICKS * dilation.wall_tick_ns / dilation.value)
    return max(_TIMEOUT_LOOPS * loop_ns + _TIMEOUT_QUEUES * queue_ns + held_ns, stall_ns)


def _most_sharing(planned: PlannedWorkload) -> int:
    """Return the most NICs whose packets leave by one port."""
    crossed = {
        (port, route.path.ports[0]) for routes in planned.routes for route in routes for port in route.path.ports
    }
    return max(Counter(port for port, _ in crossed).values(), default=1)
