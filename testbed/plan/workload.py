"""A workload item on its paths: when its messages arrive over a non-blocking core, and how much slower the paths make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule, ideal_arrivals_ns, keep_connections, largest_frame_wire_bytes
from testbed.plan.admission import forecast_admission
from testbed.plan.fabric import build_intra_host_links, build_rank_map
from testbed.plan.flows import trace_connection, trace_connection_routes
from testbed.plan.jobs import fluid_ends_ns, measured_sets, port_times_ns
from testbed.plan.model import PlannedJob, PlannedWorkload
from testbed.plan.predict import predict_cct_ratio
from testbed.plan.traffic import JobTraffic, Sent
from testbed.routing import ForwardingTables, LinkState, Route, port_rates
from testbed.scenario import QpStrategy, Scenario, Workload
from testbed.topology import Topology


def plan_workload(
    index: int,
    item: Workload,
    sent: Sent,
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
        ideal_ns = ideal_cct_ns(planned, topology, scenario, 0)
        if admission:
            predicted = max(predicted, admission.stretched_ns(ideal_ns) / ideal_ns)
        return [replace(planned, ideal_cct_ns=ideal_ns, predicted_cct_ratio=predicted)]
    alone = [_plan_job(job, sent, planned, scenario, topology, links) for job in traffic.jobs]
    return [
        _run_together(planned, [alone[job] for job in jobs], topology, scenario, links)
        for jobs in measured_sets(scenario)
    ]


def _plan_job(
    job: JobTraffic,
    sent: Sent,
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


def _predict(
    sent: Sent, routes: Sequence[Sequence[Route]], scenario: Scenario, topology: Topology, links: LinkState
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


def _ways_of_messages(sent: Sent, routes: Sequence[Sequence[Route]], scenario: Scenario) -> list[list[Route]]:
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


def ideal_cct_ns(planned: PlannedWorkload, topology: Topology, scenario: Scenario, extra_ns: int) -> float:
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
