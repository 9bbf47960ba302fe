"""TIMELY: congestion control by the gradient of the round-trip time; no help from switches.

For each sample: the difference to the sample before enters a moving average (weight ``ewma``), which over ``min_rtt`` is the
gradient. Below ``t_low`` the rate grows by delta; above ``t_high`` it is multiplied by 1 - beta (1 - t_high/rtt); between them it
grows by delta when the gradient is at most 0, ``hai`` times delta from the ``hai``-th time in a row, and is multiplied by
1 - beta gradient otherwise. Growth below ``t_low`` and cuts end such a row.

The paper takes a sample at every completion of a segment; here a QP takes at most one per ``min_rtt`` (as the paper's analysts
do: its steps must not come faster than their effect), and at most one per call of ``advance``. So where calls are further
apart than ``min_rtt``, growth is slower than a NIC's.

Source:
    Mittal et al., "TIMELY: RTT-based Congestion Control for the Datacenter", SIGCOMM 2015, algorithm 1. Defaults for 10 Gbit/s as
    in alibaba-edu/High-Precision-Congestion-Control (rdma-hw.cc, run.py), which lets delta grow with the line rate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from testbed.roce.congestion.protocol import Feedback, Floats

NAME = "timely"
REFERENCE_RATE_BITS_PER_S = 10_000_000_000
"""The line rate for which the default of ``delta`` is."""
DELTA_BITS_PER_S = 10_000_000


@dataclass(frozen=True, slots=True)
class Parameters:
    """TIMELY's parameters.

    Attributes:
        t_low_ns: Round-trip time below which the rate always grows.
        t_high_ns: Round-trip time above which it is always cut.
        min_rtt_ns: What differences of round-trip times are compared with; also the time between two steps.
        ewma: Weight of a new difference in the moving average, 0 to 1.
        delta_bits_per_s: Additive step; ``None``: 10 Mbit/s for every 10 Gbit/s of line rate. Also the lowest rate.
        beta: Multiplicative decrease, 0 to 1.
        hai: From so many growths in a row without a growing delay, the step is so many times as large.
    """

    t_low_ns: int = 50_000
    t_high_ns: int = 500_000
    min_rtt_ns: int = 20_000
    ewma: float = 0.875
    delta_bits_per_s: int | None = None
    beta: float = 0.8
    hai: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("ewma", "beta"):
                if not 0 <= value <= 1:
                    raise ValueError(f"timely's {field.name} must be from 0 to 1, got {value!r}")
            elif value is not None and not value > 0:
                raise ValueError(f"timely's {field.name} must be above 0, got {value!r}")
        if self.t_low_ns > self.t_high_ns:
            raise ValueError(f"timely's t_low_ns must be at most t_high_ns, got {self.t_low_ns} and {self.t_high_ns}")


class Algorithm:
    """The reaction points of all QPs; see `protocol.CongestionControl`."""

    needs_rtt = True
    marks_cnp = False

    def __init__(self, parameters: Parameters, line_rate_bytes_per_s: Floats) -> None:
        self._parameters = parameters
        self._line_rate = line_rate_bytes_per_s.copy()
        if parameters.delta_bits_per_s is None:
            self._delta = self._line_rate * (DELTA_BITS_PER_S / REFERENCE_RATE_BITS_PER_S)
        else:
            self._delta = np.minimum(parameters.delta_bits_per_s / 8, self._line_rate)
        self.restart(0.0)

    def restart(self, now_ns: float) -> None:
        """Put all QPs to line rate and forget what was."""
        qps = len(self._line_rate)
        self._now_ns = float(now_ns)
        self.rate_bytes_per_s = self._line_rate.copy()
        self._rtt_ns = np.full(qps, np.nan)
        self._rtt_diff_ns = np.zeros(qps)
        self._sampled_at_ns = np.full(qps, -np.inf)
        self._growths = np.zeros(qps, np.int64)

    def state(self) -> dict[str, Floats]:
        """Return the newest round-trip time used, nan before the first, and the gradient of every QP."""
        gradient = self._rtt_diff_ns / self._parameters.min_rtt_ns
        return {"rtt_ns": self._rtt_ns.copy(), "rtt_gradient": gradient}

    def advance(self, now_ns: float, feedback: Feedback) -> None:
        """Act on the newest round-trip times."""
        if now_ns < self._now_ns:
            raise ValueError(f"time must not run backwards, from {self._now_ns} to {now_ns} ns")
        self._now_ns = float(now_ns)
        parameters = self._parameters
        is_due = now_ns - self._sampled_at_ns >= parameters.min_rtt_ns
        rows = np.flatnonzero(is_due & ~np.isnan(feedback.rtt_ns))
        rtt, before = feedback.rtt_ns[rows], self._rtt_ns[rows]
        self._rtt_ns[rows] = rtt
        self._sampled_at_ns[rows] = now_ns
        # A QP's first sample has nothing to be compared with.
        rows, rtt, diff = (array[~np.isnan(before)] for array in (rows, rtt, rtt - before))
        self._rtt_diff_ns[rows] = (1 - parameters.ewma) * self._rtt_diff_ns[rows] + parameters.ewma * diff
        gradient = self._rtt_diff_ns[rows] / parameters.min_rtt_ns

        is_low, is_high = rtt < parameters.t_low_ns, rtt > parameters.t_high_ns
        is_falling = ~is_low & ~is_high & (gradient <= 0)
        self._growths[rows] = np.where(is_falling, self._growths[rows] + 1, 0)
        step = self._delta[rows] * np.where(self._growths[rows] >= parameters.hai, parameters.hai, 1)
        factor = 1 - parameters.beta * np.where(is_high, 1 - parameters.t_high_ns / rtt, gradient)
        rate = self.rate_bytes_per_s[rows]
        rate = np.where(is_low | is_falling, rate + step, rate * factor)
        self.rate_bytes_per_s[rows] = np.clip(rate, self._delta[rows], self._line_rate[rows])
