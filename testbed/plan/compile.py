"""From a scenario to a plan. Pure: the machine's capacity is an argument."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from testbed.errors import PlanError
from testbed.plan.dilation import WALL_TICK_NS, TimeDilation, choose_dilation, choose_tick_ns
from testbed.plan.fabric import build_topology
from testbed.plan.faults import FaultPlan, build_changes, build_steps
from testbed.plan.flows import answers_of, flow_of
from testbed.plan.limits import check_emulation_limits
from testbed.plan.lint import find_warnings
from testbed.plan.model import Plan, PlannedWorkload
from testbed.plan.qos import notification_interval_ns, response_ns
from testbed.plan.strict import find_strict_wait
from testbed.plan.traffic import Sent, all_traffic, spread_over_qps
from testbed.plan.workload import ideal_cct_ns, plan_workload
from testbed.roce.queue_pairs import NIC_QUEUE_FRAMES
from testbed.roce.wire import LINK_OVERHEAD_BYTES, Opcode, frame_bytes
from testbed.routing import (
    Demand,
    ForwardingTables,
    Knowledge,
    LinkState,
    RoutingSettings,
    build_tables,
    routing_scheme,
    trace_path,
)
from testbed.scenario import Carrier, Scenario, StarFabric, Workload, ZonesFabric
from testbed.topology import Topology, check_port_numbers

# Retransmission timeout "auto": several loop times beside what the deepest queue of the path can add.
_TIMEOUT_LOOPS = 4
_TIMEOUT_QUEUES = 2
# Not below this much wall time: timers are looked at every 16 ticks, and ticks of a busy machine come tens of milliseconds late.
_TIMEOUT_TICKS = 64
# A class per priority costs CPU time at every hop: 14.3 µs a packet over four hops instead of 10.9 µs.
CLASSES_CAPACITY_SHARE = 10.9 / 14.3


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
        (index, item, spread_over_qps(traffic, scenario, topology)) for index, item, traffic in all_traffic(scenario)
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
        for planned in plan_workload(index, item, sent, scenario, topology, tables, links)
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
                0.0, ideal_cct_ns(planned, topology, scenario, tick_ns) / planned.ideal_cct_ns - 1.0
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


def _capacity_share(scenario: Scenario) -> float:
    """Return how much of this machine's capacity, which is measured with one data priority, its scheduler leaves."""
    return CLASSES_CAPACITY_SHARE if len(scenario.qos.data_priorities) > 1 else 1.0


def _demands(sent: Sent, topology: Topology, carrier: Carrier) -> tuple[Demand, ...]:
    """Return the traffic matrix of a workload item, an entry per queue pair that carries something."""
    carried = np.zeros(len(sent.schedule.connections), np.int64)
    np.add.at(carried, sent.schedule.connection, sent.schedule.nbytes)
    return tuple(
        Demand(topology.nics[connection.requester.local.nic].id, flow_of(connection, carrier), nbytes)
        for connection, nbytes in zip(sent.connections, carried.tolist(), strict=False)
        if nbytes
    )


def _check_reachable(
    items: Sequence[tuple[int, Workload, Sent]], topology: Topology, tables: ForwardingTables, links: LinkState
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


def _retransmit_timeout_ns(
    scenario: Scenario, topology: Topology, workloads: tuple[PlannedWorkload, ...], dilation: TimeDilation
) -> int:
    """Return the retransmission timeout: long enough that only a loss makes it run out.

    A packet waits in switches, and under PFC in its NIC as well, beside what the other NICs hold for the same link; and for as
    long as strict priorities that go before it have frames. On this machine's clock the timeout is never shorter than a busy
    machine may stall: a late tick is no lost packet.
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
    waits = (find_strict_wait(scenario, topology, planned) for planned in workloads)
    held_ns += max((wait.wait_ns for wait in waits if wait), default=0)
    stall_ns = math.ceil(_TIMEOUT_TICKS * dilation.wall_tick_ns / dilation.value)
    return max(_TIMEOUT_LOOPS * loop_ns + _TIMEOUT_QUEUES * queue_ns + held_ns, stall_ns)


def _most_sharing(planned: PlannedWorkload) -> int:
    """Return the most NICs whose packets leave by one port."""
    crossed = {
        (port, route.path.ports[0]) for routes in planned.routes for route in routes for port in route.path.ports
    }
    return max(Counter(port for port, _ in crossed).values(), default=1)
