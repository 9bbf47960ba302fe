"""The tick of a carrier whose frames the kernel paces: pauses are obeyed, and what this machine did meanwhile is noted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from testbed.engine.data_queues import DataQueues
from testbed.engine.flow_control import FlowControl, NoFlowControl
from testbed.engine.observer import ExcessObserver
from testbed.fabric import Fabric
from testbed.kernel.layout import PRIORITIES
from testbed.kernel.probe_link import ProbeLink
from testbed.kernel.scheduling import MonotonicClock
from testbed.measure.samples import MachineSamples
from testbed.plan.model import UNSHARED_SHAPER_SPEEDUP, Plan
from testbed.roce.wire import CONTROL_PRIORITIES

_PROBE_TICKS = 8
# What the ports sent is looked at every so many ticks.
_LOOK_TICKS = 4
# Those whose frames leave by a port's shaped queue.
_SHAPED_PRIORITIES = [priority for priority in range(PRIORITIES) if not CONTROL_PRIORITIES >> priority & 1]


class FabricTicks:
    """Keeps a fabric's tick through one iteration after another.

    Args:
        fabric: The fabric.
        probe: The fidelity probe.
        clock: Source of time.
        flow: PFC on the fabric.
    """

    def __init__(
        self, fabric: Fabric, probe: ProbeLink, clock: MonotonicClock, flow: FlowControl | NoFlowControl
    ) -> None:
        self._tick_ns = fabric.plan.dilation.wall_tick_ns
        self._data = DataQueues(fabric.arrays.queues, np.zeros(0, np.int64), dict.fromkeys(_SHAPED_PRIORITIES, 1))
        self._blocked = np.zeros((len(fabric.plan.topology.ports) + 1, PRIORITIES), bool)
        self._excess = _excess_observer(fabric.plan)
        self._probe, self._clock, self._flow = probe, clock, flow
        self._lateness_ns: list[int] = []
        self._busy_ns: list[int] = []
        self._begin_ns = self._due_ns = 0
        self._paused_before_ns: npt.NDArray[np.float64] = np.zeros((1, 1))

    @property
    def count(self) -> int:
        """How many ticks of the iteration have ended."""
        return len(self._busy_ns)

    def restart(self) -> int:
        """Begin an iteration, of which nothing is noted yet; return the time."""
        self._probe.restart()
        self._flow.lateness_ns.clear()
        self._lateness_ns, self._busy_ns = [], []
        self._begin_ns = self._due_ns = self._clock.now_ns()
        self._excess.restart(self._begin_ns, self._sent_wire_bytes())
        self._paused_before_ns = self._flow.paused_until(self._begin_ns)
        return self._begin_ns

    def begin(self) -> int:
        """Begin a tick and let pauses be obeyed; return the time."""
        self._begin_ns = self._clock.now_ns()
        self._lateness_ns.append(max(0, self._begin_ns - self._due_ns))
        self._flow.tick(self._begin_ns)
        return self._begin_ns

    def end(self) -> None:
        """End the tick and wait for the next."""
        if self.count % _PROBE_TICKS == 0:
            self._probe.send(self._begin_ns)
        if self.count % _LOOK_TICKS == 0:
            self._excess.observe(self._clock.now_ns(), self._sent_wire_bytes())
        self._busy_ns.append(self._clock.now_ns() - self._begin_ns)
        self._due_ns = max(self._due_ns + self._tick_ns, self._begin_ns)
        self._clock.sleep_until_ns(self._due_ns)

    def wall_paused_ns(self, now_ns: int) -> npt.NDArray[np.float64]:
        """Return how long each port was paused in the iteration, shape ``(ports + 1,)``, the longest of its priorities."""
        paused: npt.NDArray[np.float64] = (self._flow.paused_until(now_ns) - self._paused_before_ns).max(axis=1)
        return paused

    def samples(self, wall_duration_ns: int, resolution_error_fraction: float) -> MachineSamples:
        """Return what was noted about the machine."""
        self._excess.observe(self._clock.now_ns(), self._sent_wire_bytes())
        return MachineSamples(
            wall_tick_ns=self._tick_ns,
            wall_lateness_ns=np.array(self._lateness_ns, np.int64),
            wall_busy_ns=np.array(self._busy_ns, np.int64),
            wall_probe_ns=np.array(self._probe.waits_ns(), np.int64),
            wall_duration_ns=wall_duration_ns,
            resolution_error_fraction=resolution_error_fraction,
            wall_excess_ns=self._excess.excess_ns,
            wall_gate_lateness_ns=np.array(self._flow.lateness_ns, np.int64),
        )

    def _sent_wire_bytes(self) -> npt.NDArray[np.int64]:
        return self._data.observe(self._blocked)[1]


def _excess_observer(plan: Plan) -> ExcessObserver:
    """Return one that allows every port the fastest shaper and the largest bucket that a port of a plan may have."""
    count = len(plan.topology.ports) + 1
    rate, allowance_ns = np.zeros(count), np.zeros(count)
    for port in plan.topology.ports:
        rate[port.id] = plan.wall_rate_bytes_per_s(port.rate_bits_per_s) * UNSHARED_SHAPER_SPEEDUP
        # A scheduler has a bucket for each of its classes.
        buckets = (1 + len(plan.queue_classes)) * plan.burst_bytes(port.id, shared=False)
        allowance_ns[port.id] = 1e9 * buckets / rate[port.id] + 2 * _LOOK_TICKS * plan.dilation.wall_tick_ns
    return ExcessObserver(rate, allowance_ns)
