"""The completion time of each of several jobs that run at once, from when their connections ended."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from testbed.plan.model import PlannedJob, PlannedWorkload


def job_cct_ns(
    planned: PlannedWorkload,
    job: PlannedJob,
    end_ns: npt.NDArray[np.float64],
    inside_end_ns: npt.NDArray[np.float64],
) -> float:
    """Return how long one job took in an iteration, from its start to its last byte.

    Args:
        planned: All that ran.
        job: One of its jobs.
        end_ns: When each queue pair ended, emulated, from the iteration's release, shape ``(queue pairs,)``.
        inside_end_ns: When each connection of the schedule that ran ended, if it stays inside a host, likewise, shape
            ``(schedule's connections,)``.
    """
    qps = planned.qps_per_connection
    networked = len(planned.connections) // qps
    of_network = job.connections[job.connections < networked]
    inside = job.connections[job.connections >= networked]
    if planned.pieces is None:  # connections inside hosts stand behind the queue pairs, else behind the pairs of ranks
        inside = inside + networked * (qps - 1)
    ends = end_ns.reshape(networked, qps)[of_network]
    return max(float(ends.max(initial=0.0)), float(inside_end_ns[inside].max(initial=0.0))) - job.start_ns
