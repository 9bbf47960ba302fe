"""The tick of a carrier whose frames the kernel paces: pauses are obeyed, and what this machine did meanwhile is noted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from testbed.engine.flow_control import FlowControl, NoFlowControl
from testbed.kernel.probe_link import ProbeLink
from testbed.kernel.scheduling import MonotonicClock
from testbed.measure.samples import MachineSamples

_PROBE_TICKS = 8


class FabricTicks:
    """Keeps a fabric's tick through one iteration after another.

    Args:
        wall_tick_ns: Length of a tick.
        probe: The fidelity probe.
        clock: Source of time.
        flow: PFC on the fabric.
    """

    def __init__(
        self, wall_tick_ns: int, probe: ProbeLink, clock: MonotonicClock, flow: FlowControl | NoFlowControl
    ) -> None:
        self._tick_ns = wall_tick_ns
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
        self._busy_ns.append(self._clock.now_ns() - self._begin_ns)
        self._due_ns = max(self._due_ns + self._tick_ns, self._begin_ns)
        self._clock.sleep_until_ns(self._due_ns)

    def wall_paused_ns(self, now_ns: int) -> npt.NDArray[np.float64]:
        """Return how long each port was paused in the iteration, shape ``(ports + 1,)``, the longest of its priorities."""
        paused: npt.NDArray[np.float64] = (self._flow.paused_until(now_ns) - self._paused_before_ns).max(axis=1)
        return paused

    def samples(self, wall_duration_ns: int, resolution_error_fraction: float) -> MachineSamples:
        """Return what was noted about the machine."""
        return MachineSamples(
            wall_tick_ns=self._tick_ns,
            wall_lateness_ns=np.array(self._lateness_ns, np.int64),
            wall_busy_ns=np.array(self._busy_ns, np.int64),
            wall_probe_ns=np.array(self._probe.waits_ns(), np.int64),
            wall_duration_ns=wall_duration_ns,
            resolution_error_fraction=resolution_error_fraction,
            wall_gate_lateness_ns=np.array(self._flow.lateness_ns, np.int64),
        )
