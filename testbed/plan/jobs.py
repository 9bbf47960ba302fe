"""Several jobs at once: the ranks of each, and what they cost each other by the paths they share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.plan.placement import place_jobs
from testbed.routing import Route
from testbed.scenario import MeasuredJobs, Scenario, job_host_counts

# A stream of random numbers of its own: the placement does not change with what else is drawn.
_PLACEMENT_STREAM = 3


def job_hosts(scenario: Scenario) -> list[tuple[int, ...]]:
    """Return the hosts of each job, in the order of the ranks."""
    wanted = [
        (job.placement if isinstance(job.placement, tuple) else str(job.placement), count)
        for job, count in zip(scenario.jobs, job_host_counts(scenario.jobs, scenario.fabric.nhosts), strict=True)
    ]
    rng = np.random.default_rng([scenario.seed, _PLACEMENT_STREAM])
    return place_jobs(wanted, scenario.fabric.host_counts, rng)


def ranks_of_hosts(scenario: Scenario, hosts: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks of some hosts, host by host."""
    gpus = scenario.fabric.gpus_per_host
    return tuple(host * gpus + gpu for host in hosts for gpu in range(gpus))


def measured_sets(scenario: Scenario) -> Iterator[tuple[int, ...]]:
    """Yield which jobs are run at the same time, by their numbers: all of them last."""
    jobs = len(scenario.jobs)
    sizes = {MeasuredJobs.TOGETHER: (), MeasuredJobs.ALONE: (1,), MeasuredJobs.PAIRS: (1, 2)}[scenario.measure_jobs]
    for size in sizes:
        if size < jobs:
            yield from itertools.combinations(range(jobs), size)
    yield tuple(range(jobs))


def port_times_ns(
    schedule: Schedule, routes: Sequence[Sequence[Route]], rate_bits_per_s: npt.NDArray[np.float64]
) -> tuple[dict[int, float], float]:
    """Return how long each port needs for what a job sends, and how much its busiest connection carries.

    Args:
        schedule: The job's transfers; its first connections are those of the routes.
        routes: The ways of each connection's bytes.
        rate_bits_per_s: Rate of each port id.

    Returns:
        Time by port id, in ns, and bytes.
    """
    carried = np.bincount(schedule.connection, schedule.nbytes, len(schedule.connections))[: len(routes)]
    times: dict[int, float] = {}
    for ways, nbytes in zip(routes, carried.tolist(), strict=True):
        for route in ways if nbytes else ():
            for port in route.path.ports:
                times[port] = times.get(port, 0.0) + 8e9 * nbytes * route.share / float(rate_bits_per_s[port])
    return times, float(carried.max(initial=0.0))


def fluid_ends_ns(
    port_times: Sequence[Mapping[int, float]], connection_bytes: Sequence[float], starts_ns: Sequence[float]
) -> list[float]:
    """Return when each of several jobs ends, if each goes on as fast as the fullest port on its way lets it.

    The connections of a job wait for each other, as in a ring: the slowest sets the pace of all, and the others leave what
    they do not use to other jobs. At a port every connection gets as much as every other. So jobs go on together, in
    proportion to what their connections carry, until a port is full; its jobs stay at that pace, the others go faster. When a
    job ends its share is free.

    Args:
        port_times: How long each port needs for each job, by port id.
        connection_bytes: What the busiest connection of each job carries; 0 for a job that sends nothing.
        starts_ns: When each begins.

    Source:
        Bertsekas and Gallager, "Data Networks", 2nd edition, section 6.5.2 (max-min flow control), with jobs for flows.
    """
    left = [1.0 if nbytes and times else 0.0 for nbytes, times in zip(connection_bytes, port_times, strict=True)]
    ends = [float(start) for start in starts_ns]
    now = min(starts_ns, default=0.0)
    while any(left):
        active = [job for job, share in enumerate(left) if share and starts_ns[job] <= now]
        coming = [starts_ns[job] for job, share in enumerate(left) if share and starts_ns[job] > now]
        speeds = _job_speeds({job: port_times[job] for job in active}, connection_bytes)
        step = min([left[job] / speeds[job] for job in active] + [start - now for start in coming])
        now += step
        for job in active:
            left[job] -= speeds[job] * step
            if left[job] < 1e-9:
                left[job], ends[job] = 0.0, now
    return ends


def _job_speeds(port_times: Mapping[int, Mapping[int, float]], connection_bytes: Sequence[float]) -> dict[int, float]:
    """Return the part of its work that each job does in a ns while these run."""
    speeds: dict[int, float] = {}
    rising = set(port_times)
    while rising:
        used: dict[int, float] = {}
        wanted: dict[int, float] = {}
        for job, times in port_times.items():
            for port, time_ns in times.items():
                if job in rising:
                    wanted[port] = wanted.get(port, 0.0) + time_ns / connection_bytes[job]
                else:
                    used[port] = used.get(port, 0.0) + time_ns * speeds[job]
        level = {port: max(0.0, 1.0 - used.get(port, 0.0)) / weight for port, weight in wanted.items()}
        lowest = min(level.values())
        full = {port for port, height in level.items() if height <= lowest * (1 + 1e-9)}
        for job in sorted(rising):
            if full & port_times[job].keys():
                speeds[job] = max(lowest / connection_bytes[job], 1e-18)
                rising.discard(job)
    return speeds
