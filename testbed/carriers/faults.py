"""A plan's faults on a running fabric: the engine's timeline with the kernel's means."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from testbed.engine.faults import Faults, NoFaults, Watch
from testbed.engine.flow_control import FlowControl, NoFlowControl
from testbed.fabric import Fabric
from testbed.fabric.broken import broken_state, note_disturbed, note_undisturbed, read_broken, repair
from testbed.fabric.faults import StateWriter, state_writer
from testbed.plan.faults import FaultStep
from testbed.plan.model import Plan
from testbed.plan.victims import find_victims

# How long the progress of a fault's victims is judged: so many round trips, and so many ticks.
_WINDOW_ROUND_TRIPS, _WINDOW_TICKS = 4, 16


class FabricFaults:
    """The steps of a plan's timeline as effects on its fabric.

    Args:
        plan: The plan.
        writer: Writes states into the fabric.
        flow: Its flow control.
    """

    def __init__(self, plan: Plan, writer: StateWriter, flow: FlowControl | NoFlowControl) -> None:
        self._steps = plan.faults.steps
        self._writer = writer
        self._flow = flow
        self._now = self._steps[0]
        for step in self._steps:
            writer.prepare(step.tables)

    def apply(self, step: int, now_ns: int) -> None:
        """Make the fabric be as a step says."""
        before, self._now = self._now, self._steps[step]
        changed = self._writer.write(
            self._now.state, self._now.tables if self._now.tables is not before.tables else None
        )
        if changed:
            self._flow.set_rates(changed)
        if self._now.state.dead_ports != before.state.dead_ports:
            self._flow.set_dead(self._now.state.dead_ports, now_ns)


@contextlib.contextmanager
def fabric_faults(fabric: Fabric, flow: FlowControl | NoFlowControl, now_ns: int) -> Iterator[FabricFaults | None]:
    """Let a fabric be as its plan's iterations begin for the block, and as it was behind it; yield what makes the rest happen.

    Yields:
        None where nothing happens.

    Raises:
        KernelError: The kernel refused something.
    """
    plan, steps = fabric.plan, fabric.plan.faults.steps
    first = steps[0].state
    repair(fabric)
    own = broken_state(plan.scenario, plan.topology, read_broken(fabric.state))
    if len(steps) == 1 and first == own:
        flow.set_dead(first.dead_ports, now_ns)
        yield None
        return
    ports = sorted({port for state in (own, *(step.state for step in steps)) for port, _ in state.rates_bits_per_s})
    with state_writer(fabric, own, ports) as writer:
        before = writer.tables.read()
        note_disturbed(fabric, ports)
        try:
            changed = writer.write(first, steps[0].tables)
            if changed:
                flow.set_rates(changed)
            flow.set_dead(first.dead_ports, now_ns)
            yield FabricFaults(fabric.plan, writer, flow)
        finally:
            flow.set_rates(writer.write(own, None))
            flow.set_dead(frozenset(), now_ns)
            writer.tables.restore(before)
            note_undisturbed(fabric)


def workload_faults(fabric: Fabric, workload: int, effects: FabricFaults | None) -> Faults | NoFaults:
    """Return the faults of a workload's measured iterations.

    Args:
        fabric: The fabric.
        workload: Index of the workload.
        effects: What makes them happen.
    """
    plan = fabric.plan
    steps, dilation = plan.faults.steps, plan.dilation.value
    if effects is None or len(steps) == 1:
        return NoFaults()
    planned = plan.workloads[workload]
    watches = [
        Watch(round(one.incident.begin_ns * dilation), one.victims, np.array(sorted(one.incident.ports), np.int64))
        for one in find_victims(plan, workload)
    ]
    window_ns = max(
        _WINDOW_ROUND_TRIPS * 2 * int(planned.one_way_ns.max(initial=0) * dilation),
        _WINDOW_TICKS * plan.dilation.wall_tick_ns,
    )
    return Faults(
        [round(step.at_ns * dilation) for step in steps],
        [port_rates_of(plan, step) for step in steps],
        effects,
        watches=watches,
        lost_packets=fabric.arrays.queues["lost_packets"],
        wall_window_ns=window_ns,
    )


def port_rates_of(plan: Plan, step: FaultStep) -> npt.NDArray[np.float64]:
    """Return the wall rate of every port in a step, shape ``(ports + 1,)``, bytes per second."""
    rates = np.array([0.0, *(plan.wall_rate_bytes_per_s(port.rate_bits_per_s) for port in plan.topology.ports)])
    for port, rate in step.state.rates_bits_per_s:
        rates[port] = plan.wall_rate_bytes_per_s(rate)
    return rates
