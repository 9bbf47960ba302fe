"""Forwarding tables, the schemes that fill them, and what follows from them: paths, loads, predictions.

A new scheme is a module here that exports ``SCHEME`` (see `protocol.RoutingScheme`); it is found by itself, and its name is
one that scenarios may use. docs/routing.md tells what there is.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from testbed.errors import PlanError
from testbed.routing.failures import build_tables, prune_tables
from testbed.routing.hashing import FlowKey
from testbed.routing.links import ALL_UP, Knowledge, LinkState, dead_ports_of
from testbed.routing.paths import Collision, Path, find_collisions, link_loads, trace_path
from testbed.routing.predict import completion_time, max_min_rates, nic_port_rates, port_rates, predicted_cct_ratio
from testbed.routing.protocol import Demand, RoutingScheme, RoutingSettings
from testbed.routing.routes import Route, single_route, trace_routes
from testbed.routing.tables import (
    NO_GROUP,
    UNREACHABLE,
    ForwardingTables,
    Group,
    HashField,
    HashFunction,
    OverrideKey,
    Selector,
)

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
    "HashFunction",
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
    "find_schemes",
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


def find_schemes() -> Mapping[str, RoutingScheme]:
    """Return every routing scheme of this package by name, in the order of the names.

    A scheme is a module here that exports ``SCHEME``; nothing else lists it.

    Raises:
        ValueError: Two have one name.
    """
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found: dict[str, RoutingScheme] = {}
    for module in modules:
        scheme: RoutingScheme | None = getattr(module, "SCHEME", None)
        if scheme is not None:
            if scheme.name in found:
                raise ValueError(f'{module.__name__}: there is another routing scheme "{scheme.name}"')
            found[scheme.name] = scheme
    return dict(sorted(found.items()))


ROUTING_SCHEMES: Mapping[str, RoutingScheme] = find_schemes()
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
