"""PFC on a running fabric: the engine's flow control with the kernel's gates and sockets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from testbed.engine.flow_control import FlowControl, NoFlowControl, PausableLink, WatchdogSetup
from testbed.fabric import Fabric, egress_of
from testbed.kernel.gate import GatedQueue, PauseSender, QueueGates, bypass_sockets
from testbed.kernel.links import mac_bytes
from testbed.kernel.namespaces import open_namespace
from testbed.kernel.queues import GATES
from testbed.plan.model import Plan
from testbed.plan.operations import ShapePort
from testbed.plan.qos import quanta_ns
from testbed.scenario import WatchdogAction
from testbed.topology import NodeKind


@contextlib.contextmanager
def flow_control(fabric: Fabric, now_ns: int) -> Iterator[FlowControl | NoFlowControl]:
    """Run PFC on a fabric for the block: all gates are open when it begins and when it ends.

    Raises:
        KernelError: The kernel refused a socket or a gate.
    """
    plan = fabric.plan
    if not plan.pausing:
        yield NoFlowControl(len(plan.topology.ports) + 1)
        return
    topology = plan.topology
    with contextlib.ExitStack() as stack:
        netns: dict[int, int] = {}
        for node in topology.nodes:
            netns[node.index] = open_namespace(fabric.namespace_of(node.name))
            stack.callback(os.close, netns[node.index])
        switch_ports = [port for port in topology.ports if topology.nodes[port.node].kind is not NodeKind.HOST]
        sockets = stack.enter_context(
            bypass_sockets([(port.id, port.ifname, netns[port.node]) for port in switch_ports])
        )
        gates = QueueGates(gated_queues(fabric, netns), sockets, GATES[fabric.back_ends.gate])
        stack.callback(gates.close)
        macs = {port.id: mac_bytes(port.mac) for port in switch_ports}
        flow = FlowControl(
            pausable_links(plan, fabric.back_ends.gate),
            queues=fabric.arrays.queues,
            ingress=fabric.arrays.ingress,
            gates=gates,
            sender=PauseSender(sockets, macs),
            wall_tick_ns=plan.dilation.wall_tick_ns,
            watchdog=_watchdog(plan),
        )
        flow.open_all(now_ns)
        try:
            yield flow
        finally:
            flow.open_all(now_ns)


def gated_queues(fabric: Fabric, netns: Mapping[int, int]) -> list[GatedQueue]:
    """Return every queue that a switch can pause.

    Args:
        fabric: The fabric.
        netns: Descriptor of each node's namespace.
    """
    plan = fabric.plan
    operations = plan.operations(
        [""] * len(plan.topology.nodes), any_workload=fabric.any_workload, back_ends=fabric.back_ends
    )
    shapers = {operation.port: operation for operation in operations if isinstance(operation, ShapePort)}
    queues = []
    for receiver, thresholds in plan.pausing.items():
        sender = plan.topology.port(plan.topology.port(receiver).peer)
        egress = egress_of(shapers[sender.id])
        queues += [
            GatedQueue(sender.id, receiver, netns[sender.node], egress.queue(priority))
            for priority in thresholds.priorities
        ]
    return queues


def pausable_links(plan: Plan, gate: str) -> list[PausableLink]:
    """Return the directions of links whose receiving end is a switch port with PFC, one for each priority.

    Args:
        plan: The plan.
        gate: What the gates are: a plug does not fill a bucket while it is closed.
    """
    links = []
    for receiver, thresholds in plan.pausing.items():
        port = plan.topology.port(receiver)
        sender = plan.topology.port(port.peer)
        rate = plan.wall_rate_bytes_per_s(sender.rate_bits_per_s)
        # The engine paces a NIC after a pause; a switch's bucket lets go at once what it holds.
        is_nic = plan.topology.nodes[sender.node].kind is NodeKind.HOST
        refill_ns = 0 if is_nic or gate == "plug" else round(1e9 * plan.burst_bytes(sender.id, shared=True) / rate)
        links += [
            PausableLink(
                sender=sender.id,
                receiver=receiver,
                priority=priority,
                wall_delay_ns=round(thresholds.delay_ns * plan.dilation.value),
                wall_quantum_ns=quanta_ns(1, port.rate_bits_per_s) * plan.dilation.value,
                wall_refill_ns=refill_ns,
            )
            for priority in thresholds.priorities
        ]
    return links


def _watchdog(plan: Plan) -> WatchdogSetup | None:
    watchdog = plan.scenario.qos.pfc.watchdog
    if not watchdog.enabled:
        return None
    dilation = plan.dilation.value
    return WatchdogSetup(
        round(watchdog.detect_ns * dilation),
        round(watchdog.restore_ns * dilation),
        watchdog.action is WatchdogAction.DROP,
    )
