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
    two: racks 0 and 1 are reached by the first set of uplinks, racks 2 and 3 by the second. The seed plays no part.

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
        for leaf in topology.leaves:
            groups = [single_member(port.id) for port in topology.uplinks(leaf)]
            if not groups:
                continue
            sets = max(1, len(groups) // slices)
            for number, other in enumerate(topology.leaves):
                if other is not leaf:
                    first = slices * (number // 2 % sets)
                    for slot in filled_slots(topology, other):
                        builder.route(leaf.index, slot, groups[(first + slot % topology.slot_stride) % len(groups)])
        return builder.build()


SCHEME = Pinning()
