"""Three tiers: zones, each a two-stage CLOS, whose spines are joined by superspines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from testbed.errors import PlanError
from testbed.topology.clos import slot_stride
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


def build_zones(
    *,
    zones: int,
    hosts_per_leaf: Sequence[int],
    spines: int,
    superspines: int,
    host_link: LinkSpec,
    uplink: LinkSpec,
    superspine_link: LinkSpec,
    nics_per_host: int = 1,
) -> Topology:
    """Return zones of leaves and spines, with a link from every spine of every zone to every superspine.

    Hosts, leaves and spines are numbered zone by zone, over the whole fabric. What a zone's spines can send to each other's zones
    over what its leaves can send them is its oversubscription: ``leaves * uplink rate`` to ``superspines * superspine link
    rate``.

    Args:
        zones: Number of zones; at least 1.
        hosts_per_leaf: Hosts under each leaf, zone by zone; as many leaves in every zone, at least 1 host under each.
        spines: Spines of each zone; at least 1.
        superspines: Superspines of the fabric; at least 1.
        host_link: Rate and delay of the links between hosts and leaves.
        uplink: Rate and delay of the links between leaves and spines.
        superspine_link: Rate and delay of the links between spines and superspines.
        nics_per_host: NICs of every host, each with a link of its own to the host's leaf; at least 1.

    Raises:
        PlanError: If a number is below its minimum, or the leaves do not divide evenly among the zones.

    Source:
        Gangidi et al., SIGCOMM 2024 (AI zones joined by aggregation switches, "ATSW", 1:7 oversubscribed).
    """
    for what, number in (
        ("zone", zones),
        ("spine", spines),
        ("superspine", superspines),
        ("leaf", len(hosts_per_leaf)),
    ):
        if number < 1:
            raise PlanError(f"zones need at least one {what}, got {number}")
    if len(hosts_per_leaf) % zones:
        raise PlanError(f"{len(hosts_per_leaf)} leaves do not divide evenly among {zones} zones")
    if nics_per_host < 1:
        raise PlanError(f"a host needs at least one NIC, got {nics_per_host}")
    for leaf, hosts in enumerate(hosts_per_leaf):
        if hosts < 1:
            raise PlanError(f"leaf{leaf} has no hosts", hint="give every leaf at least one host")
    leaves = len(hosts_per_leaf)
    per_zone = leaves // zones
    stride = slot_stride(max(hosts_per_leaf) * nics_per_host)
    ends = list(accumulate(hosts_per_leaf, initial=0))
    first_leaf, first_spine = ends[-1], ends[-1] + leaves
    first_superspine = first_spine + zones * spines
    nodes = [
        *(
            NodeSpec(f"host{host}", NodeKind.HOST, leaf // per_zone)
            for leaf, hosts in enumerate(hosts_per_leaf)
            for host in range(ends[leaf], ends[leaf] + hosts)
        ),
        *(NodeSpec(f"leaf{leaf}", NodeKind.LEAF, leaf // per_zone) for leaf in range(leaves)),
        *(NodeSpec(f"spine{spine}", NodeKind.SPINE, spine // spines) for spine in range(zones * spines)),
        *(NodeSpec(f"superspine{number}", NodeKind.SUPERSPINE, None) for number in range(superspines)),
    ]
    cables: list[CableSpec] = []
    for leaf, hosts in enumerate(hosts_per_leaf):
        cables += build_host_cables(
            range(ends[leaf], ends[leaf] + hosts), first_leaf + leaf, leaf * stride, nics_per_host, host_link
        )
    for leaf in range(leaves):
        zone = leaf // per_zone
        for spine in range(spines):
            addresses = uplink_addresses(leaf * spines + spine)
            down = f"down{leaf % per_zone}"
            upper = first_spine + zone * spines + spine
            cables.append(CableSpec(first_leaf + leaf, f"up{spine}", upper, down, *addresses, uplink))
    for spine in range(zones * spines):
        for number in range(superspines):
            addresses = uplink_addresses(leaves * spines + spine * superspines + number)
            upper, down = first_superspine + number, f"down{spine}"
            cables.append(CableSpec(first_spine + spine, f"up{number}", upper, down, *addresses, superspine_link))
    return assemble(nodes, cables, slot_stride=stride)
