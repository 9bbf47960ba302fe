"""Nodes, ports, links and addresses of a fabric, as immutable values."""

from testbed.topology.clos import build_clos
from testbed.topology.model import (
    HOST_NETWORK,
    UPLINK_NETWORK,
    KernelRoute,
    Link,
    LinkSpec,
    NextHop,
    Node,
    NodeKind,
    Port,
    Topology,
    check_port_numbers,
    format_address,
)
from testbed.topology.ranks import RankMap
from testbed.topology.star import build_star
from testbed.topology.zones import build_zones

__all__ = [
    "HOST_NETWORK",
    "UPLINK_NETWORK",
    "KernelRoute",
    "Link",
    "LinkSpec",
    "NextHop",
    "Node",
    "NodeKind",
    "Port",
    "RankMap",
    "Topology",
    "build_clos",
    "build_star",
    "build_zones",
    "check_port_numbers",
    "format_address",
]
