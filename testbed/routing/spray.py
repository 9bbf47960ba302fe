"""Per-packet spraying: every packet takes the next uplink, whatever its flow."""

from __future__ import annotations

from testbed.routing.protocol import NO_SETTINGS, RoutingSettings
from testbed.routing.tables import (
    ForwardingTables,
    Group,
    HashField,
    Selector,
    TablesBuilder,
    route_downwards,
    route_upwards,
    weighted_uplinks,
)
from testbed.topology import Topology

_SELECTORS = {"round_robin": Selector.ROUND_ROBIN, "random": Selector.RANDOM}


class Spray:
    """Spreads the packets of each flow over all uplinks of the leaf, in turn or at random.

    No two flows collide for good, but packets of a flow overtake each other: the receiver must take them in any order.
    With go-back-N every packet that overtakes is a loss to it, and the flow collapses. Where paths differ in capacity they
    get as many of the packets; queues are not looked at.

    Source:
        Dixit et al., "On the Impact of Packet Spraying in Data Center Networks", INFOCOM 2013.
    """

    name = "spray"
    summary = "spreads the packets of each flow over all uplinks"

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = NO_SETTINGS
    ) -> ForwardingTables:
        """Return the tables: one group of all uplinks per leaf, whose selector reads nothing of the packet."""
        selector = _SELECTORS[settings.spray_order]
        builder = TablesBuilder(topology)
        route_downwards(builder, topology)
        route_upwards(
            builder,
            topology,
            lambda switch, other: Group(
                selector, HashField(0), settings.seed_at(switch, hash_seed), weighted_uplinks(topology, switch, other)
            ),
        )
        return builder.build()


SCHEME = Spray()
