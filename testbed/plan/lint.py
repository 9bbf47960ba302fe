"""What to check before trusting a figure: warnings that a plan carries into its result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from testbed.plan.dilation import DilationBound
from testbed.plan.qos import find_qos_warnings
from testbed.plan.strict import find_strict_wait
from testbed.routing import HashFunction, Selector
from testbed.scenario import Carrier, CongestionControl
from testbed.topology import NodeKind
from testbed.units import format_rate, format_size, format_time

# Of a queue pair, before it gives up: IB's retry_cnt is three bits.
_RETRIES = 7

if TYPE_CHECKING:
    from testbed.plan.model import Plan, PlannedWorkload

# Links that a warning names.
_SHOWN_LINKS = 4


def find_warnings(plan: Plan) -> tuple[str, ...]:
    """Return what the lint found, a sentence each."""
    warnings = []
    dilation = plan.dilation
    if dilation.bound is DilationBound.FIXED:
        if dilation.value < dilation.fidelity_value:
            warnings.append(
                f"time_dilation {dilation.value:g} is below {dilation.fidelity_value:.0f}: a tick is longer than a quarter "
                f"of the {dilation.smallest_time_name} ({dilation.smallest_time_ns} ns)"
            )
        if dilation.capacity_value is not None and dilation.value < dilation.capacity_value:
            warnings.append(
                f"time_dilation {dilation.value:g} is below {dilation.capacity_value:.0f}, "
                "what this machine's measured capacity asks for"
            )
    if plan.losses:
        links = {plan.topology.links[plan.topology.port(port).link].name: share for port, share in plan.losses.items()}
        shown = ", ".join(f"{name} {float(share):.3g}" for name, share in list(links.items())[:_SHOWN_LINKS])
        more = f" and {len(links) - _SHOWN_LINKS} more" if len(links) > _SHOWN_LINKS else ""
        warnings.append(f"links lose frames at random, drawn anew in every run whatever the seed: {shown}{more}")
    patience_ns = _RETRIES * plan.retransmit_timeout_ns
    slowest_ns = max(plan.scenario.routing.detection_time_ns, plan.scenario.routing.convergence_time_ns)
    if any(step.state.dead_ports for step in plan.faults.steps[1:]) and slowest_ns > patience_ns:
        warnings.append(
            f"routing follows a dead link after {format_time(slowest_ns)}, {_RETRIES} retransmission timeouts take "
            f"{format_time(patience_ns)}: queue pairs may give up before"
        )
    transport = plan.scenario.transport
    if plan.marking and transport.carrier is Carrier.RXE and transport.congestion_control is CongestionControl.NONE:
        warnings.append(
            "qos.ecn marks, but rxe itself ignores CE and sends no CNP: nobody slows down without "
            "transport.congestion_control dcqcn (docs/carriers.md)"
        )
    warnings += _find_hash_warnings(plan)
    warnings += find_qos_warnings(plan.scenario, plan.topology, plan.marking, plan.pausing)
    if not plan.pausing:
        for planned in plan.largest_workloads:  # what piles up grows with the size
            warnings += _find_buffer_warnings(plan, planned)
    for planned in plan.largest_workloads:
        warnings += _find_strict_warnings(plan, planned)
        warnings += _find_model_warnings(planned)
    return tuple(warnings)


def _find_hash_warnings(plan: Plan) -> list[str]:
    """Return a warning for each key about hashing that changes nothing, for no switch that it is about hashes."""
    routing, topology = plan.scenario.routing, plan.topology
    hashing = [
        group
        for tables in (plan.tables, *(step.tables for step in plan.faults.steps))
        for group in tables.groups
        if group.selector in (Selector.HASH, Selector.FLOWLET) and len(set(group.members)) > 1
    ]
    kinds = {topology.nodes[topology.port(group.members[0]).node].kind for group in hashing}
    inert = []
    if routing.hash_function is not HashFunction.MURMUR3 and not any(
        group.hash_function is routing.hash_function for group in hashing
    ):
        inert.append((f"routing.hash_function {routing.hash_function}", "switch"))
    for kind, key, function in (
        (NodeKind.SPINE, "spine_hash_function", routing.spine_hash_function),
        (NodeKind.SUPERSPINE, "superspine_hash_function", routing.superspine_hash_function),
    ):
        if function is not routing.hash_function and kind not in kinds:
            inert.append((f"routing.{key} {function}", str(kind)))
    if routing.resilient_hashing and not hashing:
        inert.append(("routing.resilient_hashing true", "switch"))
    return [f"{key} has no effect: no {who} of this fabric hashes under scheme {routing.scheme}" for key, who in inert]


def _find_buffer_warnings(plan: Plan, planned: PlannedWorkload) -> list[str]:
    """Return a warning if a workload can overflow a switch, without flow control."""
    # A NIC paces its own flows, so those of one NIC do not collide.
    sharing = Counter(port for _, port in _senders_by_port(planned))
    if max(sharing.values(), default=1) == 1:
        return []
    unbidden = planned.schedule.unbidden_bytes()[: len(planned.paths)].tolist()
    switch, piled_bytes = _largest_pile(plan, planned, unbidden)
    buffer = plan.scenario.fabric.switch.buffer_bytes
    if switch:
        buffer = plan.buffer_bytes(next(node.index for node in plan.topology.nodes if node.name == switch))
    if piled_bytes > buffer:
        return [
            f"{planned.collective_name}: senders wait for nothing and can pile up {piled_bytes} bytes in {switch}, which "
            f"buffers {buffer}: without PFC this drops"
        ]
    if not len(planned.schedule.deps):
        return []
    # What circulates in a ring piles up before its slowest link: at worst all of it, a buffer's worth of one rank.
    if buffer >= planned.size_bytes:
        return []
    return [
        f"flows of {max(sharing.values())} hosts share a link and a switch buffers {buffer} bytes, less than the "
        f"{planned.size_bytes} that can pile up there: without PFC this can drop"
    ]


def _find_strict_warnings(plan: Plan, planned: PlannedWorkload) -> list[str]:
    """Return what strict priorities make others wait for, and whether that is longer than a timeout."""
    wait = find_strict_wait(plan.scenario, plan.topology, planned)
    if wait is None:
        return []
    ahead = " and ".join(map(str, wait.ahead))
    warnings = [
        f"{planned.title}: priority {wait.priority} may wait {format_time(wait.wait_ns, significant=3)} at "
        f"{plan.topology.port_name(wait.port)}, for all that strict priority {ahead} sends there; predicted completion times "
        "take all flows to have one priority"
    ]
    if wait.wait_ns > plan.retransmit_timeout_ns:
        warnings.append(
            f"transport.retransmit_timeout {format_time(plan.retransmit_timeout_ns)} is shorter than that: what waits is sent "
            f"again, and a queue pair gives up after {_RETRIES} times in vain"
        )
    return warnings


def _senders_by_port(planned: PlannedWorkload) -> set[tuple[int, int]]:
    """Return which NIC's data may leave by which switch port, as pairs of port ids."""
    paths = (route.path for routes in planned.possible_routes for route in routes)
    return {(path.ports[0], port) for path in paths for port in path.ports[1:]}


def _find_model_warnings(planned: PlannedWorkload) -> list[str]:
    """Return a warning if NVLink, which is only a model, carries a part of a workload."""
    nbytes, links = planned.nvlink_bytes, planned.intra_host
    if not nbytes:
        return []
    whole = "" if planned.connections else "; the whole of it does, so its time is computed, not measured"
    return [
        f"{planned.collective_name} ({planned.algorithm_name}): {format_size(nbytes)} go over NVLink, which is a model "
        f"({format_rate(links.rate_bits_per_s)} per GPU and direction, {format_time(links.latency_ns)}), no packets{whole}"
    ]


def _largest_pile(plan: Plan, planned: PlannedWorkload, unbidden: Sequence[int]) -> tuple[str, int]:
    """Return the switch in which most can pile up from what senders send unbidden, and how many bytes.

    Every NIC sends at line rate, shared among its connections; what a port cannot pass on at once stays. Ports further
    up the path are not taken into account: where one of those is the bottleneck, the pile is there instead.
    """
    topology = plan.topology
    busy = Counter(path.ports[0] for path, nbytes in zip(planned.paths, unbidden, strict=True) if nbytes)
    arriving, carried = Counter[int](), Counter[int]()
    for path, routes, nbytes in zip(planned.paths, planned.routes, unbidden, strict=True):
        if nbytes:
            rate = topology.port(path.ports[0]).rate_bits_per_s // busy[path.ports[0]]
            for route in routes:
                for port_id in route.path.ports[1:]:
                    arriving[port_id] += round(rate * route.share)
                    carried[port_id] += round(nbytes * route.share)
    piles = Counter[str]()
    for port_id, rate in sorted(arriving.items()):
        port = topology.port(port_id)
        if rate > port.rate_bits_per_s:
            piles[topology.nodes[port.node].name] += carried[port_id] * (rate - port.rate_bits_per_s) // rate
    return max(piles.items(), key=lambda pile: pile[1], default=("", 0))
