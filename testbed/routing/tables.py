"""Forwarding tables: what the eBPF program, the path tracer and the load predictor all read.

A switch looks up the slot of the destination in its row of ``fib``, which names a group; the group's selector
picks one of its members, the egress port. Identical groups are stored once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag, StrEnum

import numpy as np
import numpy.typing as npt

from testbed.topology import Node, Topology

NO_GROUP = -1
"""Entry of ``fib`` where a node has no route to a slot."""


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


@dataclass(frozen=True, slots=True)
class Group:
    """A set of egress ports of one switch, and how to choose among them.

    Attributes:
        selector: How a member is chosen.
        hash_fields: The fields that the hash reads; the others count as 0.
        seed: Seed of the hash, 0 to 2**32 - 1.
        members: Egress port ids; a port of weight 2 stands twice.

    Raises:
        ValueError: If there are no members or the seed does not fit 32 bits.
    """

    selector: Selector
    hash_fields: HashField
    seed: int
    members: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a group needs at least one member")
        if not 0 <= self.seed <= 0xFFFF_FFFF:
            raise ValueError(f"a hash seed must lie in 0 to 2**32 - 1, got {self.seed}")


@dataclass(frozen=True, eq=False)
class ForwardingTables:
    """The tables of a whole fabric.

    Attributes:
        groups: All groups, each once.
        fib: Shape ``(nodes, slots)``, int32, read-only: index into ``groups`` of what node ``i`` does with
            packets for NIC slot ``j``, or ``NO_GROUP`` (on hosts' rows, and for empty slots).
    """

    groups: tuple[Group, ...]
    fib: npt.NDArray[np.int32]

    def __eq__(self, other: object) -> bool:
        """Return whether both hold the same groups in the same order and the same ``fib``."""
        if not isinstance(other, ForwardingTables):
            return NotImplemented
        return self.groups == other.groups and np.array_equal(self.fib, other.fib)

    __hash__ = None  # type: ignore[assignment]  # an array is inside

    def group_at(self, node: int, slot: int) -> Group | None:
        """Return the group that a node uses for a slot, or None where it has no route.

        Args:
            node: Node index.
            slot: NIC slot of the destination.
        """
        index = int(self.fib[node, slot])
        return None if index == NO_GROUP else self.groups[index]


class TablesBuilder:
    """Collects routes and stores each distinct group once, in order of first use.

    Example:
        >>> builder = TablesBuilder(topology)  # doctest: +SKIP
        >>> builder.route(leaf, slots, single_member(port_id))  # doctest: +SKIP
        >>> tables = builder.build()  # doctest: +SKIP
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._groups: dict[Group, int] = {}
        self._fib = np.full((len(topology.nodes), topology.slots), NO_GROUP, dtype=np.int32)

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
            if self._topology.port(port_id).node != node:
                raise ValueError(
                    f"{self._topology.port_name(port_id)} is not a port of {self._topology.nodes[node].name}"
                )
        if index is None:
            index = self._groups[group] = len(self._groups)
        self._fib[node, slot] = index

    def build(self) -> ForwardingTables:
        """Return the tables; routes that were replaced leave their groups behind."""
        fib = self._fib.copy()
        fib.setflags(write=False)
        return ForwardingTables(groups=tuple(self._groups), fib=fib)


def single_member(port_id: int) -> Group:
    """Return the group that sends everything to one port."""
    return Group(Selector.HASH, HashField(0), 0, (port_id,))


def route_downwards(builder: TablesBuilder, topology: Topology) -> None:
    """Add the routes that every scheme on a CLOS shares: there is one way down to each NIC.

    Leaves send the slots of their own hosts to those hosts, spines send the slots of each leaf to that leaf.
    Empty slots get no route.
    """
    for leaf in topology.leaves:
        for port in topology.down_ports(leaf):
            builder.route(leaf.index, topology.slot_of_port(port.id), single_member(port.id))
    for spine in topology.spines:
        for port in topology.down_ports(spine):
            group = single_member(port.id)
            for slot in filled_slots(topology, topology.peer_node(port.id)):
                builder.route(spine.index, slot, group)


def filled_slots(topology: Topology, leaf: Node) -> list[int]:
    """Return the slots of a leaf that hold a NIC, ascending."""
    return [topology.slot_of_port(port.id) for port in topology.down_ports(leaf)]
