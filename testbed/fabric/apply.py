"""Executes a plan's operations, batched by namespace: each node's netlink requests travel together."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from testbed.errors import TestbedError
from testbed.kernel import links, queues, rps, tc
from testbed.kernel.namespaces import create_namespace, entered
from testbed.kernel.netlink import Message, RouteSocket
from testbed.plan.operations import (
    AddAddress,
    AddRoute,
    AddRule,
    AttachPrograms,
    CreateLink,
    CreateNamespace,
    Operation,
    ShapePort,
)

# The interface index of port id 0 in every namespace of a lab; high enough to stay clear of lo and what a user adds.
IFINDEX_BASE = 1000


def ifindex_of(port: int) -> int:
    """Return the interface index of a port id."""
    return IFINDEX_BASE + port


@contextlib.contextmanager
def _opened(descriptors: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def apply_operations(
    operations: Sequence[Operation],
    *,
    mark: str,
    cpu_of_node: Callable[[int], int],
    programs: dict[str, int],
) -> None:
    """Build namespaces, links, qdiscs, addresses, routes and programs.

    Args:
        operations: A plan's operations for one lab.
        mark: Proof of ownership of its namespaces.
        cpu_of_node: The CPU that serves a node's ports.
        programs: File descriptors of the loaded eBPF programs.

    Raises:
        KernelError: The kernel refused something; what exists by then is recorded and marked.
        LabError: A namespace of that name exists.
    """
    descriptors: list[int] = []
    sockets: list[RouteSocket] = []
    default_mask = rps.has_default_mask()
    ports: dict[int, list[str]] = defaultdict(list)
    hosts: dict[int, list[str]] = defaultdict(list)
    requests: dict[int, list[Message]] = defaultdict(list)
    veths: dict[int, list[Message]] = defaultdict(list)
    try:
        with _opened(descriptors):
            for operation in operations:
                if isinstance(operation, CreateNamespace):
                    cpu = cpu_of_node(operation.node)
                    descriptors.append(create_namespace(operation.name, mark, _sysctls(operation, cpu, default_mask)))
                    with entered(descriptors[-1]):
                        sockets.append(RouteSocket())
                elif isinstance(operation, CreateLink):
                    a, b = operation.a, operation.b
                    veths[a.node].append(
                        links.create_veth(
                            ifname=a.ifname,
                            index=ifindex_of(a.port),
                            mac=a.mac,
                            mtu=operation.mtu,
                            peer_ifname=b.ifname,
                            peer_index=ifindex_of(b.port),
                            peer_mac=b.mac,
                            peer_netns_fd=descriptors[b.node],
                        )
                    )
                else:
                    requests[operation.node].extend(_messages(operation, programs))
                    if isinstance(operation, AttachPrograms):
                        ports[operation.node].append(operation.ifname)
                        if operation.host:
                            hosts[operation.node].append(operation.ifname)
            for node, messages in veths.items():
                sockets[node].request(messages)
            for node, ifnames in hosts.items():
                with entered(descriptors[node]):
                    for ifname in ifnames:
                        links.disable_offloads(ifname)
            if not default_mask:
                for node, ifnames in ports.items():
                    rps.steer_ports(descriptors[node], ifnames, cpu_of_node(node))
            # All links first, all else after: a route needs its next hop's link up at both ends.
            for node, messages in requests.items():
                sockets[node].request(messages)
    finally:
        for opened in sockets:
            opened.close()


def egress_of(operation: ShapePort) -> queues.Egress:
    """Return a port's egress as the kernel's modules take it."""
    marks = operation.marking
    return queues.Egress(
        ifindex_of(operation.port),
        operation.ifname,
        operation.wall_rate_bytes_per_s,
        operation.burst_bytes,
        operation.frame_wire_bytes,
        operation.overhead_bytes,
        [(one.priority, one.weight) for one in operation.classes],
        operation.rest,
        operation.gate,
        None if marks is None else queues.Thresholds(marks.kmin_bytes, marks.kmax_bytes, marks.pmax),
        operation.scheduler,
        operation.wall_delay_ns,
    )


def _sysctls(operation: CreateNamespace, cpu: int, default_mask: bool) -> dict[str, str]:
    values = {"?net/ipv6/conf/all/disable_ipv6": "1", "?net/ipv6/conf/default/disable_ipv6": "1"}
    if operation.forwards:
        values["net/ipv4/ip_forward"] = "1"
        values["net/ipv4/conf/all/rp_filter"] = "0"
    if default_mask:
        values[rps.SYSCTL] = rps.cpu_mask(cpu)
    return values


def _messages(operation: Operation, programs: dict[str, int]) -> list[Message]:
    """Return the netlink requests of an operation on one node."""
    if isinstance(operation, ShapePort):
        return queues.create_egress(egress_of(operation))
    if isinstance(operation, AttachPrograms):
        index, ifname = ifindex_of(operation.port), operation.ifname
        name = "host_ingress" if operation.host else "switch_ingress"
        messages = [
            tc.create_clsact(index, ifname),
            tc.attach_filter(index, ifname, tc.TC_H_INGRESS_HOOK, programs[name], name),
        ]
        if operation.host:
            messages.append(
                tc.attach_filter(index, ifname, tc.TC_H_EGRESS_HOOK, programs["host_egress"], "host_egress")
            )
        return [*messages, links.set_link_up(index, ifname)]
    if isinstance(operation, AddAddress):
        index = ifindex_of(operation.port)
        return [
            links.create_address(index, operation.address, operation.prefix_len),
            links.create_neighbour(index, operation.peer_address, operation.peer_mac),
        ]
    if isinstance(operation, AddRoute):
        hops = [(gateway, ifindex_of(port)) for gateway, port in operation.next_hops]
        return [links.create_route(operation.prefix, operation.prefix_len, hops, operation.table)]
    if isinstance(operation, AddRule):
        return [links.create_rule(operation.source, operation.table)]
    raise TestbedError(f"no way to execute {operation}")
