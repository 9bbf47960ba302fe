"""Path pinning: the destination's place in its rack picks the spine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from testbed.routing.protocol import NO_SETTINGS, RoutingSettings
from testbed.routing.tables import (
    ForwardingTables,
    TablesBuilder,
    filled_slots,
    route_downwards,
    single_member,
)
from testbed.topology import Node, Port, Topology


class Pinning:
    """Pins each destination to the uplink numbered like its downlink, modulo the number of uplinks.

    With full racks, no failures and at least as many uplinks as NICs per rack, no two destinations of a rack
    share a path. Half-empty racks, or jobs whose next hops fall into the same slice, use some uplinks twice
    and others not at all. Where there are twice as many uplinks as NICs per rack, or more, the racks take turns with them, two by
    two: racks 0 and 1 are reached by the first set of uplinks, racks 2 and 3 by the second. Between zones the destination's
    place in its rack and its rack's in the zone choose the superspine, and the spine of the other zone is the one that is its
    own there. The seed plays no part.

    Source:
        Gangidi et al., SIGCOMM 2024 ("path pinning": the destination "slice" is the index of the leaf's downlink).
    """

    name = "pinning"
    summary = "gives each destination slice one uplink"

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = NO_SETTINGS
    ) -> ForwardingTables:
        """Return the tables: one uplink per leaf and destination outside its rack."""
        builder = TablesBuilder(topology)
        route_downwards(builder, topology)
        destinations = _Destinations(topology)
        for leaf in topology.leaves:
            uplinks = topology.uplinks(leaf)
            places = destinations.uplinks(len(uplinks))
            _pin(builder, leaf, uplinks, destinations, places, destinations.leaf != leaf.index)
        for spine in topology.spines:
            uplinks = topology.uplinks(spine)
            places = (destinations.downlink + destinations.rack) % max(1, len(uplinks))
            _pin(builder, spine, uplinks, destinations, places, destinations.zone != spine.zone)
        for superspine in topology.superspines:
            down = topology.down_ports(superspine)
            for zone in dict.fromkeys(leaf.zone for leaf in topology.leaves):
                ports = [port for port in down if topology.peer_node(port.id).zone == zone]
                places = destinations.uplinks(len(ports))
                _pin(builder, superspine, ports, destinations, places, destinations.zone == zone)
        return builder.build()


SCHEME = Pinning()


class _Destinations:
    """Every NIC as a destination, each array of shape ``(NICs,)``.

    Attributes:
        slot: Its slot.
        downlink: Its place among the slots of its leaf.
        leaf: Node of its leaf.
        rack: Number of the leaf within its zone.
        zone: Number of the zone.
    """

    def __init__(self, topology: Topology) -> None:
        rows: list[tuple[int, int, int, int, int]] = []
        racks: dict[int | None, int] = {}
        for number, leaf in enumerate(topology.leaves):
            rack = racks[leaf.zone] = racks.get(leaf.zone, -1) + 1
            rows += [(slot, number, leaf.index, rack, leaf.zone or 0) for slot in filled_slots(topology, leaf)]
        self.slot, self._number, self.leaf, self.rack, self.zone = np.array(rows, np.intp).reshape(-1, 5).T
        self.downlink = self.slot % topology.slot_stride
        self._slices = max(len(topology.down_ports(leaf)) for leaf in topology.leaves)

    def uplinks(self, count: int) -> npt.NDArray[np.intp]:
        """Return the uplink of any leaf, and so the spine of the zone, to which each is pinned, of ``count``."""
        sets = max(1, count // self._slices)
        places: npt.NDArray[np.intp] = self._slices * (self._number // 2 % sets) + self.downlink
        return places % max(1, count)


def _pin(
    builder: TablesBuilder,
    switch: Node,
    ports: Sequence[Port],
    destinations: _Destinations,
    places: npt.NDArray[np.intp],
    chosen: npt.NDArray[np.bool_],
) -> None:
    """Let a switch send the destinations that are chosen to the port at each one's place."""
    for place, port in enumerate(ports):
        builder.route_slots(switch.index, destinations.slot[chosen & (places == place)], single_member(port.id))
