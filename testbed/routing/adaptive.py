"""Adaptive routing: every packet takes the uplink with the shortest queue."""

from __future__ import annotations

from testbed.errors import PlanError
from testbed.routing.links import ALL_UP
from testbed.routing.protocol import NO_SETTINGS, RoutingSettings
from testbed.routing.tables import (
    MAX_CHOICES,
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


class Adaptive:
    """Sends each packet to the uplink, of those whose link is up, with the shortest queue; equals take turns, by weight.

    What it sees is its own switch (``local``). Where paths differ in what they can carry further down, that fills the
    narrow ones: a switch that is told of it (``capacity``) compares queues over capacities instead. Packets of a flow
    overtake each other, as with `spray`.

    Source:
        Ghorbani et al., "DRILL: Micro Load Balancing for Low-latency Data Center Networks", SIGCOMM 2017 (queues of the
        switch itself); Alizadeh et al., "CONGA", SIGCOMM 2014 (why local decisions fail in asymmetric fabrics).
    """

    name = "adaptive"
    summary = "sends each packet to the shortest queue"

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = NO_SETTINGS
    ) -> ForwardingTables:
        """Return the tables: one group of all uplinks per leaf, whose selector compares queues.

        Raises:
            PlanError: A leaf has more uplinks than a switch compares.
        """
        builder = TablesBuilder(topology)
        route_downwards(builder, topology)
        for switch in (*topology.leaves, *topology.spines):
            if len(topology.uplinks(switch)) > MAX_CHOICES:
                raise PlanError(
                    f"{switch.name} has {len(topology.uplinks(switch))} uplinks, adaptive routing compares at most {MAX_CHOICES}",
                    hint="use fewer spines, or `routing.scheme: spray`",
                )
        knows_capacity = settings.adaptive_scope == "capacity"
        route_upwards(
            builder,
            topology,
            lambda switch, other: Group(
                Selector.LEAST_DEPTH,
                HashField(0),
                settings.seed_at(switch, hash_seed),
                weighted_uplinks(topology, switch, other, settings.links)
                if knows_capacity
                else tuple(dict.fromkeys(weighted_uplinks(topology, switch, other))),
            ),
            settings.links if knows_capacity else ALL_UP,
        )
        return builder.build()


SCHEME = Adaptive()
