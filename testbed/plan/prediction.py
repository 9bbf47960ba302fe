"""The prediction of a scenario: how its completion times are spread over hash seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule, SteadyTraffic, deal_over_qps, striped_bytes
from testbed.errors import PlanError
from testbed.plan.compile import routing_settings
from testbed.plan.fabric import build_topology
from testbed.plan.faults import broken_at, build_changes, find_knowledge
from testbed.plan.forecast import Forecast, Messages, forecast
from testbed.plan.jobs import fluid_ends_ns, job_hosts, ranks_of_hosts
from testbed.plan.left_out import find_left_out
from testbed.plan.traffic import DYNAMIC_PIECE_BYTES, build_traffic, order_and_algorithm
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, qpn_of
from testbed.roce.wire import IP_PROTOCOL_TCP, IP_PROTOCOL_UDP, ROCE_UDP_PORT, source_port
from testbed.routing import (
    Demand,
    FlowKey,
    ForwardingTables,
    Knowledge,
    LinkState,
    RoutingSettings,
    build_tables,
    dead_ports_of,
    routing_scheme,
)
from testbed.routing.spread import Flows
from testbed.scenario import (
    Carrier,
    CollectiveWorkload,
    FlowsWorkload,
    QpStrategy,
    Scenario,
    UdpSourcePort,
    Workload,
    expand_sizes,
    job_rounds,
)
from testbed.topology import Topology

MAX_SCHEDULE_RANKS = 128
"""Ranks above which what a collective sends at once stands for its schedule, where it can."""

MAX_STEPPED_RANKS = 1024
"""Ranks that are followed step by step at most."""

MAX_FLOWS = 1 << 20
"""Queue pairs that are followed at most: half of the numbers that a queue pair may have would do for eight times as many."""

_WORD = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class RatioSpread:
    """Completion time over ideal, over some hash seeds.

    Attributes:
        cct_ratio_mean: The mean.
        cct_ratio_p5: What 5 % of the seeds stay below, interpolated between seeds.
        cct_ratio_p95: What 95 % stay below.
        cct_ratio_min: The least.
        cct_ratio_max: The largest.
        cct_ratios: That of each seed, in their order; None unless asked for.
    """

    cct_ratio_mean: float
    cct_ratio_p5: float
    cct_ratio_p95: float
    cct_ratio_min: float
    cct_ratio_max: float
    cct_ratios: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class ItemPrediction:
    """What to expect of one item of the workload, or of one job beside the others, at its largest size.

    Attributes:
        job: Name of the job; empty for an item of the workload.
        collective: The collective or the pattern.
        algorithm: Its algorithm.
        size_bytes: Its size, as in the results.
        nranks: Ranks that take part.
        connections: Connections between hosts.
        flows: Queue pairs that carry something.
        ratios: Completion time over ideal.
        cct_ratio_alone_mean: The mean of a job on the same paths without the others; None for an item of the workload.
    """

    job: str
    collective: str
    algorithm: str
    size_bytes: int
    nranks: int
    connections: int
    flows: int
    ratios: RatioSpread
    cct_ratio_alone_mean: float | None


@dataclass(frozen=True, slots=True)
class PhasePrediction:
    """What to expect if the fabric stayed as it is from some moment on.

    Attributes:
        at_ns: When, from the release of an iteration.
        broken: What is broken then.
        ratios: Completion time over ideal, of the worst item or job; None where a flow is cut off.
        cut_off: Why; empty where none is.
    """

    at_ns: int
    broken: tuple[str, ...]
    ratios: RatioSpread | None
    cut_off: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What to expect of a scenario.

    Attributes:
        name: Of the scenario.
        scheme: Its routing scheme.
        hash_seed: The first of the hash seeds, the scenario's own; the others follow it.
        seeds: Number of hash seeds.
        links_down: Links and switches that are taken to be down.
        nodes: Nodes of the fabric.
        links: Links of the fabric.
        ratios: Completion time over ideal, of the worst item or job under each seed.
        items: The same of each item; they run one after the other, jobs at the same time.
        phases: What changes while an iteration runs, as faults happen and routing learns of them; empty where nothing does. The
            figures above are those of the first.
        left_out: What the scenario has and the prediction knows nothing of.
    """

    name: str
    scheme: str
    hash_seed: int
    seeds: int
    links_down: tuple[str, ...]
    nodes: int
    links: int
    ratios: RatioSpread
    items: tuple[ItemPrediction, ...]
    phases: tuple[PhasePrediction, ...] = ()
    left_out: tuple[str, ...] = ()


def predict(
    scenario: Scenario, *, seeds: int = 200, links_down: Sequence[str] = (), per_seed: bool = False
) -> Prediction:
    """Return what to expect of a scenario over hash seeds, from the one that it names on.

    Args:
        scenario: A valid scenario.
        seeds: Number of hash seeds; at least 1.
        links_down: Links such as ``leaf0:spine1``, and switches, that are down all the time and known to be.
        per_seed: Return the ratio under each seed too.

    Raises:
        PlanError: There is no such link, or a flow has no way to its destination.
    """
    if seeds < 1:
        raise PlanError(f"a prediction needs at least 1 hash seed, got {seeds}")
    topology = build_topology(scenario)
    down = _find_ports(topology, links_down)
    rounds = _rounds_of(scenario, topology)
    if scenario.applications:
        raise PlanError(
            "there is nothing to predict: applications open their flows themselves, how many and of what size is not known",
            hint="`testbed run` counts what crosses each link",
        )
    if not rounds:
        raise PlanError("the workload is empty")
    first = scenario.routing.hash_seed
    hash_seeds = [(first + number) & _WORD for number in range(seeds)]
    settings = routing_settings(scenario, tuple(_demands(parts) for parts in rounds))
    changes, incidents = build_changes(scenario, topology)
    moments = find_knowledge(changes, scenario)

    def at(moment: int) -> tuple[npt.NDArray[np.float64], list[ItemPrediction]]:
        _, state, knowledge = moments[moment]
        known = Knowledge(
            *(_without(links, down) for links in (knowledge.adjacent, knowledge.fabric, knowledge.controller))
        )
        tables_of = partial(_build_seed, topology, scenario.routing.scheme, settings, known)
        return _predict_rounds(rounds, topology, tables_of, hash_seeds, scenario, _without(state.links, down), per_seed)

    worst, items = at(0)
    phases: list[PhasePrediction] = []
    for moment, (at_ns, _, _) in enumerate(moments if len(moments) > 1 else ()):
        # The first is how an iteration begins, with what stands throughout; what else happens at its beginning is the second.
        broken = broken_at([one for one in incidents if moment or one.end_ns is None], at_ns)
        try:
            ratios, _ = at(moment)
        except PlanError as error:
            phase = PhasePrediction(at_ns, tuple(broken), None, error.message)
        else:
            phase = PhasePrediction(at_ns, tuple(broken), _spread_of(ratios, per_seed), "")
        # A controller that hears of it last changes nothing where there is none.
        if not phases or replace(phase, at_ns=phases[-1].at_ns) != phases[-1]:
            phases.append(phase)
    return Prediction(
        name=scenario.name,
        scheme=scenario.routing.scheme,
        hash_seed=first,
        seeds=seeds,
        links_down=tuple(links_down),
        nodes=len(topology.nodes),
        links=len(topology.links),
        ratios=_spread_of(worst, per_seed),
        items=tuple(items),
        phases=tuple(phases),
        left_out=find_left_out(scenario),
    )


def _predict_rounds(
    rounds: Sequence[Sequence[_Part]],
    topology: Topology,
    tables_of: Callable[[int], ForwardingTables],
    hash_seeds: Sequence[int],
    scenario: Scenario,
    links: LinkState,
    per_seed: bool,
) -> tuple[npt.NDArray[np.float64], list[ItemPrediction]]:
    """Return the ratio of the worst item or job under each seed, and what to expect of each of them."""
    items: list[ItemPrediction] = []
    worst = np.zeros(len(hash_seeds))
    for parts in rounds:
        found = [
            forecast(
                topology,
                part.messages,
                tables_of,
                hash_seeds,
                nvlink_rate_bits_per_s=scenario.fabric.nvlink.rate_bits_per_s,
                links=links,
                port_times=len(parts) > 1,
            )
            for part in parts
        ]
        for part, one, slowdown in zip(parts, found, _slowdowns(parts, found, len(hash_seeds)), strict=True):
            ratios = one.cct_ratios * slowdown
            worst = np.maximum(worst, ratios)
            items.append(_describe(part, ratios, one.cct_ratios, per_seed))
    return worst, items


def _describe(
    part: _Part, ratios: npt.NDArray[np.float64], alone: npt.NDArray[np.float64], per_seed: bool
) -> ItemPrediction:
    item, messages = part.item, part.messages
    return ItemPrediction(
        job=part.job,
        collective=str(item.collective if isinstance(item, CollectiveWorkload) else item.pattern),
        algorithm=str(item.algorithm if isinstance(item, CollectiveWorkload) else "direct"),
        size_bytes=_size_of(item),
        nranks=part.nranks,
        connections=part.connections,
        flows=len(messages.flows),
        ratios=_spread_of(ratios, per_seed),
        cct_ratio_alone_mean=float(alone.mean()) if part.job else None,
    )


def _size_of(item: Workload) -> int:
    return sum(flow.size_bytes for flow in item.flows) if isinstance(item, FlowsWorkload) else item.size_bytes


def _spread_of(ratios: npt.NDArray[np.float64], per_seed: bool) -> RatioSpread:
    low, high = np.percentile(ratios, (5, 95)).tolist()
    return RatioSpread(
        cct_ratio_mean=float(ratios.mean()),
        cct_ratio_p5=low,
        cct_ratio_p95=high,
        cct_ratio_min=float(ratios.min()),
        cct_ratio_max=float(ratios.max()),
        cct_ratios=tuple(ratios.tolist()) if per_seed else None,
    )


def _find_ports(topology: Topology, names: Sequence[str]) -> frozenset[int]:
    """Return the ports of links and switches by their names."""
    try:
        return dead_ports_of(topology, names)
    except KeyError as error:
        raise PlanError(
            f"the fabric has no link or node {error.args[0]!r}", hint="`testbed plan FILE` lists them"
        ) from None


def _without(links: LinkState, down: frozenset[int]) -> LinkState:
    return replace(links, dead_ports=links.dead_ports | down)


def _build_seed(
    topology: Topology, scheme: str, settings: RoutingSettings, knowledge: Knowledge, seed: int
) -> ForwardingTables:
    return build_tables(topology, routing_scheme(scheme), hash_seed=seed, settings=settings, knowledge=knowledge)


class _Traffic(NamedTuple):
    """What an item sends, message by message: a schedule, or where that would be too long, its steady traffic.

    Connections between hosts come first, in the order of their ranks.
    """

    order: tuple[int, ...]
    schedule: Schedule | None
    steady: SteadyTraffic


class _Part(NamedTuple):
    """What runs by itself, or one of several jobs that run at the same time.

    Attributes:
        job: Name of the job; empty for an item of the workload.
        item: The item, at one size.
        nranks: Ranks that take part.
        connections: Connections between hosts.
        start_ns: When it begins.
        messages: What it sends.
        qps: Numbers of its flows' queue pairs among all of the fabric.
    """

    job: str
    item: Workload
    nranks: int
    connections: int
    start_ns: int
    messages: Messages
    qps: npt.NDArray[np.int64]


def _rounds_of(scenario: Scenario, topology: Topology) -> list[list[_Part]]:
    """Return what is run one after the other: an item of the workload, or one of each job at the same time.

    The sizes of a sweep take the same ways: the largest stands for all.
    """
    largest = {index: one for index, item in enumerate(scenario.workload) for one in expand_sizes(item)}
    rounds = [_parts_of([("", item, None, 0)], scenario, topology) for item in largest.values()]
    if scenario.jobs:
        hosts = job_hosts(scenario)
        for items in dict(job_rounds(scenario.jobs)).values():
            of_jobs = [
                (job.name, item, on, job.start_ns) for job, item, on in zip(scenario.jobs, items, hosts, strict=True)
            ]
            rounds.append(_parts_of(of_jobs, scenario, topology))
    return rounds


def _parts_of(
    items: Sequence[tuple[str, Workload, tuple[int, ...] | None, int]], scenario: Scenario, topology: Topology
) -> list[_Part]:
    """Return what runs at the same time; connections are numbered over all of it, in the order of their ranks."""
    traffic = [_traffic_of(item, scenario, hosts) for _, item, hosts, _ in items]
    inside = [_is_inside(one.steady, scenario) for one in traffic]
    ends = [np.flatnonzero(~one) for one in inside]
    src = np.concatenate([one.steady.src[mine] for one, mine in zip(traffic, ends, strict=True)])
    dst = np.concatenate([one.steady.dst[mine] for one, mine in zip(traffic, ends, strict=True)])
    numbers = np.empty(len(src), np.int64)
    numbers[np.lexsort((dst, src))] = np.arange(len(src))
    if len(src) * scenario.transport.qps_per_connection > MAX_FLOWS:
        raise PlanError(
            f"{len(src)} connections with {scenario.transport.qps_per_connection} queue pairs each are too many to predict: "
            f"at most {MAX_FLOWS} flows",
            hint="use fewer queue pairs per connection, or fewer ranks",
        )
    parts, begin = [], 0
    for (job, item, _, start_ns), one, mine in zip(items, traffic, ends, strict=True):
        own = numbers[begin : begin + len(mine)]
        begin += len(mine)
        messages, qps = _messages_of(one, own, scenario, topology)
        parts.append(_Part(job, item, len(one.order), len(mine), start_ns, messages, qps))
    return parts


def _is_inside(steady: SteadyTraffic, scenario: Scenario) -> npt.NDArray[np.bool_]:
    """Return which connections join ranks of one host."""
    gpus = scenario.fabric.gpus_per_host
    same: npt.NDArray[np.bool_] = steady.src // gpus == steady.dst // gpus
    return same


def _traffic_of(item: Workload, scenario: Scenario, hosts: Sequence[int] | None) -> _Traffic:
    """Return what an item sends.

    Args:
        item: The item, at one size.
        scenario: The scenario.
        hosts: Those of its job; None for all.

    Raises:
        PlanError: There are too many ranks for a collective that needs a schedule.
    """
    ranks = range(scenario.fabric.nranks) if hosts is None else ranks_of_hosts(scenario, hosts)
    if len(ranks) > MAX_SCHEDULE_RANKS and isinstance(item, CollectiveWorkload):
        order, algorithm = order_and_algorithm(item, scenario, ranks)
        steady = algorithm.steady_traffic(order, item.size_bytes)
        if steady is not None:
            named = np.asarray(ranks, np.int64)
            steady = SteadyTraffic(named[steady.src], named[steady.dst], steady.nbytes)
            by_rank = np.lexsort((steady.dst, steady.src, _is_inside(steady, scenario)))
            src, dst, nbytes = steady
            return _Traffic(order, None, SteadyTraffic(src[by_rank], dst[by_rank], nbytes[by_rank]))
        if len(ranks) > MAX_STEPPED_RANKS:
            raise PlanError(
                f"{item.collective} ({item.algorithm}) among {len(ranks)} ranks cannot be predicted: its steps differ, and at "
                f"most {MAX_STEPPED_RANKS} ranks can be followed step by step",
                hint="use a collective by ring, a hierarchical all_reduce, send_recv or a pattern",
            )
    traffic = build_traffic(item, scenario, hosts)
    ends = np.array(traffic.schedule.connections, np.int64).reshape(-1, 2)
    steady = SteadyTraffic(ends[:, 0], ends[:, 1], _carried(traffic.schedule))
    return _Traffic(traffic.order, traffic.schedule, steady)


def _messages_of(
    traffic: _Traffic, numbers: npt.NDArray[np.int64], scenario: Scenario, topology: Topology
) -> tuple[Messages, npt.NDArray[np.int64]]:
    """Return what an item sends, by the connections whose transfers wait for each other, and the numbers of its queue pairs.

    A transfer that is striped over queue pairs, or goes piece by piece, uses all of its connection at once; where whole
    transfers are dealt, each queue pair is a connection of its own. Connections inside hosts come last.

    Args:
        traffic: What it sends, message by message.
        numbers: Number of each of its connections between hosts among all that run at the same time.
        scenario: The scenario.
        topology: The fabric.
    """
    transport, qps = scenario.transport, scenario.transport.qps_per_connection
    steady, schedule, count = traffic.steady, traffic.schedule, len(numbers)
    src, dst, total = steady.src[:count], steady.dst[:count], steady.nbytes[:count]
    carried = _carried_by_qps(schedule, total, scenario)
    dealt = qps > 1 and transport.qp_strategy is QpStrategy.ROUND_ROBIN
    if dealt and schedule is not None:
        schedule = deal_over_qps(schedule, qps, count)
        carried = _carried(schedule)[: count * qps].reshape(count, qps)
    used = np.flatnonzero(carried)
    owner = used if dealt else used // qps
    nbytes = carried.reshape(-1) if dealt else total
    connection = used // qps
    named = numbers[connection] * qps + used % qps
    messages = Messages(
        connections=len(nbytes) + len(steady.src) - count,
        nbytes=np.concatenate([nbytes, steady.nbytes[count:]]),
        schedule=schedule,
        flows=_flows_of(src[connection], dst[connection], named, scenario, topology),
        owner=owner,
        share=carried.reshape(-1)[used] / nbytes[owner],
        inside=np.column_stack([steady.src[count:], steady.dst[count:]]),
        nranks=scenario.fabric.nranks,
        divides_best=qps > 1 and transport.qp_strategy is QpStrategy.DYNAMIC,
    )
    return messages, named


def _carried_by_qps(
    schedule: Schedule | None, total: npt.NDArray[np.float64], scenario: Scenario
) -> npt.NDArray[np.float64]:
    """Return what each queue pair of the connections between hosts carries, shape ``(connections, qps)``.

    Which pieces go where is not known beforehand under `dynamic`: only which queue pairs get any.
    """
    transport, qps = scenario.transport, scenario.transport.qps_per_connection
    if qps == 1:
        return total[:, None]
    if schedule is None or transport.qp_strategy is QpStrategy.ROUND_ROBIN:
        return np.repeat(total[:, None] / qps, qps, axis=1)
    count = len(total)
    if transport.qp_strategy is QpStrategy.SPLIT:
        return striped_bytes(schedule, qps, transport.mtu_bytes, count)
    pieces = np.bincount(schedule.connection, -(-schedule.nbytes // DYNAMIC_PIECE_BYTES), len(schedule.connections))
    busy = np.arange(qps) < pieces[:count, None]
    even: npt.NDArray[np.float64] = total[:, None] * busy / busy.sum(axis=1, keepdims=True)
    return even


def _flows_of(
    src: npt.NDArray[np.int64],
    dst: npt.NDArray[np.int64],
    qps: npt.NDArray[np.int64],
    scenario: Scenario,
    topology: Topology,
) -> Flows:
    """Return the header fields of queue pairs, which `testbed.roce.queue_pairs.build_connections` gives them one by one.

    Args:
        src: Sending rank of each queue pair.
        dst: Receiving rank of each.
        qps: Number of each among all of the fabric.
        scenario: The scenario.
        topology: The fabric.
    """
    fabric = scenario.fabric
    ranks = np.arange(fabric.nranks)
    nic = ranks // fabric.gpus_per_host * fabric.nics_per_host
    nic += ranks % fabric.gpus_per_host * fabric.nics_per_host // fabric.gpus_per_host
    address = np.array([port.address for port in topology.nics], np.int64)[nic]
    port_id = np.array([port.id for port in topology.nics], np.int64)[nic]
    named = qps
    if scenario.transport.udp_source_port is UdpSourcePort.PER_PAIR:  # that of the first between the two ranks
        _, which = np.unique(src * len(ranks) + dst, return_inverse=True)
        lowest = np.full(len(qps), np.iinfo(np.int64).max)
        np.minimum.at(lowest, which, qps // scenario.transport.qps_per_connection)
        named = lowest[which] * scenario.transport.qps_per_connection
    tcp = scenario.transport.carrier is Carrier.TCP
    columns: list[npt.NDArray[np.int64]] = [
        address[src],
        address[dst],
        source_port(qpn_of(named, REQUESTER), qpn_of(named, RESPONDER)).astype(np.int64),
        np.full(len(qps), ROCE_UDP_PORT),
        np.full(len(qps), IP_PROTOCOL_TCP if tcp else IP_PROTOCOL_UDP),
        np.zeros(len(qps), np.int64) if tcp else qpn_of(qps, RESPONDER),
    ]
    return Flows(port_id[src], np.column_stack(columns).astype(np.uint32))


def _demands(parts: Sequence[_Part]) -> tuple[Demand, ...]:
    """Return the traffic matrix of what runs at the same time: an entry per queue pair that carries something, in their order."""
    found: list[tuple[int, Demand]] = []
    for part in parts:
        messages = part.messages
        nbytes = np.rint(messages.nbytes[messages.owner] * messages.share).astype(np.int64).tolist()
        columns = (part.qps.tolist(), messages.flows.src_port.tolist(), messages.flows.keys.tolist(), nbytes)
        found += [(qp, Demand(port, FlowKey(*key), carried)) for qp, port, key, carried in zip(*columns, strict=True)]
    return tuple(demand for _, demand in sorted(found, key=lambda one: one[0]))


def _slowdowns(parts: Sequence[_Part], alone: Sequence[Forecast], seeds: int) -> list[npt.NDArray[np.float64]]:
    """Return by how much jobs that run at the same time slow each one down, under each seed: `fluid_ends_ns`."""
    if len(parts) == 1:
        return [np.ones(seeds)]
    found = np.ones((len(parts), seeds))
    starts = [float(part.start_ns) for part in parts]
    busiest = [
        float(part.messages.nbytes[: part.messages.connections - len(part.messages.inside)].max()) for part in parts
    ]
    times = [one.port_times_ns for one in alone]
    for seed in range(seeds):
        of_jobs = np.stack([one[min(seed, len(one) - 1)] for one in times if one is not None])
        # Ports that one job alone uses do not matter, but for its busiest.
        kept = (of_jobs > 0).sum(axis=0) > 1
        kept[of_jobs.argmax(axis=1)] = True
        ports = np.flatnonzero(kept).tolist()
        loads = [{port: row[port] for port in ports if row[port]} for row in of_jobs]
        for job, end in enumerate(fluid_ends_ns(loads, busiest, starts)):
            if loads[job]:
                found[job, seed] = max(1.0, (end - starts[job]) / max(loads[job].values()))
    return list(found)


def _carried(schedule: Schedule) -> npt.NDArray[np.float64]:
    """Return the bytes that each connection carries, shape ``(connections,)``."""
    return np.bincount(schedule.connection, schedule.nbytes, len(schedule.connections)).astype(np.float64)
