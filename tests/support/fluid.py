"""A fluid model of QPs that share one bottleneck queue: what a congestion control is tried on without a fabric.

Senders send at the rates that the algorithm under test gives them; the queue marks on enqueue, as a switch does; a
responder sends at most one CNP per QP and interval; it arrives after the queueing delay that the marked packet saw, and the
path's. Packets exist only as a number: a step's chance of a mark is that of at least one in that many packets. No
pauses, no losses: the queue is as deep as it gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.roce.congestion import Feedback, make

PACKET_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Ecn:
    """Marking thresholds of the bottleneck queue."""

    kmin_bytes: float
    kmax_bytes: float
    pmax: float

    def probability(self, depth_bytes: float) -> float:
        if depth_bytes <= self.kmin_bytes:
            return 0.0
        if depth_bytes > self.kmax_bytes:
            return 1.0
        return self.pmax * (depth_bytes - self.kmin_bytes) / (self.kmax_bytes - self.kmin_bytes)


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened, a row per step.

    Attributes:
        step_ns: Length of a step.
        line_rate: Bytes per second of senders and bottleneck.
        depth_bytes: Queue at the end of each step, shape ``(steps,)``.
        delivered_bytes: What left the queue in each step, shape ``(steps,)``.
        rates: Bytes per second that each QP sends, 0 before its start, shape ``(steps, qps)``.
        cnps: CNPs that arrived at each QP's sender, shape ``(steps, qps)``.
    """

    step_ns: float
    line_rate: float
    depth_bytes: npt.NDArray[np.float64]
    delivered_bytes: npt.NDArray[np.float64]
    rates: npt.NDArray[np.float64]
    cnps: npt.NDArray[np.int64]

    def _steps(self, start_ms: float, end_ms: float) -> slice:
        return slice(round(start_ms * 1e6 / self.step_ns), round(end_ms * 1e6 / self.step_ns))

    def throughput(self, start_ms: float, end_ms: float) -> float:
        """Return what the bottleneck delivered, as a fraction of its rate."""
        part = self.delivered_bytes[self._steps(start_ms, end_ms)]
        return float(part.sum() / (len(part) * self.step_ns * 1e-9 * self.line_rate))

    def jain(self, start_ms: float, end_ms: float) -> float:
        """Return Jain's index of what the QPs sent."""
        sent = self.rates[self._steps(start_ms, end_ms)].sum(axis=0)
        return float(sent.sum() ** 2 / (len(sent) * (sent**2).sum()))

    def depth(self, percentile: float, start_ms: float, end_ms: float) -> float:
        """Return a percentile of the queue's depth in bytes."""
        return float(np.percentile(self.depth_bytes[self._steps(start_ms, end_ms)], percentile))


def simulate(
    name: str,
    parameters: Mapping[str, Any],
    *,
    qps: int,
    ecn: Ecn,
    cnp_interval_ns: float,
    line_rate: float = 50e9,
    duration_ms: float = 40.0,
    stagger_ms: float = 1.0,
    path_rtt_ns: float = 6_000.0,
    step_ns: float = 1_000.0,
    seed: int = 1,
) -> Trace:
    """Run QPs that start one after the other against each other.

    Args:
        name: The algorithm.
        parameters: Its parameters.
        qps: Number of senders, each with a link of its own.
        ecn: The bottleneck's marking.
        cnp_interval_ns: At most one CNP per QP in it.
        line_rate: Bytes per second of each sender's link and of the bottleneck.
        duration_ms: For how long.
        stagger_ms: Time between two starts.
        path_rtt_ns: Round trip without queueing.
        step_ns: Length of a step, which is also how often the algorithm is told.
        seed: Of the marks.
    """
    rng = np.random.default_rng(seed)
    control = make(name, parameters, np.full(qps, line_rate))
    steps = round(duration_ms * 1e6 / step_ns)
    started_at = np.arange(qps) * stagger_ms * 1e6
    arriving = np.zeros((steps, qps), np.int64)
    trace = Trace(step_ns, line_rate, np.zeros(steps), np.zeros(steps), np.zeros((steps, qps)), arriving)
    depth = 0.0
    owed = np.zeros(qps)
    last_cnp_ns = np.full(qps, -np.inf)
    rtt_samples = np.full((steps + 1, qps), np.nan)
    none = np.zeros(qps, np.int64)
    control.restart(0.0)
    for step in range(steps):
        now = step * step_ns
        active = started_at <= now
        rate = np.where(active, control.rate_bytes_per_s, 0.0)
        trace.rates[step] = rate
        offered = rate * step_ns * 1e-9
        served = min(depth + offered.sum(), line_rate * step_ns * 1e-9)
        depth += offered.sum() - served
        trace.depth_bytes[step], trace.delivered_bytes[step] = depth, served
        queueing_ns = depth / line_rate * 1e9
        back = step + round((queueing_ns + path_rtt_ns) / step_ns)
        chance = 1 - (1 - ecn.probability(depth)) ** (offered / PACKET_BYTES)
        marked = rng.random(qps) < chance
        received_ns = now + queueing_ns + path_rtt_ns / 2
        answered = marked & (received_ns - last_cnp_ns >= cnp_interval_ns)
        last_cnp_ns[answered] = received_ns
        if back < steps:
            arriving[back] += answered
            rtt_samples[back, active] = queueing_ns + path_rtt_ns
        owed += offered
        sent = owed.astype(np.int64)
        owed -= sent
        control.advance(now + step_ns, Feedback(arriving[step], sent, none, rtt_samples[step], active))
    return trace
