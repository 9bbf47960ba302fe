"""The star: all hosts on one switch."""

from __future__ import annotations

from testbed.errors import PlanError
from testbed.topology.clos import slot_stride
from testbed.topology.model import (
    CableSpec,
    LinkSpec,
    NodeKind,
    NodeSpec,
    Topology,
    assemble,
    host_link_addresses,
)


def build_star(*, hosts: int, host_link: LinkSpec) -> Topology:
    """Return a star: ``hosts`` hosts on ``switch0``, which is a leaf without uplinks.

    Args:
        hosts: Number of hosts; at least 1.
        host_link: Rate and delay of every link.

    Raises:
        PlanError: If there is no host, or more than can be numbered.

    Source:
        Gangidi et al., SIGCOMM 2024: "a few AI racks connected to a central Ethernet switch".
    """
    if hosts < 1:
        raise PlanError("a star needs at least one host")
    nodes = [NodeSpec(f"host{rank}", NodeKind.HOST) for rank in range(hosts)]
    nodes.append(NodeSpec("switch0", NodeKind.LEAF))
    cables = [
        CableSpec(rank, "eth0", hosts, f"down{rank}", *host_link_addresses(rank), host_link) for rank in range(hosts)
    ]
    return assemble(nodes, cables, slot_stride=slot_stride(hosts))
