"""Equal-cost multipath: the five-tuple's hash picks the spine."""

from __future__ import annotations

from testbed.routing.tables import (
    ForwardingTables,
    Group,
    HashField,
    Selector,
    TablesBuilder,
    filled_slots,
    route_downwards,
)
from testbed.topology import Topology


class Ecmp:
    """Hashes each flow's five-tuple over all uplinks of its leaf.

    RoCEv2's destination port is constant, so all entropy is in the addresses and the UDP source port: few,
    large flows collide. All leaves share the seed ``hash_seed``; spines have one way down and do not hash.

    Source:
        RFC 2992 (hashing keeps a flow on one path); Gangidi et al., SIGCOMM 2024 (why it was rejected).
    """

    name = "ecmp"

    def build_tables(self, topology: Topology, *, hash_seed: int) -> ForwardingTables:
        """Return the tables: one group of all uplinks per leaf for everything outside its rack."""
        builder = TablesBuilder(topology)
        route_downwards(builder, topology)
        for leaf in topology.leaves:
            uplinks = tuple(port.id for port in topology.uplinks(leaf))
            if not uplinks:
                continue
            group = Group(Selector.HASH, HashField.FIVE_TUPLE, hash_seed, uplinks)
            for other in topology.leaves:
                if other is not leaf:
                    for slot in filled_slots(topology, other):
                        builder.route(leaf.index, slot, group)
        return builder.build()
