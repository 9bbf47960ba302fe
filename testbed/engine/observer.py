"""What the engine notes about the machine while it runs: the raw material of the fidelity verdict."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# A queue holding less than this is between two frames, not backlogged.
_BACKLOG_FRAMES = 4
# Entering and leaving a backlog misjudges its length by up to a look at either end, so short ones are not judged.
_EPISODE_TICKS = 8


class ShapingObserver:
    """Whether every backlogged port sends at its rate: the time that the machine, not the fabric, cost.

    While a queue is never empty its port must send ``rate * time``. What is missing, as time at the port's rate, is lost
    for good (the link was the bottleneck), whatever the cause: a late timer, a starved CPU, a stuck qdisc.

    Args:
        wall_rate_bytes_per_s: Rate of each port, shape ``(ports,)``.
        frame_bytes: A full frame with its wire overhead.

    Attributes:
        lost_ns: Wall time lost by each port in finished backlogs, shape ``(ports,)``.
        backlogged_ns: Wall time each port was backlogged, shape ``(ports,)``.
    """

    def __init__(self, wall_rate_bytes_per_s: npt.NDArray[np.float64], frame_bytes: int) -> None:
        self._rate_per_ns = wall_rate_bytes_per_s / 1e9
        self._frame_bytes = frame_bytes
        ports = len(wall_rate_bytes_per_s)
        self._since_ns = np.zeros(ports)
        self._until_ns = np.zeros(ports)
        self._deq_at_start = np.zeros(ports)
        self._deq_at_end = np.zeros(ports)
        self._ticks = np.zeros(ports, np.int64)
        self.lost_ns = np.zeros(ports)
        self.backlogged_ns = np.zeros(ports)

    def restart(self) -> None:
        """Forget what was seen."""
        self._ticks[:] = 0
        self.lost_ns[:] = 0.0
        self.backlogged_ns[:] = 0.0

    def set_rates(self, wall_rate_bytes_per_s: npt.NDArray[np.float64]) -> None:
        """Let every port have another rate from now on, shape ``(ports,)``; backlogs of ports whose rate changes end here."""
        changed = (wall_rate_bytes_per_s / 1e9 != self._rate_per_ns) & (self._ticks > 0)
        if changed.any():
            self._finish(changed)
        self._rate_per_ns = wall_rate_bytes_per_s / 1e9

    def observe(
        self,
        now_ns: int,
        depth_bytes: npt.NDArray[np.int64],
        deq_wire_bytes: npt.NDArray[np.int64],
        blocked: npt.NDArray[np.bool_],
    ) -> None:
        """Take a tick's depth and bytes sent of every port; one that was paused (``blocked``) owes nothing."""
        busy = (depth_bytes > _BACKLOG_FRAMES * self._frame_bytes) & ~blocked
        running = self._ticks > 0
        ended = running & ~busy
        if ended.any():
            self._finish(ended)
        started = busy & ~running
        self._since_ns[started] = now_ns
        self._deq_at_start[started] = deq_wire_bytes[started]
        self._until_ns[busy] = now_ns
        self._deq_at_end[busy] = deq_wire_bytes[busy]
        self._ticks[busy] += 1

    def finish(self) -> None:
        """End all backlogs that still last."""
        self._finish(self._ticks > 0)

    def _finish(self, ended: npt.NDArray[np.bool_]) -> None:
        judged = ended & (self._ticks >= _EPISODE_TICKS)
        span_ns = self._until_ns - self._since_ns
        sent = self._deq_at_end - self._deq_at_start
        with np.errstate(divide="ignore", invalid="ignore"):
            lost = span_ns - sent / self._rate_per_ns
        self.lost_ns[judged] += np.maximum(0.0, lost[judged])
        self.backlogged_ns[judged] += span_ns[judged]
        self._ticks[ended] = 0


class ExcessObserver:
    """Whether a port sent more than its shaper lets through: then frames went past it, and no figure means anything.

    Every port's sending is poured into a bucket that leaks at its rate. What a shaper passes keeps it below what the shaper's own
    bucket held; what goes past the shaper piles up.

    Args:
        wall_rate_bytes_per_s: The fastest that each port's shaper may be, shape ``(ports,)``.
        wall_allowance_ns: What may pile up at each port, as time at that rate: its shaper's bucket and what two looks miss.
    """

    def __init__(
        self, wall_rate_bytes_per_s: npt.NDArray[np.float64], wall_allowance_ns: npt.NDArray[np.float64]
    ) -> None:
        self._rate_per_ns = wall_rate_bytes_per_s / 1e9
        self._allowance_ns = wall_allowance_ns
        self._level_ns = np.zeros(len(wall_rate_bytes_per_s))
        self._highest_ns = np.zeros(len(wall_rate_bytes_per_s))
        self._last_ns = 0
        self._sent = np.zeros(len(wall_rate_bytes_per_s), np.int64)

    def restart(self, now_ns: int, sent_wire_bytes: npt.NDArray[np.int64]) -> None:
        """Forget what was seen; nothing has been poured."""
        self._level_ns[:] = self._highest_ns[:] = 0.0
        self._last_ns, self._sent = now_ns, sent_wire_bytes

    def observe(self, now_ns: int, sent_wire_bytes: npt.NDArray[np.int64]) -> None:
        """Take what each port has sent so far, shape ``(ports,)``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            poured = np.where(self._rate_per_ns > 0, (sent_wire_bytes - self._sent) / self._rate_per_ns, 0.0)
        self._level_ns = np.maximum(0.0, self._level_ns + poured - (now_ns - self._last_ns))
        np.maximum(self._highest_ns, self._level_ns, out=self._highest_ns)
        self._last_ns, self._sent = now_ns, sent_wire_bytes

    @property
    def excess_ns(self) -> float:
        """What the worst port sent beyond its rate and its allowance, as wall time at its rate."""
        return float(np.maximum(0.0, self._highest_ns - self._allowance_ns).max(initial=0.0))
