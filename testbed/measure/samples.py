"""Raw samples of a run, before anything is judged."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class MachineSamples:
    """What one measured iteration noted about the machine, in wall time.

    Attributes:
        wall_tick_ns: Length of a tick.
        wall_lateness_ns: How late each tick began, shape ``(ticks,)``.
        wall_busy_ns: How long each tick worked, shape ``(ticks,)``.
        wall_probe_ns: How long each probe frame took to reach the fabric's CPU, shape ``(probes,)``.
        wall_nic_lag_ns: How far the latest NIC was behind its schedule, at every look, shape ``(looks,)``.
        wall_lost_ns: Time each port lost while its queue was never empty, shape ``(ports + 1,)``.
        wall_gained_ns: Time the fastest congested switch port gained: its shaper is a little fast and its bucket was full.
        wall_backlogged_ns: Time each port's queue was never empty, shape ``(ports + 1,)``.
        wall_duration_ns: Length of the iteration.
        unaccounted_bytes: Bytes that entered a queue and never left one: lost by the machine, not by the fabric.
        resolution_error_fraction: What a tick more of latency would add to the ideal completion time.
        wall_gate_lateness_ns: How late each pause began, negative where a tick was early, shape ``(pauses,)``.
    """

    wall_tick_ns: int
    wall_lateness_ns: npt.NDArray[np.int64]
    wall_busy_ns: npt.NDArray[np.int64]
    wall_probe_ns: npt.NDArray[np.int64]
    wall_nic_lag_ns: npt.NDArray[np.float64]
    wall_lost_ns: npt.NDArray[np.float64]
    wall_gained_ns: float
    wall_backlogged_ns: npt.NDArray[np.float64]
    wall_duration_ns: int
    unaccounted_bytes: int
    resolution_error_fraction: float
    wall_gate_lateness_ns: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


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
