"""Forwarding tables: what the eBPF program, the path tracer and the load predictor all read.

A switch looks up the slot of the destination in its row of ``fib``, which names a group; the group's selector
picks one of its members, the egress port. Identical groups are stored once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntFlag, StrEnum
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from testbed.routing.links import ALL_UP, LinkState
from testbed.topology import Node, NodeKind, Topology

NO_GROUP = -1
"""Entry of ``fib`` where a node has no route to a slot."""

UNREACHABLE = -2
"""Entry of ``fib`` where a node has lost every way to a slot: it drops the packets."""


class HashField(IntFlag):
    """A header field that a hash may read; the bits stand in the eBPF map as they are here."""

    SRC_ADDRESS = 1
    DST_ADDRESS = 2
    PROTOCOL = 4
    SRC_PORT = 8
    DST_PORT = 16
    DST_QP = 32
    FIVE_TUPLE = SRC_ADDRESS | DST_ADDRESS | PROTOCOL | SRC_PORT | DST_PORT


class Selector(StrEnum):
    """How a group picks the member a packet takes."""

    HASH = "hash"
    """By the flow's hash: a flow keeps its path."""
    ROUND_ROBIN = "round_robin"
    """Packet by packet, in turn."""
    RANDOM = "random"
    """Packet by packet, at random."""
    LEAST_DEPTH = "least_depth"
    """Packet by packet, to the live port with the shortest queue for its weight; equals in turn."""
    FLOWLET = "flowlet"
    """By the flow's hash, and anew after every pause of the flow that is longer than the gap."""

    @property
    def is_per_packet(self) -> bool:
        """Whether packets of one flow may take different members one after the other."""
        return self in (Selector.ROUND_ROBIN, Selector.RANDOM, Selector.LEAST_DEPTH)


class HashFunction(StrEnum):
    """What a switch hashes the fields with; each is in ``bpf/selectors.h`` and `testbed.routing.hashing`."""

    MURMUR3 = "murmur3"
    """MurmurHash3's finaliser, word after word: not linear, so another seed is another hash."""
    CRC32 = "crc32"
    """CRC-32 of IEEE 802.3. Linear, as CRCs are: another seed XORs one constant to all hashes."""
    CRC16 = "crc16"
    """CRC-16 of ITU-T V.41. Linear likewise, with another polynomial."""


MAX_CHOICES = 64
"""Queues that the switch program compares for a packet (``TB_MAX_CHOICES`` in bpf/fabric.h)."""


@dataclass(frozen=True, slots=True)
class Group:
    """A set of egress ports of one switch, and how to choose among them.

    Attributes:
        selector: How a member is chosen.
        hash_fields: The fields that the hash reads; the others count as 0.
        seed: Seed of the hash, 0 to 2**32 - 1.
        members: Egress port ids; a port of weight 2 stands twice.
        gap_ns: Pause after which a flow may change its member, emulated ns; for `Selector.FLOWLET` alone.
        hash_function: What the fields are hashed with.

    Raises:
        ValueError: If there are no members, the seed does not fit 32 bits, or the gap does not suit the selector.
    """

    selector: Selector
    hash_fields: HashField
    seed: int
    members: tuple[int, ...]
    gap_ns: int = 0
    hash_function: HashFunction = HashFunction.MURMUR3

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a group needs at least one member")
        if not 0 <= self.seed <= 0xFFFF_FFFF:
            raise ValueError(f"a hash seed must lie in 0 to 2**32 - 1, got {self.seed}")
        if (self.gap_ns > 0) != (self.selector is Selector.FLOWLET):
            raise ValueError(f"a gap belongs to the selector {Selector.FLOWLET}, and must be above 0 there")

    def weights(self) -> dict[int, int]:
        """Return how often each port stands among the members, by port id, in order of first appearance."""
        counts: dict[int, int] = {}
        for port in self.members:
            counts[port] = counts.get(port, 0) + 1
        return counts

    def choices(self) -> tuple[tuple[int, int], ...]:
        """Return what `Selector.LEAST_DEPTH` compares, ports and weights: each as often as it weighs, scaled to `MAX_CHOICES`.

        The comparison begins at another one every time and keeps the first of equals, as empty queues are: without repeats
        equals would share alike whatever they can carry.
        """
        weights = self.weights()
        if len(weights) == 1 or len(weights) > MAX_CHOICES:
            return tuple(weights.items())
        if len(self.members) <= MAX_CHOICES:
            return tuple((port, weights[port]) for port in self.members)
        times = {port: max(1, weight * MAX_CHOICES // len(self.members)) for port, weight in weights.items()}
        while sum(times.values()) > MAX_CHOICES:  # light ones that stand once all the same
            times[max(times, key=times.__getitem__)] -= 1
        return tuple((port, weight) for port, weight in weights.items() for _ in range(times[port]))


class OverrideKey(NamedTuple):
    """What an exact-match entry matches.

    Attributes:
        node: Index of the switch.
        src_address: IPv4 source address.
        dst_address: IPv4 destination address.
        flow: Destination QP of RoCEv2 packets, the source port of other UDP and of TCP, else 0.
    """

    node: int
    src_address: int
    dst_address: int
    flow: int


_NO_OVERRIDES: Mapping[OverrideKey, int] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class ForwardingTables:
    """The tables of a whole fabric.

    Attributes:
        groups: All groups, each once.
        fib: Shape ``(nodes, slots)``, int32, read-only: index into ``groups`` of what node ``i`` does with
            packets for NIC slot ``j``, or ``NO_GROUP`` (on hosts' rows, and for empty slots), or ``UNREACHABLE``.
        overrides: Egress port id of the flows that an exact-match entry takes away from their group.
    """

    groups: tuple[Group, ...]
    fib: npt.NDArray[np.int32]
    overrides: Mapping[OverrideKey, int] = field(default_factory=lambda: _NO_OVERRIDES)

    def __eq__(self, other: object) -> bool:
        """Return whether both hold the same groups in the same order, the same ``fib`` and the same overrides."""
        if not isinstance(other, ForwardingTables):
            return NotImplemented
        same = self.groups == other.groups and dict(self.overrides) == dict(other.overrides)
        return same and np.array_equal(self.fib, other.fib)

    __hash__ = None  # type: ignore[assignment]  # an array is inside

    def group_at(self, node: int, slot: int) -> Group | None:
        """Return the group that a node uses for a slot, or None where it has no route.

        Args:
            node: Node index.
            slot: NIC slot of the destination.
        """
        index = int(self.fib[node, slot])
        return None if index < 0 else self.groups[index]


class TablesBuilder:
    """Collects routes and stores each distinct group once, in order of first use.

    Args:
        topology: The fabric.
        begin_with: Tables to add to; None for none.

    Example:
        >>> builder = TablesBuilder(topology)  # doctest: +SKIP
        >>> builder.route(leaf, slots, single_member(port_id))  # doctest: +SKIP
        >>> tables = builder.build()  # doctest: +SKIP
    """

    def __init__(self, topology: Topology, begin_with: ForwardingTables | None = None) -> None:
        self._topology = topology
        self._groups: dict[Group, int] = {}
        self._fib = np.full((len(topology.nodes), topology.slots), NO_GROUP, dtype=np.int32)
        self._overrides: dict[OverrideKey, int] = {}
        if begin_with is not None:
            self._groups = {group: index for index, group in enumerate(begin_with.groups)}
            self._fib = begin_with.fib.copy()
            self._overrides = dict(begin_with.overrides)

    def route(self, node: int, slot: int, group: Group) -> None:
        """Let a switch use a group for a slot, in place of what it used before.

        Args:
            node: Index of the switch.
            slot: NIC slot of the destination.
            group: What to do; its members must be ports of the switch.

        Raises:
            ValueError: If a member is not a port of the node.
        """
        index = self._groups.get(group)
        # A group's members all belong to one node, so a known group needs a look at one member only.
        members = group.members if index is None else group.members[:1]
        for port_id in members:
            self._check_owner(node, port_id)
        if index is None:
            index = self._groups[group] = len(self._groups)
        self._fib[node, slot] = index

    def route_slots(self, node: int, slots: npt.NDArray[np.intp], group: Group) -> None:
        """Let a switch use a group for several slots; as `route`."""
        if len(slots):
            self.route(node, int(slots[0]), group)
            self._fib[node, slots] = self._groups[group]

    def drop(self, node: int, slot: int) -> None:
        """Let a switch drop what is for a slot: it has no way there any more."""
        self._fib[node, slot] = UNREACHABLE

    def override(self, key: OverrideKey, port_id: int) -> None:
        """Let a switch send one flow to a port, whatever the flow's group says.

        Raises:
            ValueError: If the port is not one of the switch's.
        """
        self._check_owner(key.node, port_id)
        self._overrides[key] = port_id

    def build(self) -> ForwardingTables:
        """Return the tables; routes that were replaced leave their groups behind."""
        fib = self._fib.copy()
        fib.setflags(write=False)
        overrides = MappingProxyType(dict(self._overrides))
        return ForwardingTables(groups=tuple(self._groups), fib=fib, overrides=overrides)

    def _check_owner(self, node: int, port_id: int) -> None:
        if self._topology.port(port_id).node != node:
            raise ValueError(f"{self._topology.port_name(port_id)} is not a port of {self._topology.nodes[node].name}")


def single_member(port_id: int) -> Group:
    """Return the group that sends everything to one port."""
    return Group(Selector.HASH, HashField(0), 0, (port_id,))


def route_downwards(builder: TablesBuilder, topology: Topology) -> None:
    """Add the routes that every scheme on a CLOS shares: there is one way down to each NIC of a zone.

    Leaves send the slots of their own hosts to those hosts, spines send the slots of each leaf of their zone to that leaf.
    Empty slots get no route.
    """
    for leaf in topology.leaves:
        for port in topology.down_ports(leaf):
            builder.route(leaf.index, topology.slot_of_port(port.id), single_member(port.id))
    slots = {leaf.index: np.array(filled_slots(topology, leaf), np.intp) for leaf in topology.leaves}
    for spine in topology.spines:
        for port in topology.down_ports(spine):
            builder.route_slots(spine.index, slots[topology.peer_node(port.id).index], single_member(port.id))


def route_upwards(
    builder: TablesBuilder,
    topology: Topology,
    group_of: Callable[[Node, Node], Group | None],
    links: LinkState = ALL_UP,
) -> None:
    """Let every switch use one group for all hosts of each leaf that it is not joined to.

    Between zones that is done three times: at the leaf, at the spine, for the superspines, and at the superspine, for the spines
    of the other zone.

    Args:
        builder: Where to add the routes.
        topology: The fabric.
        group_of: The group of a switch for a leaf; None leaves that without a route. Asked once for leaves that are alike: of
            one zone, with uplinks of the same capacities to the same spines. Not asked in a fabric of one leaf.
        links: What the capacity of links is.
    """
    alike: dict[tuple[object, ...], list[Node]] = {}
    for leaf in topology.leaves:
        ups = (
            (topology.port(up.peer).node, links.rate_bits_per_s(topology.port(up.peer)))
            for up in topology.uplinks(leaf)
        )
        alike.setdefault((leaf.zone, *ups), []).append(leaf)
    slots_of = {leaf.index: filled_slots(topology, leaf) for leaf in topology.leaves}
    classes = [
        (leaves, np.array([slot for leaf in leaves for slot in slots_of[leaf.index]], np.intp))
        for leaves in alike.values()
    ]
    for switch in (*topology.leaves, *topology.spines, *topology.superspines):
        for leaves, slots in classes:
            if switch.kind is NodeKind.SPINE and switch.zone == leaves[0].zone:
                continue  # joined to it
            other = next((leaf for leaf in leaves if leaf is not switch), None)
            group = group_of(switch, other) if other is not None else None
            if group is not None:
                own = slots_of.get(switch.index, ())
                builder.route_slots(switch.index, slots[~np.isin(slots, own)] if switch in leaves else slots, group)


def weighted_uplinks(topology: Topology, switch: Node, other: Node, links: LinkState = ALL_UP) -> tuple[int, ...]:
    """Return the ports by which a switch may reach a leaf, as members of a group, each as often as its path has capacity.

    They are a leaf's or spine's uplinks, and a superspine's ports to the spines of the leaf's zone. The capacity of a path is
    that of its slowest link; beyond the first, links between zones are taken for all of those that share the load. Paths that are
    all alike stand once each; the weights of others are their capacities over the greatest common divisor, see `small_weights`.
    Links whose capacity has changed count with what ``links`` says; those that are down stand there as the others do.
    """
    # What a spine of the leaf's zone can send it.
    downward = {
        topology.peer_node(up.id).index: links.rate_bits_per_s(topology.port(up.peer)) for up in topology.uplinks(other)
    }
    capacity: dict[int, int] = {}
    if switch.kind is NodeKind.SUPERSPINE or switch.zone == other.zone:
        ports = topology.down_ports(switch) if switch.kind is NodeKind.SUPERSPINE else topology.uplinks(switch)
        for port in ports:
            behind = downward.get(topology.peer_node(port.id).index)
            if behind is not None:
                capacity[port.id] = min(links.rate_bits_per_s(port), behind)
    else:
        for port in topology.uplinks(switch):
            further = topology.uplinks(topology.peer_node(port.id))
            beyond = sum(links.rate_bits_per_s(one) for one in further)
            capacity[port.id] = min(links.rate_bits_per_s(port), beyond) if further else links.rate_bits_per_s(port)
    weights = small_weights(list(capacity.values()))
    return tuple(port for port, weight in zip(capacity, weights, strict=True) for _ in range(weight))


_MAX_WEIGHT = 64


def small_weights(capacities: list[int]) -> list[int]:
    """Return small integers in the proportion of capacities, exact where that needs none above 64, else within 1/64."""
    if not capacities:
        return []
    divisor = math.gcd(*capacities)
    exact = [capacity // divisor for capacity in capacities]
    if max(exact) <= _MAX_WEIGHT:
        return exact
    return [max(1, round(_MAX_WEIGHT * capacity / max(capacities))) for capacity in capacities]


def filled_slots(topology: Topology, leaf: Node) -> list[int]:
    """Return the slots of a leaf that hold a NIC, ascending."""
    return [topology.slot_of_port(port.id) for port in topology.down_ports(leaf)]
