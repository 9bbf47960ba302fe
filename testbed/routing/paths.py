"""Which way a flow goes, and what every port then carries, read from the forwarding tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from testbed.errors import PlanError
from testbed.routing.hashing import FlowKey, override_key, select_member
from testbed.routing.tables import ForwardingTables
from testbed.topology import HOST_NETWORK, NodeKind, Port, Topology, format_address

__all__ = ["Collision", "FlowKey", "Path", "find_collisions", "link_loads", "trace_path"]


@dataclass(frozen=True, slots=True)
class Path:
    """The way a flow takes from NIC to NIC.

    Attributes:
        ports: Egress port ids, the sending NIC's first: NIC, leaf uplink, spine downlink, leaf downlink.
        nodes: Indices of the nodes visited, both hosts included; one more than ``ports``.
        delay_ns: Propagation delay along the path, in ns: the sum over its links, without frame times.
    """

    ports: tuple[int, ...]
    nodes: tuple[int, ...]
    delay_ns: int

    def describe(self, topology: Topology) -> str:
        """Return the nodes' names, such as ``host0 > leaf0 > spine1 > leaf1 > host4``."""
        return " > ".join(topology.nodes[node].name for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Collision:
    """A switch port that more than one flow leaves by.

    Attributes:
        port: Egress port id.
        port_name: As people write it, such as ``leaf0/up1``.
        flows: Names of the flows, in the order given.
    """

    port: int
    port_name: str
    flows: tuple[str, ...]


def trace_path(topology: Topology, tables: ForwardingTables, src_port_id: int, flow: FlowKey) -> Path:
    """Return the path of a flow, deciding at each switch as the eBPF program does.

    Where a switch spreads the packets of a flow this is one path of several (see `testbed.routing.routes`), and under flowlet
    switching the path until the flow first pauses.

    Args:
        topology: The fabric.
        tables: Its forwarding tables.
        src_port_id: The sending NIC.
        flow: Header fields of the flow's packets.

    Raises:
        PlanError: If the destination is no NIC or the sending host itself, a switch has no route to it, or
            the tables loop.
        ValueError: If ``src_port_id`` is not a host's port.
    """
    port = topology.port(src_port_id)
    source = topology.nodes[port.node]
    if source.kind is not NodeKind.HOST:
        raise ValueError(f"{topology.port_name(src_port_id)} is not a host's port")
    destination = _nic_of_address(topology, flow.dst_address)
    if destination is None or destination.node == source.index:
        what = "no NIC has that address" if destination is None else "that is the sending host itself"
        raise PlanError(f"{source.name} cannot send to {format_address(flow.dst_address)}: {what}")
    slot = topology.slot_of_port(destination.id)
    ports = [port.id]
    nodes = [source.index]
    delay_ns = port.delay_ns
    while True:
        node = topology.peer_node(port.id)
        looped = node.index in nodes
        nodes.append(node.index)
        if node.kind is NodeKind.HOST:
            break
        where = f"{source.name} to {topology.nodes[destination.node].name}"
        if looped:
            names = " > ".join(topology.nodes[index].name for index in nodes)
            raise PlanError(f"the forwarding tables loop from {where}: {names}")
        group = tables.group_at(node.index, slot)
        if group is None:
            raise PlanError(f"{node.name} has no route from {where}")
        port = topology.port(tables.overrides.get(override_key(node.index, flow)) or select_member(group, flow))
        ports.append(port.id)
        delay_ns += port.delay_ns
    if node.index != destination.node:
        raise PlanError(f"the forwarding tables deliver packets from {where} to {node.name}")
    return Path(tuple(ports), tuple(nodes), delay_ns)


@overload
def link_loads(topology: Topology, paths: Iterable[Path], weights: None = None) -> npt.NDArray[np.int64]: ...


@overload
def link_loads(topology: Topology, paths: Iterable[Path], weights: Sequence[float]) -> npt.NDArray[np.float64]: ...


def link_loads(
    topology: Topology, paths: Iterable[Path], weights: Sequence[float] | None = None
) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
    """Return what every port sends: the number of flows, or the sum of their weights.

    Args:
        topology: The fabric.
        paths: The path of each flow.
        weights: One per path, in any unit (bytes, bits per second); None counts flows.

    Returns:
        Shape ``(ports + 1,)``, indexed by egress port id (index 0 is unused): int64 flows, or float64 in the
        unit of the weights.

    Raises:
        ValueError: If there are not as many weights as paths.
    """
    ports = [path.ports for path in paths]
    flat = np.fromiter((port for path in ports for port in path), dtype=np.intp)
    if weights is None:
        return np.bincount(flat, minlength=len(topology.ports) + 1).astype(np.int64)
    if len(weights) != len(ports):
        raise ValueError(f"{len(weights)} weights for {len(ports)} paths")
    per_entry = np.repeat(np.asarray(weights, dtype=np.float64), [len(path) for path in ports])
    return np.bincount(flat, weights=per_entry, minlength=len(topology.ports) + 1)


def find_collisions(topology: Topology, paths: Mapping[str, Path]) -> list[Collision]:
    """Return the switch ports by which more than one flow leaves, in order of their ids.

    Ports towards hosts are among them (an incast collides at its last hop); a host's own NIC is not.

    Args:
        topology: The fabric.
        paths: The path of each flow, by the flow's name.
    """
    flows: dict[int, list[str]] = {}
    for name, path in paths.items():
        for port_id in path.ports[1:]:
            flows.setdefault(port_id, []).append(name)
    return [
        Collision(port_id, topology.port_name(port_id), tuple(flows[port_id]))
        for port_id in sorted(flows)
        if len(flows[port_id]) > 1
    ]


def _nic_of_address(topology: Topology, address: int) -> Port | None:
    # The even address of a /31 is the leaf's.
    if not address & 1:
        return None
    return topology.slot_port((address - HOST_NETWORK) >> 1)
