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
    and others not at all. The seed plays no part.

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
        for leaf in topology.leaves:
            groups = [single_member(port.id) for port in topology.uplinks(leaf)]
            if not groups:
                continue
            for other in topology.leaves:
                if other is not leaf:
                    for slot in filled_slots(topology, other):
                        builder.route(leaf.index, slot, groups[slot % topology.slot_stride % len(groups)])
        return builder.build()


SCHEME = Pinning()
