"""Raw samples of a run, before anything is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


def _none() -> npt.NDArray[Any]:
    return np.zeros(0)


@dataclass(frozen=True, eq=False)
class MachineSamples:
    """What one measured iteration noted about the machine, in wall time.

    What only the engine can see, for it paces and accounts every frame, is empty by default.

    Attributes:
        wall_tick_ns: Length of a tick.
        wall_lateness_ns: How late each tick began, shape ``(ticks,)``.
        wall_busy_ns: How long each tick worked, shape ``(ticks,)``.
        wall_probe_ns: How long each probe frame took to reach the fabric's CPU, shape ``(probes,)``.
        wall_duration_ns: Length of the iteration.
        resolution_error_fraction: What a tick more of latency would add to the ideal completion time.
        unaccounted_bytes: Bytes that entered a queue and never left one: lost by the machine, not by the fabric.
        wall_nic_lag_ns: How far the latest NIC was behind its schedule, at every look, shape ``(looks,)``.
        wall_lost_ns: Time each port lost while its queue was never empty, shape ``(ports + 1,)``.
        wall_gained_ns: Time the fastest congested switch port gained: its shaper is a little fast and its bucket was full.
        wall_excess_ns: What the fastest port sent beyond what its shaper lets through, as time at its rate.
        wall_gate_lateness_ns: How late each pause began, negative where a tick was early, shape ``(pauses,)``.
    """

    wall_tick_ns: int
    wall_lateness_ns: npt.NDArray[np.int64]
    wall_busy_ns: npt.NDArray[np.int64]
    wall_probe_ns: npt.NDArray[np.int64]
    wall_duration_ns: int
    resolution_error_fraction: float
    unaccounted_bytes: int = 0
    wall_nic_lag_ns: npt.NDArray[np.float64] = field(default_factory=_none)
    wall_lost_ns: npt.NDArray[np.float64] = field(default_factory=_none)
    wall_gained_ns: float = 0.0
    wall_excess_ns: float = 0.0
    wall_gate_lateness_ns: npt.NDArray[np.int64] = field(default_factory=_none)


@dataclass(frozen=True, eq=False)
class AdmissionSamples:
    """What one measured iteration noted about grants.

    Attributes:
        cts_frames: CTS frames sent, repeated ones included.
        repeated_frames: Those that repeated a grant.
        cts_delay_ns: From each grant to its receipt by the sender, emulated, to a tick, shape ``(grants,)``.
    """

    cts_frames: int
    repeated_frames: int
    cts_delay_ns: npt.NDArray[np.float64]
