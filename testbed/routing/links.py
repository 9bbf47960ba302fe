"""What state the links of a fabric are in, as those who route by it see it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from testbed.topology import Port, Topology


@dataclass(frozen=True, slots=True)
class LinkState:
    """Which links are down, and which carry less than they should.

    Attributes:
        dead_ports: Ids of the ports whose link is down. One end is enough: nothing crosses a link either of whose ends is here.
        rates_bits_per_s: Port ids with the rate at which they send in place of their own, ascending.
    """

    dead_ports: frozenset[int] = frozenset()
    rates_bits_per_s: tuple[tuple[int, int], ...] = ()

    def is_up(self, port: Port) -> bool:
        """Return whether what the port sends arrives at the other end."""
        return port.id not in self.dead_ports and port.peer not in self.dead_ports

    def rate_bits_per_s(self, port: Port) -> int:
        """Return the rate at which a port sends."""
        if not self.rates_bits_per_s:
            return port.rate_bits_per_s
        return next((rate for changed, rate in self.rates_bits_per_s if changed == port.id), port.rate_bits_per_s)


ALL_UP = LinkState()
"""Every link is up and has its own rate."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What each part of the control plane has noticed of the links so far.

    Attributes:
        adjacent: What switches know of their own links: they use no port whose link is down.
        fabric: What the routing protocol has told all switches: they use no next hop that cannot reach the destination.
        controller: What a central controller, or a switch that weighs paths by capacity, goes by.
    """

    adjacent: LinkState = ALL_UP
    fabric: LinkState = ALL_UP
    controller: LinkState = ALL_UP

    @classmethod
    def of(cls, links: LinkState) -> Knowledge:
        """Return what all know once everybody has noticed."""
        return cls(links, links, links)


def dead_ports_of(topology: Topology, names: Iterable[str]) -> frozenset[int]:
    """Return both ports of links, and of all links of nodes, by the names of the links and nodes.

    Raises:
        KeyError: The fabric has no link or node of a name.
    """
    dead: set[int] = set()
    for name in names:
        if ":" in name:
            link = topology.link(name)
            dead |= {link.a, link.b}
        else:
            ports = topology.node(name).ports
            dead |= {*ports, *(topology.port(port).peer for port in ports)}
    return frozenset(dead)
