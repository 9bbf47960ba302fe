"""What a scenario sends: each item as a schedule, and that over queue pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from testbed.collectives import (
    CollectiveAlgorithm,
    Flow,
    Schedule,
    build_flows,
    busiest_nic_bytes,
    cut_into_pieces,
    deal_over_qps,
    find_algorithm,
    incast_flows,
    merge_schedules,
    permutation_flows,
    place_schedule,
    ring_order,
    split_over_qps,
)
from testbed.errors import PlanError
from testbed.plan.fabric import build_endpoints, build_intra_host_links, build_rank_map
from testbed.plan.jobs import job_hosts, ranks_of_hosts
from testbed.roce.queue_pairs import Connection, build_connections
from testbed.scenario import (
    CollectiveWorkload,
    FlowsWorkload,
    IncastWorkload,
    PermutationWorkload,
    QpStrategy,
    Scenario,
    UdpSourcePort,
    Workload,
    expand_sizes,
    job_rounds,
)
from testbed.scenario.rules import MAX_CONNECTIONS
from testbed.topology import Topology

# What is drawn at random beside QPs: each has a stream of its own, so that one does not change with the other.
_ORDER_STREAM, _PERMUTATION_STREAM = 1, 2
# What a queue pair is given at a time under `qp_strategy: dynamic`; NCCLX's default.
DYNAMIC_PIECE_BYTES = 512 * 1024


class Traffic(NamedTuple):
    """A workload item as a schedule, its ranks, busbw / algbw, each flow's connection, and each connection's priority.

    Of several jobs at once: what each of them sends, and where its connections are.
    """

    schedule: Schedule
    order: tuple[int, ...]
    traffic_factor: float
    flow_order: tuple[int, ...] = ()
    priorities: tuple[int, ...] = ()
    jobs: tuple[JobTraffic, ...] = ()


class JobTraffic(NamedTuple):
    """What one of several jobs sends, and its connections among those of all."""

    name: str
    item: Workload
    hosts: tuple[int, ...]
    start_ns: int
    traffic: Traffic
    connections: npt.NDArray[np.int64]


class Sent(NamedTuple):
    """A workload item as it is sent: over which queue pairs."""

    traffic: Traffic
    schedule: Schedule
    pieces: Schedule | None
    connections: tuple[Connection, ...]


def all_traffic(scenario: Scenario) -> Iterator[tuple[int, Workload, Traffic]]:
    """Yield what is run one after the other, each as the number of its item, an item and its traffic."""
    for index, item in enumerate(scenario.workload):
        for one_size in expand_sizes(item):
            yield index, one_size, build_traffic(one_size, scenario)
    if scenario.jobs:
        hosts = job_hosts(scenario)
        for index, items in job_rounds(scenario.jobs):
            yield index, items[0], _merge_jobs(items, hosts, scenario)


def build_traffic(item: Workload, scenario: Scenario, hosts: Sequence[int] | None = None) -> Traffic:
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


def _merge_jobs(items: Sequence[Workload], hosts: Sequence[tuple[int, ...]], scenario: Scenario) -> Traffic:
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
        JobTraffic(job.name, item, on, job.start_ns, part, np.array(place[begin:end], np.int64))
        for job, item, on, part, begin, end in zip(
            scenario.jobs, items, hosts, parts, first[:-1], first[1:], strict=True
        )
    )
    order = tuple(rank for part in parts for rank in part.order)
    priorities = _moved([priority for part in parts for priority in part.priorities], place)
    return Traffic(schedule, order, 1.0, priorities=priorities, jobs=jobs)


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


def _collective(item: CollectiveWorkload, scenario: Scenario, ranks: Sequence[int]) -> Traffic:
    """Return the traffic of a collective among some ranks of the fabric, numbered in their order."""
    order, algorithm = order_and_algorithm(item, scenario, ranks)
    most = algorithm.chunk_bytes(item.size_bytes, len(order)) // scenario.transport.mtu_bytes
    slices = max(1, min(algorithm.slices_per_chunk(len(order)), most))
    schedule = algorithm.build_schedule(order, item.size_bytes, slices)
    return Traffic(schedule, order, algorithm.traffic_factor(len(order)))


def _pattern(item: IncastWorkload | PermutationWorkload | FlowsWorkload, scenario: Scenario, nranks: int) -> Traffic:
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
    return Traffic(schedule, ranks, busiest_nic_bytes(flows) / total)


def spread_over_qps(traffic: Traffic, scenario: Scenario, topology: Topology) -> Sent:
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
    return Sent(traffic, schedule, pieces, tuple(connections))
