"""Raw samples of a run, before anything is judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class MachineSamples:
    """Raw figures of one run about the machine, wall time.

    Attributes:
        wall_lateness_ns: How late each tick began.
        wall_busy_ns: How long each tick worked.
        wall_probe_ns: How long each probe frame took to reach the fabric's CPU; -1 for one that had not.
        wall_nic_lag_ns: Largest lag behind schedule of any NIC, per tick.
        lost_ns: Time lost by each port, see :class:`ShapingObserver`.
        backlogged_ns: Time each port was backlogged.
        wall_duration_ns: Length of the measured iterations.
    """

    wall_lateness_ns: npt.NDArray[np.int64]
    wall_busy_ns: npt.NDArray[np.int64]
    wall_probe_ns: npt.NDArray[np.int64]
    wall_nic_lag_ns: npt.NDArray[np.float64]
    lost_ns: npt.NDArray[np.float64]
    backlogged_ns: npt.NDArray[np.float64]
    wall_duration_ns: int
