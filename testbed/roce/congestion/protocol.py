"""What a congestion control sees and what it answers.

The sender's side (reaction point) alone: switches mark, responders send CNPs, the engine counts and paces. All quantities
are emulated: ns, bytes, bytes per second. One object serves all QPs of a run; arrays have a row per QP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
"""Shape ``(qps,)``, unless said otherwise."""


@dataclass(slots=True)
class Feedback:
    """What happened to every QP since the last call of `CongestionControl.advance`.

    Attributes:
        cnps: CNPs that arrived, shape ``(qps,)``.
        sent_bytes: Bytes newly sent, wire or payload as long as it is always the same, shape ``(qps,)``.
        acked_bytes: Bytes newly acknowledged, shape ``(qps,)``.
        rtt_ns: The newest round-trip time, nan where there is no sample, shape ``(qps,)``.
        active: Whether the QP has data outstanding or to send, shape ``(qps,)``.
    """

    cnps: npt.NDArray[np.int64]
    sent_bytes: npt.NDArray[np.int64]
    acked_bytes: npt.NDArray[np.int64]
    rtt_ns: Floats
    active: npt.NDArray[np.bool_]


class CongestionControl(Protocol):
    """The reaction points of all QPs.

    Attributes:
        rate_bytes_per_s: What each QP may send from now on, at most its line rate, shape ``(qps,)``.
        needs_rtt: Whether `Feedback.rtt_ns` must carry samples.
        marks_cnp: Whether the algorithm acts on CNPs, and so needs ECN marking.
    """

    rate_bytes_per_s: Floats
    needs_rtt: bool
    marks_cnp: bool

    def restart(self, now_ns: float) -> None:
        """Put all QPs to line rate and forget what was."""

    def advance(self, now_ns: float, feedback: Feedback) -> None:
        """Act on what happened between the last call (or `restart`) and ``now_ns``.

        Raises:
            ValueError: If ``now_ns`` lies before the last call.
        """

    def state(self) -> dict[str, Floats]:
        """Return what a time series should show beside the rate, by name with unit, each of shape ``(qps,)``."""


class CongestionAlgorithm(Protocol):
    """What a module of this package exports: a module with a ``NAME`` is found by itself.

    Attributes:
        NAME: Its name in ``transport.congestion_control``.
        Parameters: Dataclass of its parameters, every one with a default; fields are named with their units.

    One that acts on CNPs also has a function ``cnp_interval_ns`` of its parameters.
    """

    NAME: str
    Parameters: type[Any]

    def Algorithm(self, parameters: Any, line_rate_bytes_per_s: Floats) -> CongestionControl:  # noqa: N802
        """Return the reaction points for QPs with these line rates, at line rate and at time 0."""


def read_parameters(kind: type[Any], parameters: Mapping[str, Any], name: str) -> Any:
    """Return ``kind(**parameters)``.

    Raises:
        ValueError: If a parameter is unknown, or its value is refused; the message names it.
    """
    known = list(kind.__dataclass_fields__)
    for key in parameters:
        if key not in known:
            raise ValueError(f"{name} has no parameter {key!r}; it has {', '.join(known) or 'none'}")
    return kind(**parameters)
