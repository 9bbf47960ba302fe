"""Who suffers from a fault, and where they go instead. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from testbed.errors import PlanError
from testbed.plan.faults import Incident
from testbed.plan.flows import answers_of, flow_of
from testbed.plan.model import Plan
from testbed.roce.queue_pairs import Connection
from testbed.routing import FlowKey, ForwardingTables, Path, trace_path, trace_routes

MAX_DETOURS = 16
"""Detours that are told one by one."""


@dataclass(frozen=True, eq=False)
class Victims:
    """What a fault does to the connections of a workload.

    Attributes:
        incident: The fault.
        victims: Whether the way of each connection's data or answers crosses what fails, shape ``(connections,)``.
        moved: How many connections' data take another way once all switches have reacted.
        detours: Some of these in words.
    """

    incident: Incident
    victims: npt.NDArray[np.bool_]
    moved: int
    detours: tuple[str, ...]


def find_victims(plan: Plan, workload: int) -> tuple[Victims, ...]:
    """Return the victims of every fault that happens during an iteration; of a link that flaps, of its first failure."""
    seen: set[int] = set()
    found = []
    for incident in plan.faults.incidents:
        stands = (
            incident.begin_ns == 0 and incident.end_ns is None and plan.scenario.faults[incident.fault].for_ns is None
        )
        if incident.mends or stands or incident.fault in seen:
            continue
        seen.add(incident.fault)
        found.append(_victims_of(plan, workload, incident))
    return tuple(found)


def _victims_of(plan: Plan, workload: int, incident: Incident) -> Victims:
    steps, routing = plan.faults.steps, plan.scenario.routing
    before = next((step for step in reversed(steps) if step.at_ns < incident.begin_ns), steps[0]).tables
    reacted_ns = incident.begin_ns + max(routing.detection_time_ns, routing.convergence_time_ns)
    after = next((step for step in reversed(steps) if step.at_ns <= reacted_ns), steps[0]).tables
    victims: list[bool] = []
    detours: list[str] = []
    moved = 0
    for connection in plan.workloads[workload].connections:
        victims.append(bool(incident.ports & _ports_used(plan, before, connection)))
        if after is before:
            continue
        old, new = (_trace(plan, tables, connection) for tables in (before, after))
        if old != new:
            moved += 1
            if len(detours) < MAX_DETOURS:
                detours.append(_describe_detour(plan, connection, old, new))
    return Victims(incident, np.array(victims, bool), moved, tuple(detours))


def _ports_used(plan: Plan, tables: ForwardingTables, connection: Connection) -> set[int]:
    """Return the ports that a connection's data and answers may cross; none where they have no way anyhow."""
    used: set[int] = set()
    for nic, flow in _both_ways(connection):
        port = plan.topology.nics[nic].id
        try:
            routes = trace_routes(plan.topology, tables, port, flow, over_time=True)
        except PlanError:
            continue
        used |= {port for route in routes for port in route.path.ports}
    return used


def _both_ways(connection: Connection) -> tuple[tuple[int, FlowKey], tuple[int, FlowKey]]:
    return (
        (connection.requester.local.nic, flow_of(connection)),
        (connection.responder.local.nic, answers_of(connection)),
    )


def _trace(plan: Plan, tables: ForwardingTables, connection: Connection) -> Path | None:
    port = plan.topology.nics[connection.requester.local.nic].id
    try:
        return trace_path(plan.topology, tables, port, flow_of(connection))
    except PlanError:
        return None


def _describe_detour(plan: Plan, connection: Connection, old: Path | None, new: Path | None) -> str:
    requester = connection.requester
    ways = [
        "no way" if path is None else " > ".join(plan.topology.nodes[node].name for node in path.nodes[1:-1])
        for path in (old, new)
    ]
    return f"rank {requester.local.rank} to {requester.remote.rank}, QP {requester.qpn:#x}: {ways[0]} -> {ways[1]}"
