"""What remains of forwarding tables when links are down: rerouting as a pure function.

Every scheme is rerouted in the same way, whatever its tables hold and however many tiers there are: members that lead nowhere
leave their groups; a flow whose group has none left is hashed over whatever equal-cost ways survive; an exact-match entry that
leads nowhere is withdrawn. What a scheme does beyond that, such as computing other entries, it does in ``build_tables``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from testbed.routing.ecmp import Ecmp
from testbed.routing.links import Knowledge
from testbed.routing.protocol import NO_SETTINGS, RoutingScheme, RoutingSettings
from testbed.routing.resilient import replace_dead
from testbed.routing.tables import UNREACHABLE, ForwardingTables, Group, Selector, TablesBuilder
from testbed.topology import HOST_NETWORK, NodeKind, Topology


def build_tables(
    topology: Topology,
    scheme: RoutingScheme,
    *,
    hash_seed: int,
    settings: RoutingSettings = NO_SETTINGS,
    knowledge: Knowledge | None = None,
) -> ForwardingTables:
    """Return the tables of a scheme on a fabric some of whose links are down.

    Args:
        topology: The fabric, as if all were well.
        scheme: The scheme.
        hash_seed: Seed of its hash.
        settings: What else it goes by; ``settings.links`` is the state of the links.
        knowledge: What has been noticed of that state so far; None for all of it, by everybody.
    """
    known = Knowledge.of(settings.links) if knowledge is None else knowledge
    tables = scheme.build_tables(topology, hash_seed=hash_seed, settings=replace(settings, links=known.controller))
    if not known.fabric.dead_ports and not known.adjacent.dead_ports:
        return tables
    fallback = Ecmp().build_tables(topology, hash_seed=hash_seed, settings=settings)
    return prune_tables(topology, tables, known, fallback=fallback, resilient=settings.resilient_hashing)


def prune_tables(
    topology: Topology,
    tables: ForwardingTables,
    known: Knowledge,
    *,
    fallback: ForwardingTables | None = None,
    resilient: bool = False,
) -> ForwardingTables:
    """Return tables without what leads nowhere.

    Hashed groups are renumbered: a flow that was not on the dead link may change its way too, unless hashing is resilient.

    Args:
        topology: The fabric.
        tables: Its tables.
        known: The links that are down: switches look at their own by what is adjacent, at all the way to the destination by what
            the fabric knows.
        fallback: Tables whose groups take over where a group has no member left; None for none.
        resilient: Whether only the flows of dead members move, see `testbed.routing.resilient`.

    Returns:
        The tables; where a switch has no way left to a slot, ``UNREACHABLE``.
    """
    if not known.fabric.dead_ports and not known.adjacent.dead_ports:
        return tables
    alive, reach = np.ones(len(topology.ports) + 1, bool), None
    if known.fabric.dead_ports:
        alive[1:] = [known.fabric.is_up(port) for port in topology.ports]
        reach = _find_reach(topology, [tables, *([fallback] if fallback else [])], alive)
    # Both at once: a group is pruned, and its dead members replaced, from what it was at first.
    alive[1:] &= [known.adjacent.is_up(port) for port in topology.ports]
    builder = TablesBuilder(topology)
    peer_node = np.array([0, *(topology.port(port.peer).node for port in topology.ports)], np.intp)
    for node in topology.nodes:
        if node.kind is NodeKind.HOST:
            continue
        for index, slots in _slots_of_groups(tables.fib[node.index]):
            _reroute(builder, node.index, tables.groups[index], slots, alive, peer_node, reach, fallback, resilient)
        for slot in np.flatnonzero(tables.fib[node.index] == UNREACHABLE).tolist():
            builder.drop(node.index, slot)
    for key, port_id in tables.overrides.items():
        slot = (key.dst_address - HOST_NETWORK) >> 1
        if alive[port_id] and (reach is None or reach[peer_node[port_id], slot]):
            builder.override(key, port_id)
    return builder.build()


def _slots_of_groups(row: npt.NDArray[np.int32]) -> list[tuple[int, npt.NDArray[np.intp]]]:
    """Return the groups that a node uses, with the slots that it uses each for, by their first slot."""
    used, first = np.unique(row, return_index=True)
    return [(int(index), np.flatnonzero(row == index)) for index in used[np.argsort(first)].tolist() if index >= 0]


def _find_reach(
    topology: Topology, alternatives: list[ForwardingTables], alive: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Return whether packets that a node has can still get to each slot, shape ``(nodes, slots)``."""
    reach = np.zeros((len(topology.nodes), topology.slots), bool)
    for port in topology.nics:
        reach[port.node, topology.slot_of_port(port.id)] = True
    ways: list[tuple[int, npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for node in topology.nodes:
        for tables in alternatives if node.kind is not NodeKind.HOST else ():
            for index, slots in _slots_of_groups(tables.fib[node.index]):
                members = tables.groups[index].weights()
                peers = [topology.port(topology.port(port).peer).node for port in members if alive[port]]
                if peers:
                    ways.append((node.index, slots, np.array(peers, np.intp)))
    while True:  # one round per hop
        before = int(np.count_nonzero(reach))
        for node_index, at, next_nodes in ways:
            reach[node_index, at] |= reach[np.ix_(next_nodes, at)].any(axis=0)
        if int(np.count_nonzero(reach)) == before:
            return reach


def _reroute(
    builder: TablesBuilder,
    node: int,
    group: Group,
    slots: npt.NDArray[np.intp],
    alive: npt.NDArray[np.bool_],
    peer_node: npt.NDArray[np.intp],
    reach: npt.NDArray[np.bool_] | None,
    fallback: ForwardingTables | None,
    resilient: bool,
) -> None:
    """Route some slots, all of one group, over what is left of it."""
    members = np.array(group.members)
    usable = np.repeat(alive[members][:, np.newaxis], len(slots), axis=1)
    if reach is not None:
        usable &= reach[np.ix_(peer_node[members], slots)]
    patterns, which = np.unique(usable.T, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        some = slots[np.ravel(which) == number]
        if pattern.any():
            keeps = resilient and group.selector in (Selector.HASH, Selector.FLOWLET) and not pattern.all()
            left = replace(
                group,
                members=replace_dead(group.members, pattern.tolist()) if keeps else tuple(members[pattern].tolist()),
            )
            for slot in some.tolist():
                builder.route(node, slot, left)
        elif fallback is None:
            for slot in some.tolist():
                builder.drop(node, slot)
        else:
            row = fallback.fib[node, some]
            for index in sorted(set(row.tolist())):
                others = some[row == index]
                if index >= 0:
                    _reroute(builder, node, fallback.groups[index], others, alive, peer_node, reach, None, resilient)
                else:
                    for slot in others.tolist():
                        builder.drop(node, slot)
