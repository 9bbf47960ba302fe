"""The star: all hosts on one switch."""

from __future__ import annotations

from testbed.errors import PlanError
from testbed.topology.clos import slot_stride
from testbed.topology.model import (
    LinkSpec,
    NodeKind,
    NodeSpec,
    Topology,
    assemble,
    build_host_cables,
)


def build_star(*, hosts: int, host_link: LinkSpec, nics_per_host: int = 1) -> Topology:
    """Return a star: ``hosts`` hosts on ``switch0``, which is a leaf without uplinks.

    Args:
        hosts: Number of hosts; at least 1.
        host_link: Rate and delay of every link.
        nics_per_host: NICs of every host, each with a link of its own; at least 1.

    Raises:
        PlanError: If there is no host, a host has no NIC, or there are more than can be numbered.

    Source:
        Gangidi et al., SIGCOMM 2024: "a few AI racks connected to a central Ethernet switch".
    """
    if hosts < 1:
        raise PlanError("a star needs at least one host")
    if nics_per_host < 1:
        raise PlanError(f"a host needs at least one NIC, got {nics_per_host}")
    nodes = [NodeSpec(f"host{host}", NodeKind.HOST) for host in range(hosts)]
    nodes.append(NodeSpec("switch0", NodeKind.LEAF))
    cables = build_host_cables(range(hosts), hosts, 0, nics_per_host, host_link)
    return assemble(nodes, cables, slot_stride=slot_stride(hosts * nics_per_host))
