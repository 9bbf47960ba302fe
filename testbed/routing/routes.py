"""All ways that the packets of a flow may take, and how much goes each way.

A flow whose switches all hash has one route; where one spreads its packets there is one for every member, in the proportion
of their weights.
"""

from __future__ import annotations

from typing import NamedTuple

from testbed.routing.hashing import FlowKey, override_key, select_member
from testbed.routing.paths import Path, trace_path
from testbed.routing.tables import ForwardingTables, Selector
from testbed.topology import NodeKind, Topology


class Route(NamedTuple):
    """One way of a flow's packets.

    Attributes:
        path: The way.
        share: Part of the flow's bytes that takes it, above 0; those of a flow sum to 1.
    """

    path: Path
    share: float


def single_route(path: Path) -> tuple[Route, ...]:
    """Return the routes of a flow that keeps one path."""
    return (Route(path, 1.0),)


def trace_routes(
    topology: Topology, tables: ForwardingTables, src_port_id: int, flow: FlowKey, *, over_time: bool = False
) -> tuple[Route, ...]:
    """Return every route of a flow's packets.

    Args:
        topology: The fabric.
        tables: Its forwarding tables.
        src_port_id: The sending NIC.
        flow: Header fields of the flow's packets.
        over_time: Whether to count the paths that the flow may change to after a pause (flowlets), as equally used.

    Raises:
        PlanError: As `testbed.routing.paths.trace_path` does.
        ValueError: If ``src_port_id`` is not a host's port.
    """
    first = trace_path(topology, tables, src_port_id, flow)  # every mistake in the tables is found there
    destination = topology.port(first.ports[-1]).peer
    slot = topology.slot_of_port(destination)
    routes: list[Route] = []
    # Ports and nodes so far, delay, share.
    open_ends: list[tuple[tuple[int, ...], tuple[int, ...], int, float]] = [
        (first.ports[:1], first.nodes[:1], topology.port(src_port_id).delay_ns, 1.0)
    ]
    while open_ends:
        ports, nodes, delay_ns, share = open_ends.pop()
        node = topology.peer_node(ports[-1])
        nodes = (*nodes, node.index)
        if node.kind is NodeKind.HOST:
            routes.append(Route(Path(ports, nodes, delay_ns), share))
            continue
        members = _members(tables, node.index, slot, flow, over_time)
        total = sum(members.values())
        for port_id, weight in reversed(members.items()):  # the last pushed is followed first
            delay = delay_ns + topology.port(port_id).delay_ns
            open_ends.append(((*ports, port_id), nodes, delay, share * weight / total))
    return tuple(routes)


def _members(tables: ForwardingTables, node: int, slot: int, flow: FlowKey, over_time: bool) -> dict[int, int]:
    """Return the ports by which a flow may leave a switch, with their weights."""
    port = tables.overrides.get(override_key(node, flow))
    if port is not None:
        return {port: 1}
    group = tables.group_at(node, slot)
    assert group is not None, "trace_path would have refused"
    if group.selector.is_per_packet or (over_time and group.selector is Selector.FLOWLET):
        return group.weights()
    return {select_member(group, flow): 1}
