"""Looks at a deployed lab without taking it: what it is made of, and what its counters and queues say right now."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from testbed.errors import KernelError
from testbed.fabric.broken import read_broken
from testbed.fabric.fabric import open_arrays
from testbed.kernel import registry
from testbed.plan.fabric import build_topology
from testbed.plan.faults import describe_fault
from testbed.scenario import Scenario
from testbed.topology import Port, Topology, format_address


@dataclass(frozen=True, slots=True)
class LabNode:
    """A node of a lab and the network namespace it lives in."""

    name: str
    kind: str
    namespace: str


@dataclass(frozen=True, slots=True)
class LabLinkEnd:
    """One end of a link, as ``ip -n NAMESPACE addr show dev IFNAME`` shows it."""

    node: str
    ifname: str
    namespace: str
    address: str


@dataclass(frozen=True, slots=True)
class LabDirection:
    """What one end of a link sends; figures are None where the lab's eBPF maps are not there.

    Attributes:
        src: The port that sends.
        dst: The port at the other end.
        depth_bytes: In the port's queues now.
        peak_depth_bytes: Greatest depth of any of its queues since the last run began.
        bytes: Frame bytes without FCS that left its queues since the lab was built.
        packets: Frames that did.
        drops_packets: Frames dropped before its queues since the lab was built.
    """

    src: str
    dst: str
    depth_bytes: int | None = None
    peak_depth_bytes: int | None = None
    bytes: int | None = None
    packets: int | None = None
    drops_packets: int | None = None


@dataclass(frozen=True, slots=True)
class LabLink:
    """A link of a lab; rate and delay are emulated, ``wall_…`` is what its shapers do."""

    name: str
    ends: tuple[LabLinkEnd, LabLinkEnd]
    rate_bits_per_s: int
    wall_rate_bytes_per_s: float | None
    delay_ns: int
    directions: tuple[LabDirection, LabDirection]


@dataclass(frozen=True, slots=True)
class Lab:
    """A recorded lab.

    Attributes:
        name: Its name.
        scenario: Name of the scenario it was built from.
        ephemeral: Built by a run for itself.
        ready: False while it is being built, or when that was interrupted.
        pid: The process that built it.
        time_dilation: Wall time / emulated time; None until it is ready.
        nodes: Its nodes.
        links: Its links.
        broken: What is broken by hand, such as ``link_down leaf0:spine1``.
    """

    name: str
    scenario: str
    ephemeral: bool
    ready: bool
    pid: int
    time_dilation: float | None
    nodes: tuple[LabNode, ...]
    links: tuple[LabLink, ...]
    broken: tuple[str, ...] = ()


def read_lab(name: str) -> Lab:
    """Return a lab as it is now.

    Raises:
        LabError: There is no such lab.
        KernelError: Its eBPF maps exist but may not be read (no root).
    """
    state = registry.read_state(name)
    scenario = Scenario.model_validate(state.scenario)
    topology = build_topology(scenario)
    dilation = state.details.get("time_dilation")
    queues = _read_queues(state) if state.ready else None
    return Lab(
        name=state.name,
        scenario=scenario.name,
        ephemeral=state.ephemeral,
        ready=state.ready,
        pid=state.pid,
        time_dilation=dilation,
        nodes=tuple(LabNode(node.name, str(node.kind), state.namespaces[node.name]) for node in topology.nodes),
        links=tuple(
            LabLink(
                name=link.name,
                ends=(
                    _describe_end(topology, state, topology.port(link.a)),
                    _describe_end(topology, state, topology.port(link.b)),
                ),
                rate_bits_per_s=link.rate_bits_per_s,
                wall_rate_bytes_per_s=link.rate_bits_per_s / 8 / dilation if dilation else None,
                delay_ns=link.delay_ns,
                directions=(
                    _describe_direction(topology, queues, topology.port(link.a)),
                    _describe_direction(topology, queues, topology.port(link.b)),
                ),
            )
            for link in topology.links
        ),
        broken=tuple(describe_fault(fault) for fault in read_broken(state)),
    )


def _describe_end(topology: Topology, state: registry.LabState, port: Port) -> LabLinkEnd:
    node = topology.nodes[port.node].name
    return LabLinkEnd(node, port.ifname, state.namespaces[node], f"{format_address(port.address)}/31")


def _describe_direction(
    topology: Topology, queues: dict[str, npt.NDArray[np.int64]] | None, port: Port
) -> LabDirection:
    src, dst = topology.port_name(port.id), topology.port_name(port.peer)
    if queues is None:
        return LabDirection(src, dst)
    figures = {name: values[port.id] for name, values in queues.items()}
    return LabDirection(
        src,
        dst,
        depth_bytes=max(0, int((figures["enq_bytes"] - figures["deq_bytes"]).sum())),
        peak_depth_bytes=int(figures["peak_bytes"].max()),
        bytes=int(figures["deq_bytes"].sum()),
        packets=int(figures["deq_packets"].sum()),
        drops_packets=int(figures["drop_packets"].sum()),
    )


def _read_queues(state: registry.LabState) -> dict[str, npt.NDArray[np.int64]] | None:
    """Return copies of the queue counters, each of shape ``(ports + 1, 8)``, or None where the maps are gone."""
    try:
        arrays = open_arrays(state)
    except KernelError as error:
        if error.code == errno.ENOENT:  # the namespaces, and with them programs and maps, were removed by hand
            return None
        raise
    # What left before what entered: a depth is then never negative.
    names = ("deq_bytes", "deq_packets", "enq_bytes", "peak_bytes", "drop_packets")
    return {name: arrays.queues[name].astype(np.int64) for name in names}
