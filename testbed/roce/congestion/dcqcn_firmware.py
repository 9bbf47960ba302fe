"""DCQCN's reaction point as Mellanox' firmware has it: periodic alpha, periodic cuts, growth by a timer alone.

The first CNP starts two clocks. Every K: alpha := (1 - g) alpha, + g if a CNP came since the last time. Every 4 us, if a CNP
came since the last time: R_T := R_C, but only if the increase timer has expired since the last cut (the target is not
clamped otherwise); R_C := R_C (1 - alpha/2); the increase timer and its count begin anew. Every T after a cut: R_C :=
(R_T + R_C)/2 the first F times, then once with R_T += R_AI before it, from then on with R_T += R_HAI.

Before its first CNP a QP is at line rate and has no clocks; alpha is 1 then. Time within a call of ``advance`` is as in
`dcqcn_paper`; at the same instant come CNP, alpha, cut, increase.

Source:
    alibaba-edu/High-Precision-Congestion-Control, rdma-hw.cc, "Mellanox's version of DCQCN"
    (``EcnClampTgtRate`` false, ``RateDecreaseInterval`` 4 us, ``RateOnFirstCnp`` 1).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from testbed.roce.congestion.dcqcn_parameters import Constants
from testbed.roce.congestion.protocol import Feedback, Floats

CUT_INTERVAL_NS = 4_000.0
"""The rate is cut at most once in it (``rate_reduce_monitor_period``)."""


class FirmwareReactionPoint:
    """The firmware's machine; see `protocol.CongestionControl`.

    Args:
        constants: Its parameters; the byte counter is not used.
        line_rate_bytes_per_s: Shape ``(qps,)``.
    """

    needs_rtt = False
    marks_cnp = True

    def __init__(self, constants: Constants, line_rate_bytes_per_s: Floats) -> None:
        self._constants = constants
        self._line_rate = line_rate_bytes_per_s.copy()
        self.restart(0.0)

    def restart(self, now_ns: float) -> None:
        """Put all QPs to line rate and forget what was."""
        qps = len(self._line_rate)
        self._now_ns = float(now_ns)
        self.rate_bytes_per_s = self._line_rate.copy()
        self._target = self._line_rate.copy()
        self._first_cnp_ns = np.full(qps, np.inf)
        # Alpha after its first `_alpha_updates` updates, and whether a CNP came since the last of them.
        self._alpha = np.ones(qps)
        self._alpha_updates = np.zeros(qps)
        self._cnp_for_alpha = np.zeros(qps, bool)
        self._cut_due_ns = np.full(qps, np.inf)
        self._timer_due_ns = np.full(qps, np.inf)
        self._timer_count = np.zeros(qps, np.int64)

    def state(self) -> dict[str, Floats]:
        """Return alpha and the target rate of every QP."""
        # An update that is due at this very instant has not happened yet: see the order of events.
        alpha, _ = self._updated_alpha(np.arange(len(self._alpha)), self._alpha_updates_before(self._now_ns))
        return {"alpha": alpha, "target_rate_bytes_per_s": self._target.copy()}

    def advance(self, now_ns: float, feedback: Feedback) -> None:
        """Act on what happened since the last call; see the module for the order of events."""
        start, end = self._now_ns, float(now_ns)
        if end < start:
            raise ValueError(f"time must not run backwards, from {start} to {end} ns")
        self._now_ns = end
        rows = np.flatnonzero((feedback.cnps > 0) | (self._timer_due_ns < end) | (self._cut_due_ns < end))
        cnps = feedback.cnps[rows]
        seen = np.zeros(len(rows), np.int64)
        while len(rows):
            cnp_due = np.where(seen < cnps, start + (end - start) * (seen / np.maximum(cnps, 1)), np.inf)
            cut_due = self._cut_due_ns[rows]
            cut_due = np.where(cut_due < end, cut_due, np.inf)
            timer_due = self._timer_due_ns[rows]
            timer_due = np.where(timer_due < end, timer_due, np.inf)
            due = np.minimum(np.minimum(cnp_due, cut_due), timer_due)
            waiting = due < np.inf
            if not waiting.any():
                break
            is_cnp = waiting & (cnp_due <= due)
            is_cut = waiting & ~is_cnp & (cut_due <= due)
            is_timer = waiting & ~is_cnp & ~is_cut
            if is_cnp.any():
                self._note_cnp(rows[is_cnp], due[is_cnp])
                seen[is_cnp] += 1
            if is_cut.any():
                self._cut(rows[is_cut], due[is_cut])
            self._increase(rows[is_timer])

    def _alpha_updates_before(self, at_ns: Floats | float) -> Floats:
        """Return how many updates of alpha each QP has had before, not at, an instant; for all QPs."""
        return _count_before(at_ns - self._first_cnp_ns, self._constants.alpha_timer_ns)

    def _updated_alpha(self, rows: npt.NDArray[np.intp], updates: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return alpha of some QPs after so many updates since their first CNP, and whether there was a new one."""
        g = self._constants.g
        more = updates - self._alpha_updates[rows]
        is_new = more > 0
        alpha = self._alpha[rows] * (1 - g) ** np.maximum(more, 0.0)
        # Only the first of them saw the CNP.
        alpha += np.where(is_new & self._cnp_for_alpha[rows], g * (1 - g) ** np.maximum(more - 1, 0.0), 0.0)
        return alpha, is_new

    def _settle_alpha(self, rows: npt.NDArray[np.intp], updates: Floats) -> None:
        self._alpha[rows], is_new = self._updated_alpha(rows, updates)
        self._cnp_for_alpha[rows[is_new]] = False
        self._alpha_updates[rows] = np.maximum(updates, self._alpha_updates[rows])

    def _note_cnp(self, rows: npt.NDArray[np.intp], at_ns: Floats) -> None:
        is_first = ~np.isfinite(self._first_cnp_ns[rows])
        self._first_cnp_ns[rows[is_first]] = at_ns[is_first]
        since = at_ns - self._first_cnp_ns[rows]
        self._settle_alpha(rows, _count_before(since, self._constants.alpha_timer_ns))
        # The first CNP sets alpha to 1 instead.
        self._cnp_for_alpha[rows] = ~is_first
        is_idle = ~np.isfinite(self._cut_due_ns[rows])
        next_cut = np.maximum(np.ceil(since / CUT_INTERVAL_NS), 1.0)
        due = self._first_cnp_ns[rows] + next_cut * CUT_INTERVAL_NS
        self._cut_due_ns[rows] = np.where(is_idle, due, self._cut_due_ns[rows])

    def _cut(self, rows: npt.NDArray[np.intp], at_ns: Floats) -> None:
        constants = self._constants
        since = at_ns - self._first_cnp_ns[rows]
        self._settle_alpha(rows, np.floor(since / constants.alpha_timer_ns))
        rate = self.rate_bytes_per_s[rows]
        has_grown = self._timer_count[rows] > 0
        self._target[rows] = np.where(has_grown, rate, self._target[rows])
        self.rate_bytes_per_s[rows] = np.maximum(rate * (1 - self._alpha[rows] / 2), constants.rmin[rows])
        self._cut_due_ns[rows] = np.inf
        self._timer_due_ns[rows] = at_ns + constants.rate_timer_ns
        self._timer_count[rows] = 0

    def _increase(self, rows: npt.NDArray[np.intp]) -> None:
        constants = self._constants
        self._timer_due_ns[rows] += constants.rate_timer_ns
        before = self._timer_count[rows]
        step = np.where(before == constants.fast_recovery, constants.rai[rows], constants.rhai[rows])
        step[before < constants.fast_recovery] = 0.0
        self._target[rows] = np.minimum(self._target[rows] + step, self._line_rate[rows])
        self.rate_bytes_per_s[rows] = (self._target[rows] + self.rate_bytes_per_s[rows]) / 2
        self._timer_count[rows] += 1


def _count_before(since_ns: Floats, period_ns: float) -> Floats:
    """Return how often a clock of that period, started ``since_ns`` ago, has struck before now; a strike now is not in it."""
    counted: Floats = np.maximum(np.ceil(np.maximum(since_ns, 0.0) / period_ns) - 1, 0.0)
    return counted
