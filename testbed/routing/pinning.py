"""Path pinning: the destination's place in its rack picks the spine."""

from __future__ import annotations

from testbed.routing.protocol import NO_SETTINGS, RoutingSettings
from testbed.routing.tables import (
    ForwardingTables,
    TablesBuilder,
    filled_slots,
    route_downwards,
    single_member,
)
from testbed.topology import Topology


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
        slices = max(len(topology.down_ports(leaf)) for leaf in topology.leaves)
        slots_of = [filled_slots(topology, leaf) for leaf in topology.leaves]
        first_of_zone: dict[int | None, int] = {}
        for number, leaf in enumerate(topology.leaves):
            first_of_zone.setdefault(leaf.zone, number)
        for leaf in topology.leaves:
            groups = [single_member(port.id) for port in topology.uplinks(leaf)]
            for number, other in enumerate(topology.leaves) if groups else ():
                if other is not leaf:
                    for slot in slots_of[number]:
                        place = _uplink(slot % topology.slot_stride, number, slices, len(groups))
                        builder.route(leaf.index, slot, groups[place])
        for spine in topology.spines:
            groups = [single_member(port.id) for port in topology.uplinks(spine)]
            for number, other in enumerate(topology.leaves) if groups else ():
                if other.zone != spine.zone:
                    rack = number - first_of_zone[other.zone]
                    for slot in slots_of[number]:
                        builder.route(spine.index, slot, groups[(slot % topology.slot_stride + rack) % len(groups)])
        for superspine in topology.superspines:
            for number, other in enumerate(topology.leaves):
                down = [
                    port for port in topology.down_ports(superspine) if topology.peer_node(port.id).zone == other.zone
                ]
                groups = [single_member(port.id) for port in down]
                for slot in slots_of[number]:
                    place = _uplink(slot % topology.slot_stride, number, slices, len(groups))
                    builder.route(superspine.index, slot, groups[place])
        return builder.build()


SCHEME = Pinning()


def _uplink(downlink: int, leaf: int, slices: int, uplinks: int) -> int:
    """Return the uplink, and so the spine of a zone, to which a destination is pinned: by its downlink and its leaf."""
    sets = max(1, uplinks // slices)
    return (slices * (leaf // 2 % sets) + downlink) % uplinks
