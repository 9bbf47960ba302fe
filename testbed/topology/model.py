"""The fabric as values: nodes, their ports, the links between them, and every address.

A topology says what there is and how it is called; it knows nothing of forwarding tables, qdiscs or
namespaces. The builders are ``build_clos``, ``build_star`` and ``build_zones``.

Addresses (docs/architecture.md): every link is an IPv4 /31. The host link of NIC slot ``s`` is
``10.0.0.0 + 2 s`` on the leaf's side and ``+ 1`` on the host's; uplink ``k``, of a leaf or then of a spine, is
``10.128.0.0 + 2 k`` on the lower side and ``+ 1`` on the upper. The slots of one leaf form an aligned power-of-two
block, so that one prefix covers a rack.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from testbed.errors import PlanError

HOST_NETWORK = 0x0A00_0000
"""10.0.0.0: the first address of the host links."""

UPLINK_NETWORK = 0x0A80_0000
"""10.128.0.0: the first address of the uplinks."""

FABRIC_PREFIX_LENGTH = 8
"""All addresses of a fabric lie in 10.0.0.0/8."""

MAX_SLOTS = (UPLINK_NETWORK - HOST_NETWORK) // 2
"""NIC slots that fit below the first uplink address."""

MAX_PORTS = 0xFFFE
"""Port ids stand in 16 bits of a MAC address; 0 means none and ff:ff marks a switch's own frames."""


class NodeKind(StrEnum):
    """What a node does in the fabric."""

    HOST = "host"
    LEAF = "leaf"
    SPINE = "spine"
    SUPERSPINE = "superspine"

    @property
    def tier(self) -> int:
        """How far above the leaves: -1 for hosts, 0 for leaves, 1 for spines, 2 for superspines."""
        return _TIERS[self]


_TIERS = {kind: tier for tier, kind in enumerate(NodeKind, -1)}


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """What the links of one tier are like; the same in both directions.

    Attributes:
        rate_bits_per_s: Line rate, in bits per second; at least 1.
        delay_ns: Propagation delay in one direction, in ns; at least 0.

    Raises:
        ValueError: If a value is below its minimum.
    """

    rate_bits_per_s: int
    delay_ns: int

    def __post_init__(self) -> None:
        if self.rate_bits_per_s < 1:
            raise ValueError(f"rate_bits_per_s must be at least 1, got {self.rate_bits_per_s}")
        if self.delay_ns < 0:
            raise ValueError(f"delay_ns must be at least 0, got {self.delay_ns}")


@dataclass(frozen=True, slots=True)
class Node:
    """A host or a switch.

    Attributes:
        index: Position in ``Topology.nodes``: hosts by number, then leaves, then spines, then superspines.
        name: Such as ``host0``, ``leaf0``, ``spine0``, ``switch0``.
        kind: What it does.
        ports: Its port ids, in the order of the interface names: all ``down``, then all ``up``.
        zone: Number of its zone; None for superspines, which belong to none, and 0 where there is one zone alone.
    """

    index: int
    name: str
    kind: NodeKind
    ports: tuple[int, ...]
    zone: int | None = 0


@dataclass(frozen=True, slots=True)
class Port:
    """One end of a link.

    Attributes:
        id: Dense, 1-based over the fabric; 0 means "none". The key of every eBPF array.
        node: Index of the node it belongs to.
        ifname: Interface name, unique within its node: ``eth0``, ``down3``, ``up1``.
        mac: MAC address as text, ``02:00:PP:PP:00:00`` on hosts and ``02:00:PP:PP:ff:ff`` on switches.
        address: IPv4 address of the interface, as an integer; the prefix length is 31.
        peer: Port id of the link's other end.
        link: Index of its link.
        rate_bits_per_s: Rate at which it sends, in bits per second.
        delay_ns: Propagation delay towards its peer, in ns.
    """

    id: int
    node: int
    ifname: str
    mac: str
    address: int
    peer: int
    link: int
    rate_bits_per_s: int
    delay_ns: int


@dataclass(frozen=True, slots=True)
class Link:
    """A cable between two ports.

    Attributes:
        index: Position in ``Topology.links``: host links host by host, NIC by NIC, then uplinks leaf by leaf, spine by spine.
        name: Its two nodes from the bottom up, such as ``host0:leaf0`` or ``leaf0:spine1``; of hosts with several NICs
            ``host0/eth1:leaf0``.
        a: Port id of the lower end (host, or leaf of an uplink).
        b: Port id of the upper end.
        rate_bits_per_s: Line rate of either direction, in bits per second.
        delay_ns: Propagation delay in one direction, in ns.
    """

    index: int
    name: str
    a: int
    b: int
    rate_bits_per_s: int
    delay_ns: int


class NextHop(NamedTuple):
    """Where a kernel route leads: the neighbour's address, as an integer, through one of the node's ports."""

    address: int
    port: int


class KernelRoute(NamedTuple):
    """A route for the kernel of a node; several next hops make it multipath, each of weight 1, none unreachable.

    One with a ``source`` is for packets from that address of the node alone.
    """

    prefix: int
    prefix_length: int
    next_hops: tuple[NextHop, ...]
    source: int | None = None


@dataclass(frozen=True)
class Topology:
    """A fabric: nodes, ports and links, with their names and addresses.

    Attributes:
        nodes: Hosts by number, then leaves, then spines, then superspines; ``nodes[i].index == i``.
        ports: ``ports[i].id == i + 1``; link ``k`` has the ports ``2 k + 1`` (its ``a``) and ``2 k + 2`` (its ``b``).
        links: Host links host by host, NIC by NIC, then uplinks leaf by leaf, then spine by spine; ``links[i].index == i``.
        slot_stride: NIC slots reserved per leaf, a power of two.
    """

    nodes: tuple[Node, ...]
    ports: tuple[Port, ...]
    links: tuple[Link, ...]
    slot_stride: int

    @cached_property
    def hosts(self) -> tuple[Node, ...]:
        """The hosts in the order of their numbers."""
        return tuple(node for node in self.nodes if node.kind is NodeKind.HOST)

    @cached_property
    def nics(self) -> tuple[Port, ...]:
        """The NICs of all hosts, host by host, ``eth0`` first; a NIC's position is its number."""
        return tuple(self.port(port_id) for host in self.hosts for port_id in host.ports)

    @cached_property
    def leaves(self) -> tuple[Node, ...]:
        """The switches that hosts hang from, in order of their slot blocks."""
        return tuple(node for node in self.nodes if node.kind is NodeKind.LEAF)

    @cached_property
    def spines(self) -> tuple[Node, ...]:
        """The switches that join leaves."""
        return tuple(node for node in self.nodes if node.kind is NodeKind.SPINE)

    @cached_property
    def superspines(self) -> tuple[Node, ...]:
        """The switches that join the spines of zones; none in a fabric of two tiers."""
        return tuple(node for node in self.nodes if node.kind is NodeKind.SUPERSPINE)

    @cached_property
    def _nodes_by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _links_by_name(self) -> dict[str, Link]:
        return {link.name: link for link in self.links}

    @cached_property
    def _ports_by_slot(self) -> dict[int, Port]:
        return {(port.address - HOST_NETWORK) >> 1: port for port in self.nics}

    @property
    def slots(self) -> int:
        """Number of NIC slots, empty ones included: the row length of a forwarding table."""
        return len(self.leaves) * self.slot_stride

    def port(self, port_id: int) -> Port:
        """Return the port of that id.

        Raises:
            KeyError: If there is none.
        """
        if not 1 <= port_id <= len(self.ports):
            raise KeyError(f"no port {port_id}: ids are 1 to {len(self.ports)}")
        return self.ports[port_id - 1]

    def node(self, name: str) -> Node:
        """Return the node of that name.

        Raises:
            KeyError: If there is none.
        """
        return self._nodes_by_name[name]

    def link(self, name: str) -> Link:
        """Return the link of that name, such as ``leaf0:spine1``.

        Raises:
            KeyError: If there is none.
        """
        return self._links_by_name[name]

    def port_name(self, port_id: int) -> str:
        """Return the port as people write it, such as ``leaf0/up1``."""
        port = self.port(port_id)
        return f"{self.nodes[port.node].name}/{port.ifname}"

    def peer_node(self, port_id: int) -> Node:
        """Return the node at the other end of the port's link."""
        return self.nodes[self.port(self.port(port_id).peer).node]

    def host_port(self, host: int, nic: int = 0) -> Port:
        """Return a NIC of the host of that number, by default its first.

        Raises:
            KeyError: If there is no such host, or it has no such NIC.
        """
        if not 0 <= host < len(self.hosts):
            raise KeyError(f"no host {host}: hosts are 0 to {len(self.hosts) - 1}")
        ports = self.hosts[host].ports
        if not 0 <= nic < len(ports):
            raise KeyError(f"host{host} has no NIC {nic}: its NICs are 0 to {len(ports) - 1}")
        return self.port(ports[nic])

    def is_nic_port(self, port_id: int) -> bool:
        """Return whether the port ends a host link: a NIC, or the leaf's port towards one."""
        port = self.port(port_id)
        return NodeKind.HOST in (self.nodes[port.node].kind, self.peer_node(port.id).kind)

    def down_ports(self, switch: Node) -> tuple[Port, ...]:
        """Return the switch's ports towards the tier below it: hosts, leaves or spines."""
        return self._split_ports[switch.index][0]

    def uplinks(self, switch: Node) -> tuple[Port, ...]:
        """Return the switch's ports towards the tier above it, in order of the switches there; none on hosts."""
        return self._split_ports[switch.index][1]

    def slot_of_port(self, port_id: int) -> int:
        """Return the NIC slot of a host link, given either of its ports.

        Raises:
            ValueError: If the port is not on a host link.
        """
        if not self.is_nic_port(port_id):
            raise ValueError(f"{self.port_name(port_id)} is not on a host link")
        return (self.port(port_id).address - HOST_NETWORK) >> 1

    def slot_port(self, slot: int) -> Port | None:
        """Return the NIC in a slot, or None when the slot is empty."""
        return self._ports_by_slot.get(slot)

    def slot_leaf(self, slot: int) -> Node:
        """Return the leaf whose block holds the slot, be the slot filled or empty.

        Raises:
            KeyError: If the slot lies outside the fabric.
        """
        if not 0 <= slot < self.slots:
            raise KeyError(f"no slot {slot}: slots are 0 to {self.slots - 1}")
        return self.leaves[slot // self.slot_stride]

    def slots_of_leaf(self, leaf: Node) -> range:
        """Return the leaf's block of slots, empty ones included.

        Raises:
            ValueError: If the node is not a leaf.
        """
        if leaf.kind is not NodeKind.LEAF:
            raise ValueError(f"{leaf.name} is not a leaf")
        first = (leaf.index - self.leaves[0].index) * self.slot_stride
        return range(first, first + self.slot_stride)

    def subnet_of_leaf(self, leaf: Node) -> tuple[int, int]:
        """Return the prefix that covers the host links of a leaf, as ``(address, prefix length)``."""
        first = self.slots_of_leaf(leaf).start
        # Two addresses per slot; slot_stride is a power of two, so the block is aligned.
        return HOST_NETWORK + 2 * first, 32 - self.slot_stride.bit_length()

    def kernel_routes(self, node: Node) -> list[KernelRoute]:
        """Return the routes of the node's own kernel, which mirror the forwarding tables.

        Hosts send everything to their leaf, over all their NICs; what has the address of one of several NICs leaves by that
        one, or a reply would take another way than the request came. A leaf sends all of the fabric but its own block
        over all spines; a spine knows the block of each leaf. Of its own block a leaf reaches its host links, which are
        connected routes; the rest is unreachable, or packets for an empty slot would travel up and down until their TTL
        ends. A spine of one of several zones sends the rest of the fabric over all superspines, and a superspine reaches the
        block of each leaf over all spines of its zone. Routes to the switches' uplink addresses are left out.

        Returns:
            The routes in order of their prefixes, those with a source behind.
        """
        if node.kind is NodeKind.HOST:
            nics = [self.port(port_id) for port_id in node.ports]
            by_source = [KernelRoute(0, 0, self._next_hops([nic]), nic.address) for nic in nics]
            return [KernelRoute(0, 0, self._next_hops(nics)), *(by_source if len(nics) > 1 else ())]
        if node.kind is NodeKind.LEAF:
            uplinks = self.uplinks(node)
            if not uplinks:
                return []
            return [
                KernelRoute(HOST_NETWORK, FABRIC_PREFIX_LENGTH, self._next_hops(uplinks)),
                KernelRoute(*self.subnet_of_leaf(node), ()),
            ]
        if node.kind is NodeKind.SUPERSPINE:
            down = [(self.peer_node(port.id).zone, port) for port in self.down_ports(node)]
            ways = {zone: self._next_hops(port for other, port in down if other == zone) for zone, _ in down}
            return [KernelRoute(*self.subnet_of_leaf(leaf), ways[leaf.zone]) for leaf in self.leaves]
        uplinks = self.uplinks(node)
        return [
            *([KernelRoute(HOST_NETWORK, FABRIC_PREFIX_LENGTH, self._next_hops(uplinks))] if uplinks else ()),
            *(
                KernelRoute(*self.subnet_of_leaf(self.peer_node(port.id)), self._next_hops([port]))
                for port in self.down_ports(node)
            ),
        ]

    def _next_hops(self, ports: Iterable[Port]) -> tuple[NextHop, ...]:
        return tuple(NextHop(self.port(port.peer).address, port.id) for port in ports)

    @cached_property
    def _split_ports(self) -> list[tuple[tuple[Port, ...], tuple[Port, ...]]]:
        """Return the ports towards the tier below and above of each node; none of hosts."""
        result = []
        for node in self.nodes:
            ports = [] if node.kind is NodeKind.HOST else [self.port(port) for port in node.ports]
            is_up = [self.peer_node(port.id).kind.tier > node.kind.tier for port in ports]
            down, up = (
                tuple(port for port, upward in zip(ports, is_up, strict=True) if upward is wanted)
                for wanted in (False, True)
            )
            result.append((down, up))
        return result


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node before it has ports: what a builder hands to ``assemble``."""

    name: str
    kind: NodeKind
    zone: int | None = 0


@dataclass(frozen=True, slots=True)
class CableSpec:
    """A link before its ports have ids: what a builder hands to ``assemble``.

    Attributes:
        a: Index of the lower node.
        a_ifname: Interface name at the lower node.
        b: Index of the upper node.
        b_ifname: Interface name at the upper node.
        a_address: Address at the lower node, as an integer.
        b_address: Address at the upper node, as an integer.
        link: Rate and delay.
    """

    a: int
    a_ifname: str
    b: int
    b_ifname: str
    a_address: int
    b_address: int
    link: LinkSpec


def assemble(nodes: Sequence[NodeSpec], cables: Sequence[CableSpec], *, slot_stride: int) -> Topology:
    """Return the topology of these nodes and cables, giving every port its id and its MAC address.

    Args:
        nodes: Hosts by number, then leaves, then spines, then superspines.
        cables: Host links host by host, NIC by NIC, then uplinks leaf by leaf, then spine by spine, so that a node's ports come
            in the order of their interface names.
        slot_stride: NIC slots per leaf; a power of two.

    Raises:
        PlanError: If there are more slots than the addresses can tell apart.
    """
    leaves = sum(node.kind is NodeKind.LEAF for node in nodes)
    if leaves * slot_stride > MAX_SLOTS:
        raise PlanError(
            f"the fabric has {leaves * slot_stride} NIC slots ({leaves} leaves of {slot_stride}), "
            f"at most {MAX_SLOTS} have addresses",
            hint="spread the hosts evenly over the leaves",
        )
    parallel = Counter((cable.a, cable.b) for cable in cables)
    ports: list[Port] = []
    links: list[Link] = []
    ports_of: list[list[int]] = [[] for _ in nodes]
    for index, cable in enumerate(cables):
        a, b = 2 * index + 1, 2 * index + 2
        rate_bits_per_s, delay_ns = cable.link.rate_bits_per_s, cable.link.delay_ns
        for port_id, node, ifname, address, peer in (
            (a, cable.a, cable.a_ifname, cable.a_address, b),
            (b, cable.b, cable.b_ifname, cable.b_address, a),
        ):
            mac = port_mac(port_id, nodes[node].kind)
            ports.append(Port(port_id, node, ifname, mac, address, peer, index, rate_bits_per_s, delay_ns))
            ports_of[node].append(port_id)
        name = _link_name(nodes, cable, parallel[cable.a, cable.b])
        links.append(Link(index, name, a, b, rate_bits_per_s, delay_ns))
    return Topology(
        nodes=tuple(
            Node(index, node.name, node.kind, tuple(ports_of[index]), node.zone) for index, node in enumerate(nodes)
        ),
        ports=tuple(ports),
        links=tuple(links),
        slot_stride=slot_stride,
    )


def check_port_numbers(topology: Topology) -> None:
    """Raise PlanError if a fabric has more ports than can be emulated: a forwarded frame names two of them in its source MAC."""
    if len(topology.ports) > MAX_PORTS:
        raise PlanError(
            f"the fabric has {len(topology.ports)} ports, at most {MAX_PORTS} can be numbered",
            hint="use fewer hosts, leaves or spines",
        )


def build_host_cables(
    hosts: Sequence[int], leaf: int, first_slot: int, nics_per_host: int, link: LinkSpec
) -> list[CableSpec]:
    """Return the links between hosts and their leaf, host by host, NIC by NIC.

    Args:
        hosts: Indices of the hosts' nodes.
        leaf: Index of the leaf's node.
        first_slot: NIC slot of the first NIC; the others follow it.
        nics_per_host: NICs of each host.
        link: Rate and delay of every link.
    """
    return [
        CableSpec(host, f"eth{nic}", leaf, f"down{down}", *host_link_addresses(first_slot + down), link)
        for down, (host, nic) in enumerate((host, nic) for host in hosts for nic in range(nics_per_host))
    ]


def _link_name(nodes: Sequence[NodeSpec], cable: CableSpec, parallel: int) -> str:
    """Return the name of a link; of several between two nodes it says which port of the lower one it ends at."""
    lower, upper = nodes[cable.a].name, nodes[cable.b].name
    return f"{lower}:{upper}" if parallel == 1 else f"{lower}/{cable.a_ifname}:{upper}"


def host_link_addresses(slot: int) -> tuple[int, int]:
    """Return the addresses of a NIC slot's link as ``(host, leaf)``, as integers."""
    leaf = HOST_NETWORK + 2 * slot
    return leaf + 1, leaf


def uplink_addresses(uplink: int) -> tuple[int, int]:
    """Return the addresses of an uplink, counted over the fabric, as ``(leaf, spine)``, as integers."""
    leaf = UPLINK_NETWORK + 2 * uplink
    return leaf, leaf + 1


def port_mac(port_id: int, kind: NodeKind) -> str:
    """Return the MAC address of a port, ``02:00:PP:PP:00:00`` on hosts and ``02:00:PP:PP:ff:ff`` on switches.

    Beyond `MAX_PORTS` the second byte goes on counting, so that fabrics which are never built have addresses too.
    """
    mark = "00:00" if kind is NodeKind.HOST else "ff:ff"
    return f"02:{port_id >> 16:02x}:{port_id >> 8 & 0xFF:02x}:{port_id & 0xFF:02x}:{mark}"


def format_address(address: int) -> str:
    """Return an address as people write it, such as ``10.0.0.1``."""
    return str(ipaddress.IPv4Address(address))
