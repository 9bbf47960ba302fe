"""DCQCN's reaction point as the paper has it: cut at every CNP, grow by a timer and by a byte counter.

At a CNP: R_T := R_C, R_C := R_C (1 - alpha/2), alpha := (1 - g) alpha + g, and both timers, the byte counter and both
counts of expirations begin anew. Every K without CNP: alpha := (1 - g) alpha. Every T, and every B bytes: R_C := (R_T +
R_C)/2; before that, once T or B has expired F times since the cut, R_T grows by R_AI, and by R_HAI once both have
expired more than F times. Expirations are counted with the one at hand.

Before its first CNP a QP is at line rate and has no timers; alpha is 1 then.

Time within a call of ``advance``, which covers the time from the last one: n CNPs are spread evenly, the first at
its beginning (they come at least N apart, so they are not a burst), bytes are sent at an even rate. Events happen
in the order of their times; at the same instant a CNP comes before the timer, the timer before the byte counter. What is due at
the very end of the stretch belongs to the next one.

Source:
    Zhu et al., SIGCOMM 2015, section 3.1 and algorithm 1; the order of counting as in the authors' ns-3 model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from testbed.roce.congestion.dcqcn_parameters import Constants
from testbed.roce.congestion.protocol import Feedback, Floats


class PaperReactionPoint:
    """The paper's machine; see `protocol.CongestionControl`.

    Args:
        constants: Its parameters.
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
        # Alpha right after the last CNP: since then it has decayed once every K.
        self._alpha = np.ones(qps)
        self._cnp_at_ns = np.full(qps, np.inf)
        self._timer_due_ns = np.full(qps, np.inf)
        self._bytes_left = np.full(qps, np.inf)
        self._timer_count = np.zeros(qps, np.int64)
        self._byte_count = np.zeros(qps, np.int64)

    def state(self) -> dict[str, Floats]:
        """Return alpha and the target rate of every QP."""
        every = np.arange(len(self._alpha))
        return {"alpha": self._decayed_alpha(every, self._now_ns), "target_rate_bytes_per_s": self._target.copy()}

    def _decayed_alpha(self, rows: npt.NDArray[np.intp], at_ns: Floats | float) -> Floats:
        """Return alpha of some QPs just before ``at_ns``: a CNP at that instant comes before the timer."""
        constants = self._constants
        since = np.maximum(at_ns - self._cnp_at_ns[rows], 0.0)
        decays = np.maximum(np.ceil(since / constants.alpha_timer_ns) - 1, 0.0)
        decayed: Floats = self._alpha[rows] * (1 - constants.g) ** decays
        return decayed

    def advance(self, now_ns: float, feedback: Feedback) -> None:
        """Act on what happened since the last call; see the module for the order of events."""
        start, now_ns = self._now_ns, float(now_ns)
        if now_ns < start:
            raise ValueError(f"time must not run backwards, from {start} to {now_ns} ns")
        self._now_ns = now_ns
        eventful = (feedback.cnps > 0) | (self._timer_due_ns < now_ns) | (self._bytes_left < feedback.sent_bytes)
        rows = np.flatnonzero(eventful)
        self._bytes_left[~eventful] -= feedback.sent_bytes[~eventful]
        if len(rows):
            self._happen(rows, start, now_ns, feedback)

    def _happen(self, rows: npt.NDArray[np.intp], start: float, end: float, feedback: Feedback) -> None:
        """Let the events of some QPs happen, one for each of them at a time."""
        counter = self._constants.byte_counter_bytes
        length = end - start
        cnps = feedback.cnps[rows]
        sent = feedback.sent_bytes[rows].astype(np.float64)
        seen = np.zeros(len(rows), np.int64)
        # How many bytes into this stretch the byte counter expires.
        byte_mark = self._bytes_left[rows]
        while True:
            cnp_due = np.where(seen < cnps, start + length * (seen / np.maximum(cnps, 1)), np.inf)
            reached = byte_mark < sent
            byte_due = np.full(len(rows), np.inf)
            byte_due[reached] = start + length * (byte_mark[reached] / sent[reached])
            timer_due = self._timer_due_ns[rows]
            timer_due = np.where(timer_due < end, timer_due, np.inf)
            due = np.minimum(np.minimum(cnp_due, timer_due), byte_due)
            waiting = due < np.inf
            if not waiting.any():
                break
            is_cnp = waiting & (cnp_due <= due)
            is_timer = waiting & ~is_cnp & (timer_due <= due)
            is_byte = waiting & ~is_cnp & ~is_timer
            if is_cnp.any():
                at = due[is_cnp]
                self._cut(rows[is_cnp], at)
                seen[is_cnp] += 1
                into = (at - start) / length if length else 0.0
                byte_mark[is_cnp] = sent[is_cnp] * into + counter[rows[is_cnp]]
            self._timer_due_ns[rows[is_timer]] += self._constants.rate_timer_ns
            self._timer_count[rows[is_timer]] += 1
            byte_mark[is_byte] += counter[rows[is_byte]]
            self._byte_count[rows[is_byte]] += 1
            self._increase(rows[is_timer | is_byte])
        self._bytes_left[rows] = byte_mark - sent

    def _cut(self, rows: npt.NDArray[np.intp], at_ns: Floats) -> None:
        constants = self._constants
        alpha = self._decayed_alpha(rows, at_ns)
        self._target[rows] = self.rate_bytes_per_s[rows]
        self.rate_bytes_per_s[rows] = np.maximum(self._target[rows] * (1 - alpha / 2), constants.rmin[rows])
        self._alpha[rows] = (1 - constants.g) * alpha + constants.g
        self._cnp_at_ns[rows] = at_ns
        self._timer_due_ns[rows] = at_ns + constants.rate_timer_ns
        self._timer_count[rows] = 0
        self._byte_count[rows] = 0

    def _increase(self, rows: npt.NDArray[np.intp]) -> None:
        constants = self._constants
        timer, counter = self._timer_count[rows], self._byte_count[rows]
        is_fast_recovery = np.maximum(timer, counter) < constants.fast_recovery
        is_hyper = np.minimum(timer, counter) > constants.fast_recovery
        step = np.where(is_hyper, constants.rhai[rows], constants.rai[rows])
        step[is_fast_recovery] = 0.0
        self._target[rows] = np.minimum(self._target[rows] + step, self._line_rate[rows])
        self.rate_bytes_per_s[rows] = (self._target[rows] + self.rate_bytes_per_s[rows]) / 2
