"""Flowlet switching: a flow may take a new path after every pause."""

from __future__ import annotations

from testbed.errors import PlanError
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


class Flowlet:
    """Hashes each flow as E-ECMP does, and anew whenever the flow has paused for longer than the gap.

    A gap above what paths differ in delay, queues included, keeps packets in order: those sent before the pause are there
    before those after it. A shorter gap reorders. A flow that never pauses keeps its first path, however bad.

    Source:
        Vanini et al., "Let it Flow: Resilient Asymmetric Load Balancing with Flowlet Switching", NSDI 2017.
    """

    name = "flowlet"
    summary = "hashes a flow anew after each pause"

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = NO_SETTINGS
    ) -> ForwardingTables:
        """Return the tables: one group of all uplinks per leaf, whose selector remembers when each flow last sent.

        Raises:
            PlanError: The settings give no gap.
        """
        gap_ns = settings.flowlet_gap_ns
        if gap_ns < 1:
            raise PlanError("flowlet switching needs a gap above 0", hint="give `routing.flowlet_gap`")
        builder = TablesBuilder(topology)
        route_downwards(builder, topology)
        fields = HashField.FIVE_TUPLE | HashField.DST_QP
        route_upwards(
            builder,
            topology,
            lambda switch, other: Group(
                Selector.FLOWLET,
                fields,
                settings.seed_at(switch, hash_seed),
                weighted_uplinks(topology, switch, other),
                gap_ns,
                settings.function_at(switch),
            ),
        )
        return builder.build()


SCHEME = Flowlet()
