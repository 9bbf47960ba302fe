"""Traffic engineering: a controller that knows the traffic computes a path for every flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from testbed.routing.ecmp import hashed_tables
from testbed.routing.hashing import override_key
from testbed.routing.links import LinkState
from testbed.routing.protocol import NO_SETTINGS, Demand, RoutingSettings
from testbed.routing.tables import ForwardingTables, HashField, OverrideKey, TablesBuilder
from testbed.topology import HOST_NETWORK, Node, Topology


class TrafficEngineering:
    """Installs an exact-match entry for every flow of the traffic matrix, one path each, over ECMP for all else.

    The controller has topology and traffic matrix. Flows are placed one by one, the largest first, each on the path whose
    fullest link stays emptiest (constrained shortest path: among the shortest, the least loaded); then flows of the fullest
    links change places with others as long as that relieves them. Flows between zones are placed first, one by one, with an
    entry at the leaf, the spine and the superspine each; they do not change places. Flows that the matrix does not name fall back
    on ECMP.

    Source:
        Gangidi et al., SIGCOMM 2024 (centralised traffic engineering, CSPF, exact-match entries over BGP).
    """

    name = "te"
    summary = "places each flow by the traffic matrix"

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = NO_SETTINGS
    ) -> ForwardingTables:
        """Return ECMP's tables with an entry at the leaf for every flow that crosses the spines."""
        fallback = hashed_tables(topology, HashField.FIVE_TUPLE, hash_seed, settings)
        builder = TablesBuilder(topology, fallback)
        known: set[OverrideKey] = set()
        for item in settings.traffic:
            crossing = [
                demand for demand in item if topology.peer_node(demand.src_port) != _target_leaf(topology, demand)
            ]
            far = [demand for demand in crossing if not _in_one_zone(topology, demand)]
            load: dict[int, float] = {}
            placed = _place_between_zones(topology, far, settings.links, load)
            near = [demand for demand in crossing if _in_one_zone(topology, demand)]
            placed += [(demand, (uplink,)) for demand, uplink in _place(topology, near, settings.links, load)]
            for demand, ports in placed:
                for port in ports:
                    key = override_key(topology.port(port).node, demand.flow)
                    if key not in known:  # items run one after the other; the first that names a flow decides
                        known.add(key)
                        builder.override(key, port)
        return builder.build()


SCHEME = TrafficEngineering()


_Way = tuple[int, int]
"""An uplink and the spine's port down to the other leaf: the two ports at which flows between leaves meet."""

_TOLERANCE = 1e-9
"""Relative difference of loads below which they are equal: above rounding, far below one flow."""


class _Placement:
    """A way for each flow, and what every port then carries.

    Attributes:
        ways: The ways of each flow, by spine.
        chosen: The spine of each flow.
        load: Time that each port needs for what it carries, by port id.
    """

    def __init__(
        self, topology: Topology, demands: Sequence[Demand], links: LinkState, already: Mapping[int, float]
    ) -> None:
        self.ways = [_ways(topology, demand, links) for demand in demands]
        self.chosen = [-1] * len(demands)
        self.load: dict[int, float] = {
            port: already.get(port, 0.0) for ways in self.ways for way in ways.values() for port in way
        }
        self._flows: dict[int, set[int]] = {port: set() for port in self.load}
        self._nbytes = [demand.nbytes for demand in demands]
        self._rate = {port: links.rate_bits_per_s(topology.port(port)) for port in self.load}
        # The largest first, each where its fullest link stays emptiest.
        for flow in sorted(range(len(demands)), key=lambda one: -self._nbytes[one]):
            self._insert(flow)

    def _insert(self, flow: int) -> None:
        """Place a flow where its fullest port stays emptiest; if that is a new high, try to make room for it elsewhere.

        Where all flows are alike and nothing has gone beyond one a port so far, room can always be made.
        """
        before = max(self.load.values())
        best = min(self.ways[flow], key=lambda spine: (self._loads_with(flow, spine), spine))
        alone = min(max(self._nbytes[flow] / self._rate[port] for port in way) for way in self.ways[flow].values())
        high = max(before, alone) * (1 + _TOLERANCE)
        self._put(flow, best)
        if max(self.load[port] for port in self.ways[flow][best]) < high:
            return
        for here in sorted(self.ways[flow], key=lambda spine: (self.load[self.ways[flow][spine][0]], spine)):
            for there in sorted(self.ways[flow]):
                if there != here:
                    self._put(flow, here)
                    if self._exchange(flow, here, there, high):
                        return
        self._put(flow, best)

    def improve(self) -> None:
        """Relieve the fullest ports until none of them can be."""
        while self.load and self._relieve_fullest():
            pass

    def _relieve_fullest(self) -> bool:
        top = max(self.load.values())
        port = min(port for port, load in self.load.items() if load >= top * (1 - _TOLERANCE))
        for flow in sorted(self._flows[port], key=lambda one: (self._nbytes[one], one)):
            here = self.chosen[flow]
            for spine in sorted(self.ways[flow]):
                if spine != here and self._exchange(flow, here, spine, top * (1 - _TOLERANCE)):
                    return True
        return False

    def _exchange(self, flow: int, here: int, there: int, limit: float) -> bool:
        """Move a flow to another spine, and on from there what is then too much, back to the first; undo it if that fails.

        Flows change between two spines alone, along a chain of ports that are too full in turn, each flow once: the exchange
        by which a bipartite graph is coloured (Kempe's chain).
        """
        moved: list[int] = []
        tight = self._move(flow, here, there, moved)
        while tight:
            port = tight.pop()
            while self.load[port] >= limit:
                # A port belongs to one spine: the port's flows are all on it.
                movable = [
                    one for one in self._flows[port] if one not in moved and {here, there} <= self.ways[one].keys()
                ]
                if not movable:
                    for one in reversed(moved):
                        self._put(one, there if self.chosen[one] == here else here)
                    return False
                one = min(movable, key=lambda one: (-self._nbytes[one], one))
                tight += self._move(one, here, there, moved)
        return True

    def _move(self, flow: int, here: int, there: int, moved: list[int]) -> list[int]:
        """Move a flow from one of two spines to the other; return the ports that it now uses."""
        moved.append(flow)
        spine = there if self.chosen[flow] == here else here
        self._put(flow, spine)
        return list(self.ways[flow][spine])

    def _put(self, flow: int, spine: int) -> None:
        if self.chosen[flow] >= 0:
            for port in self.ways[flow][self.chosen[flow]]:
                self._flows[port].remove(flow)
                self.load[port] -= self._nbytes[flow] / self._rate[port]
        self.chosen[flow] = spine
        for port in self.ways[flow][spine]:
            self._flows[port].add(flow)
            self.load[port] += self._nbytes[flow] / self._rate[port]

    def _loads_with(self, flow: int, spine: int) -> list[float]:
        loads = (self.load[port] + self._nbytes[flow] / self._rate[port] for port in self.ways[flow][spine])
        return sorted(loads, reverse=True)


def _place(
    topology: Topology, demands: Sequence[Demand], links: LinkState, already: Mapping[int, float]
) -> list[tuple[Demand, int]]:
    """Return the uplink of its leaf that each flow is to take; flows that have no way left are not among them."""
    demands = [demand for demand in demands if _ways(topology, demand, links)]
    placement = _Placement(topology, demands, links, already)
    placement.improve()
    chosen = [ways[spine][0] for ways, spine in zip(placement.ways, placement.chosen, strict=True)]
    return list(zip(demands, chosen, strict=True))


def _ways(topology: Topology, demand: Demand, links: LinkState) -> dict[int, _Way]:
    """Return the ways of a flow between leaves that are up, by the index of the spine."""
    target = _target_leaf(topology, demand)
    down = {topology.peer_node(up.id).index: up.peer for up in topology.uplinks(target) if links.is_up(up)}
    uplinks = [port for port in topology.uplinks(topology.peer_node(demand.src_port)) if links.is_up(port)]
    return {spine: (port.id, down[spine]) for port in uplinks if (spine := topology.peer_node(port.id).index) in down}


def _place_between_zones(
    topology: Topology, demands: Sequence[Demand], links: LinkState, load: dict[int, float]
) -> list[tuple[Demand, tuple[int, ...]]]:
    """Return the ports of leaf, spine and superspine that each flow is to take, and add to the load what all ports then carry.

    The largest flow goes first, each on the way whose fullest port stays emptiest. Flows without a way are not among them.
    """
    placed = []
    for demand in sorted(demands, key=lambda one: -one.nbytes):

        def loads(ways: tuple[int, ...], nbytes: int = demand.nbytes) -> list[float]:
            added = (load.get(port, 0.0) + nbytes / links.rate_bits_per_s(topology.port(port)) for port in ways)
            return sorted(added, reverse=True)

        ways = _ways_between_zones(topology, demand, links)
        if ways:
            best = min(ways, key=lambda way: (loads(way), way))
            for port in best:
                load[port] = load.get(port, 0.0) + demand.nbytes / links.rate_bits_per_s(topology.port(port))
            placed.append((demand, best[:-1]))  # the other zone's spine has one port down to the leaf
    return placed


def _ways_between_zones(topology: Topology, demand: Demand, links: LinkState) -> list[tuple[int, ...]]:
    """Return the ports of all live ways of a flow to another zone: of leaf, spine, superspine and the other zone's spine."""
    target = _target_leaf(topology, demand)
    down = {topology.peer_node(up.id).index: up.peer for up in topology.uplinks(target) if links.is_up(up)}
    return [
        (up.id, onward.id, back.id, down[spine])
        for up in topology.uplinks(topology.peer_node(demand.src_port))
        if links.is_up(up)
        for onward in topology.uplinks(topology.peer_node(up.id))
        if links.is_up(onward)
        for back in topology.down_ports(topology.peer_node(onward.id))
        if links.is_up(back) and (spine := topology.peer_node(back.id).index) in down
    ]


def _in_one_zone(topology: Topology, demand: Demand) -> bool:
    return topology.peer_node(demand.src_port).zone == _target_leaf(topology, demand).zone


def _target_leaf(topology: Topology, demand: Demand) -> Node:
    return topology.slot_leaf((demand.flow.dst_address - HOST_NETWORK) >> 1)
