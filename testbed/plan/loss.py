"""Which links lose frames at random, and how many: a gray failure that lasts the whole run."""

from __future__ import annotations

from fractions import Fraction

from testbed.errors import PlanError
from testbed.scenario import ClosFabric, LostFrames, Scenario
from testbed.topology import Topology

PRIORITIES = 8


def link_losses(scenario: Scenario, topology: Topology) -> dict[int, Fraction]:
    """Return the share of its frames that each lossy port's link loses in that direction, by port id.

    Raises:
        PlanError: A link is named that the fabric lacks, or one twice.
    """
    fabric = scenario.fabric
    losses: dict[int, Fraction] = {}
    for link in topology.links:
        on_host_link = topology.is_nic_port(link.a)
        assert on_host_link or isinstance(fabric, ClosFabric)
        kind = fabric.host_link if on_host_link or not isinstance(fabric, ClosFabric) else fabric.uplink
        losses[link.a] = losses[link.b] = kind.loss_fraction
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


def lost_priorities(scenario: Scenario) -> tuple[int, ...]:
    """Return the priorities whose frames lossy links lose."""
    if scenario.fabric.lost_frames is LostFrames.DATA:
        return (scenario.qos.lossless_priority,)
    return tuple(range(PRIORITIES))
