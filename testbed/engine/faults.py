"""Faults in the tick: what breaks or is mended when, and how long its victims stood still.

The engine knows neither links nor tables: a step of the timeline has a time and a number, and whoever made the timeline makes
the fabric be as it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class FaultEffects(Protocol):
    """Makes the fabric be as a step of the timeline says."""

    def apply(self, step: int, now_ns: int) -> None:
        """Make it so; step 0 is how an iteration begins."""


@dataclass(frozen=True, eq=False)
class Watch:
    """A fault whose victims are watched.

    Attributes:
        wall_at_ns: When it happens, from the release.
        victims: Whether each connection's way crosses what fails, shape ``(connections,)``.
        ports: Port ids of the links that it touches.
    """

    wall_at_ns: int
    victims: npt.NDArray[np.bool_]
    ports: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sighting:
    """What came of a fault in one iteration.

    Attributes:
        happened: Whether the iteration lasted until then.
        wall_recovery_ns: From the fault until its victims went again at half their rate or more; None if they never did,
            or had nothing to go at.
        lost_packets: Frames lost on its links from then to the end of the iteration.
    """

    happened: bool
    wall_recovery_ns: int | None = None
    lost_packets: int = 0


@dataclass(eq=False)
class _Watched:
    watch: Watch
    at_ns: int = 0
    lost_before: int = -1
    bytes_seen: list[int] = field(default_factory=list)


RECOVERED_FRACTION = 0.5
"""Share of what a fault's victims got before it, at which they are said to go again: with fewer links they may get no more."""


_DIP_WINDOWS = 4


class NoFaults:
    """A run in which nothing breaks."""

    def begin(self, now_ns: int) -> None:
        """Do nothing."""

    def tick(self, now_ns: int, payload_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | None:
        """Change nothing."""
        return None

    def end(self, now_ns: int) -> npt.NDArray[np.float64] | None:
        """Change nothing."""
        return None


class Faults:
    """The faults of an iteration.

    Args:
        wall_at_ns: When each step begins, from the release; ascending, the first is that of step 0 and is 0.
        wall_rates_bytes_per_s: Rate of every port in each step, shape ``(ports + 1,)`` each.
        effects: Makes the fabric be so.
        watches: The faults to be watched.
        lost_packets: View of the fabric's losses, by port and priority, shape ``(ports + 1, 8)``.
        wall_window_ns: Over how long the progress of victims is judged.
    """

    def __init__(
        self,
        wall_at_ns: Sequence[int],
        wall_rates_bytes_per_s: Sequence[npt.NDArray[np.float64]],
        effects: FaultEffects,
        *,
        watches: Sequence[Watch],
        lost_packets: npt.NDArray[Any],
        wall_window_ns: int,
    ) -> None:
        self._at_ns = list(wall_at_ns)
        self._rates = list(wall_rates_bytes_per_s)
        self._effects = effects
        self._watches = list(watches)
        self._lost_packets = lost_packets
        self._window_ns = wall_window_ns
        self._begin_ns = 0
        self._step = 0
        self._seen_ns: list[int] = []
        self._watched: list[_Watched] = []

    @property
    def step(self) -> int:
        """Return which step the fabric is in."""
        return self._step

    def begin(self, now_ns: int) -> None:
        """Begin an iteration: it was released now."""
        self._begin_ns = now_ns
        self._seen_ns = []
        self._watched = [_Watched(watch, now_ns + watch.wall_at_ns) for watch in self._watches]

    def tick(self, now_ns: int, payload_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | None:
        """Let happen what is due; return the rates of all ports if they may have changed.

        Args:
            now_ns: The clock.
            payload_bytes: What each connection has delivered, shape ``(connections,)``.
        """
        self._seen_ns.append(now_ns)
        for one in self._watched:
            if one.lost_before < 0 and one.at_ns <= now_ns:
                one.lost_before = self._lost_on(one.watch)
            one.bytes_seen.append(int(payload_bytes[one.watch.victims].sum()))
        changed = False
        while self._step + 1 < len(self._at_ns) and self._begin_ns + self._at_ns[self._step + 1] <= now_ns:
            self._step += 1
            self._effects.apply(self._step, now_ns)
            changed = True
        return self._rates[self._step] if changed else None

    def end(self, now_ns: int) -> npt.NDArray[np.float64] | None:
        """Make the fabric be as it was when the iteration began; return the rates of all ports if they may have changed."""
        if not self._step:
            return None
        self._step = 0
        self._effects.apply(0, now_ns)
        return self._rates[0]

    def sightings(self) -> tuple[Sighting, ...]:
        """Return what came of each watched fault in the iteration that has just ended."""
        return tuple(self._sighting(one) for one in self._watched)

    def _sighting(self, one: _Watched) -> Sighting:
        if one.lost_before < 0:
            return Sighting(happened=False)
        recovery = recovery_ns(
            np.array(self._seen_ns), np.array(one.bytes_seen), fault_ns=one.at_ns, window_ns=self._window_ns
        )
        return Sighting(True, recovery, self._lost_on(one.watch) - one.lost_before)

    def _lost_on(self, watch: Watch) -> int:
        return int(self._lost_packets[watch.ports].sum())


def recovery_ns(
    seen_ns: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64], *, fault_ns: int, window_ns: int
) -> int | None:
    """Return how long after a fault its victims go again at half their rate or more.

    Their rate is what they delivered in the window before the fault, or in what there was of it. If in none of the windows that
    begin within four windows of the fault they deliver less than half of it, they have not suffered, and it is 0. Else it is from
    the fault to the beginning of the first window after such a one in which they deliver half again.

    Args:
        seen_ns: When it was looked, ascending, shape ``(looks,)``.
        nbytes: What the victims had delivered then, the same shape.
        fault_ns: When the fault happened.
        window_ns: Length of a window.

    Returns:
        None if they did not deliver anything before, or never as much again.
    """
    if len(seen_ns) < 2:
        return None
    first_ns = max(int(seen_ns[0]), fault_ns - window_ns)
    if fault_ns <= first_ns:
        return None
    before = np.interp([first_ns, fault_ns], seen_ns, nbytes)
    rate = (before[1] - before[0]) / (fault_ns - first_ns)
    if rate <= 0:
        return None
    starts = np.concatenate(([fault_ns], seen_ns[seen_ns > fault_ns]))
    starts = starts[starts + window_ns <= seen_ns[-1]]
    gained = np.interp(starts + window_ns, seen_ns, nbytes) - np.interp(starts, seen_ns, nbytes)
    below = gained < RECOVERED_FRACTION * rate * window_ns
    dips = np.flatnonzero(below & (starts <= fault_ns + _DIP_WINDOWS * window_ns))
    if not len(starts) or not len(dips):
        return 0 if len(starts) else None
    again = np.flatnonzero(~below[dips[0] :])
    return int(starts[dips[0] + again[0]] - fault_ns) if len(again) else None
