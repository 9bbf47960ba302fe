"""Equal-cost multipath: the five-tuple's hash picks the spine."""

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


class Ecmp:
    """Hashes each flow's five-tuple over all uplinks of its leaf.

    RoCEv2's destination port is constant, so all entropy is in the addresses and the UDP source port: few,
    large flows collide. All leaves share the seed ``hash_seed``; spines have one way down and do not hash there. Between zones
    spines hash over the superspines, and these over the spines of the other zone, each tier with a seed of its own, and with a
    function of its own if the settings say so. Where paths
    differ in capacity they get as much of the range (weighted ECMP).

    Source:
        RFC 2992 (hashing keeps a flow on one path); Gangidi et al., SIGCOMM 2024 (why it was rejected); Zhou et al.,
        "WCMP: Weighted Cost Multipathing for Improved Fairness in Data Centers", EuroSys 2014 (the weights).
    """

    name = "ecmp"
    summary = "hashes the five-tuple"

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = NO_SETTINGS
    ) -> ForwardingTables:
        """Return the tables: one group of all uplinks per leaf for everything outside its rack."""
        return hashed_tables(topology, HashField.FIVE_TUPLE, hash_seed, settings)


SCHEME = Ecmp()


def hashed_tables(
    topology: Topology, hash_fields: HashField, seed: int, settings: RoutingSettings = NO_SETTINGS
) -> ForwardingTables:
    """Return tables whose switches hash ``hash_fields`` over their ways, all of a tier with one function and seed."""
    builder = TablesBuilder(topology)
    route_downwards(builder, topology)
    route_upwards(
        builder,
        topology,
        lambda switch, other: Group(
            Selector.HASH,
            hash_fields,
            settings.seed_at(switch, seed),
            weighted_uplinks(topology, switch, other),
            hash_function=settings.function_at(switch),
        ),
    )
    return builder.build()
