"""The two-stage CLOS: hosts under leaves, every leaf joined to every spine."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.errors import PlanError
from testbed.topology.model import (
    CableSpec,
    LinkSpec,
    NodeKind,
    NodeSpec,
    Topology,
    assemble,
    build_host_cables,
    uplink_addresses,
)


def build_clos(
    *, hosts_per_leaf: Sequence[int], spines: int, host_link: LinkSpec, uplink: LinkSpec, nics_per_host: int = 1
) -> Topology:
    """Return a CLOS of leaves and spines, with one uplink from every leaf to every spine.

    Hosts are numbered leaf by leaf. Racks may be uneven; a single leaf needs no spine.

    Args:
        hosts_per_leaf: Hosts under each leaf; at least one leaf, and at least 1 host under each.
        spines: Number of spines; at least 0, and at least 1 where there are several leaves.
        host_link: Rate and delay of the links between hosts and leaves.
        uplink: Rate and delay of the links between leaves and spines.
        nics_per_host: NICs of every host, each with a link of its own to the host's leaf; at least 1.

    Raises:
        PlanError: If a leaf has no hosts, a host no NIC, leaves have no spine between them, or the fabric is too large.

    Source:
        Gangidi et al., "RDMA over Ethernet for Distributed AI Training at Meta Scale", SIGCOMM 2024
        (leaf "RTSW", spine "CTSW").
    """
    if not hosts_per_leaf:
        raise PlanError("a CLOS needs at least one leaf")
    for leaf, hosts in enumerate(hosts_per_leaf):
        if hosts < 1:
            raise PlanError(f"leaf{leaf} has no hosts", hint="give every leaf at least one host")
    if spines < 0:
        raise PlanError(f"the number of spines must be at least 0, got {spines}")
    if spines == 0 and len(hosts_per_leaf) > 1:
        raise PlanError(
            f"{len(hosts_per_leaf)} leaves without a spine cannot reach each other",
            hint="add a spine, or use a star",
        )
    if nics_per_host < 1:
        raise PlanError(f"a host needs at least one NIC, got {nics_per_host}")
    stride = slot_stride(max(hosts_per_leaf) * nics_per_host)
    first_leaf = sum(hosts_per_leaf)
    first_spine = first_leaf + len(hosts_per_leaf)
    nodes = [
        *(NodeSpec(f"host{host}", NodeKind.HOST) for host in range(first_leaf)),
        *(NodeSpec(f"leaf{leaf}", NodeKind.LEAF) for leaf in range(len(hosts_per_leaf))),
        *(NodeSpec(f"spine{spine}", NodeKind.SPINE) for spine in range(spines)),
    ]
    cables: list[CableSpec] = []
    for leaf, hosts in enumerate(hosts_per_leaf):
        first_host = sum(hosts_per_leaf[:leaf])
        cables += build_host_cables(
            range(first_host, first_host + hosts), first_leaf + leaf, leaf * stride, nics_per_host, host_link
        )
    for leaf in range(len(hosts_per_leaf)):
        for spine in range(spines):
            addresses = uplink_addresses(leaf * spines + spine)
            cables.append(
                CableSpec(first_leaf + leaf, f"up{spine}", first_spine + spine, f"down{leaf}", *addresses, uplink)
            )
    return assemble(nodes, cables, slot_stride=stride)


def slot_stride(nics: int) -> int:
    """Return the power of two at or above a number of NICs (at least 1): the slots reserved per leaf."""
    return 1 << (nics - 1).bit_length()
