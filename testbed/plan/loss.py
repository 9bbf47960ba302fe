"""Which links lose frames at random, and how many: a gray failure that lasts the whole run."""

from __future__ import annotations

from fractions import Fraction

from testbed.errors import PlanError
from testbed.scenario import ClosFabric, LostFrames, Scenario, ZonesFabric
from testbed.scenario import Link as LinkClass
from testbed.scenario.fabric import Fabric
from testbed.topology import Link, NodeKind, Topology

PRIORITIES = 8


def link_losses(scenario: Scenario, topology: Topology) -> dict[int, Fraction]:
    """Return the share of its frames that each lossy port's link loses in that direction, by port id.

    Raises:
        PlanError: A link is named that the fabric lacks, or one twice.
    """
    fabric = scenario.fabric
    losses: dict[int, Fraction] = {}
    for link in topology.links:
        losses[link.a] = losses[link.b] = _kind_of(fabric, topology, link).loss_fraction
    named: set[str] = set()
    for index, lossy in enumerate(fabric.lossy_links):
        key = f"fabric.lossy_links[{index}].link"
        try:
            link = topology.link(lossy.link)
        except KeyError:
            raise PlanError(
                f'{key}: must be a link of the fabric, got "{lossy.link}"',
                hint=f'links are named by their two nodes from the bottom up, such as "{topology.links[-1].name}"',
            ) from None
        if lossy.link in named:
            raise PlanError(f'{key}: must name a link once, got "{lossy.link}" again', hint="remove one of the two")
        named.add(lossy.link)
        losses[link.a] = losses[link.b] = lossy.fraction
    return {port: fraction for port, fraction in losses.items() if fraction}


def _kind_of(fabric: Fabric, topology: Topology, link: Link) -> LinkClass:
    """Return what the fabric says of a link's tier."""
    lower = topology.nodes[topology.port(link.a).node].kind
    if lower is NodeKind.SPINE and isinstance(fabric, ZonesFabric):
        return fabric.superspine_link
    if lower is NodeKind.LEAF and isinstance(fabric, ClosFabric):
        return fabric.uplink
    return fabric.host_link


def lost_priorities(scenario: Scenario) -> tuple[int, ...]:
    """Return the priorities whose frames lossy links lose."""
    if scenario.fabric.lost_frames is LostFrames.DATA:
        return tuple(one.priority for one in scenario.qos.data_priorities)
    return tuple(range(PRIORITIES))
