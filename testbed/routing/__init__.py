"""Forwarding tables, the schemes that fill them, and what follows from them: paths, loads, predictions."""

from __future__ import annotations

from testbed.errors import PlanError
from testbed.routing.adaptive import Adaptive
from testbed.routing.e_ecmp import EnhancedEcmp
from testbed.routing.ecmp import Ecmp
from testbed.routing.failures import build_tables, prune_tables
from testbed.routing.flowlet import Flowlet
from testbed.routing.hashing import FlowKey
from testbed.routing.links import ALL_UP, Knowledge, LinkState, dead_ports_of
from testbed.routing.paths import Collision, Path, find_collisions, link_loads, trace_path
from testbed.routing.pinning import Pinning
from testbed.routing.predict import completion_time, max_min_rates, nic_port_rates, port_rates, predicted_cct_ratio
from testbed.routing.protocol import Demand, RoutingScheme, RoutingSettings
from testbed.routing.routes import Route, single_route, trace_routes
from testbed.routing.spray import Spray
from testbed.routing.tables import NO_GROUP, UNREACHABLE, ForwardingTables, Group, HashField, OverrideKey, Selector
from testbed.routing.te import TrafficEngineering

__all__ = [
    "ALL_UP",
    "NO_GROUP",
    "ROUTING_SCHEMES",
    "UNREACHABLE",
    "Collision",
    "Demand",
    "FlowKey",
    "ForwardingTables",
    "Group",
    "HashField",
    "Knowledge",
    "LinkState",
    "OverrideKey",
    "Path",
    "Route",
    "RoutingScheme",
    "RoutingSettings",
    "Selector",
    "build_tables",
    "completion_time",
    "dead_ports_of",
    "find_collisions",
    "link_loads",
    "max_min_rates",
    "nic_port_rates",
    "port_rates",
    "predicted_cct_ratio",
    "prune_tables",
    "routing_scheme",
    "single_route",
    "trace_path",
    "trace_routes",
]

ROUTING_SCHEMES: dict[str, RoutingScheme] = {
    "ecmp": Ecmp(),
    "e-ecmp": EnhancedEcmp(),
    "pinning": Pinning(),
    "te": TrafficEngineering(),
    "flowlet": Flowlet(),
    "spray": Spray(),
    "adaptive": Adaptive(),
}
"""Every routing scheme by the name that scenarios use."""


def routing_scheme(name: str) -> RoutingScheme:
    """Return the routing scheme of that name.

    Raises:
        PlanError: If there is none.
    """
    try:
        return ROUTING_SCHEMES[name]
    except KeyError:
        known = ", ".join(sorted(ROUTING_SCHEMES))
        raise PlanError(f'there is no routing scheme "{name}"', hint=f"use one of {known}") from None
