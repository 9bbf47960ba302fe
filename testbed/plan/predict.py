"""What a fabric's paths do to a schedule: the slowdown to expect, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.routing import Path, completion_time, max_min_rates, nic_port_rates, port_rates
from testbed.topology import Topology


def predict_cct_ratio(
    topology: Topology, schedule: Schedule, paths: Sequence[Path], nvlink_rate_bits_per_s: float = np.inf
) -> float:
    """Return the completion time of a schedule over that in a non-blocking core.

    The time is the larger of two that no fabric can beat. One is what the busiest port has to carry in all, over its rate;
    it decides where all connections run at once, as in rings, incasts and pipelines. The other follows the dependencies:
    transfers as many dependencies away from the beginning run together, share ports fairly, and the next begin when they
    have arrived; it decides where connections take turns, as in a pairwise exchange, whose collisions add up step by step.

    The reference is the same with ports on host links (and GPUs, for NVLink) alone, so that a NIC that several senders
    share is no slowdown. Bandwidth terms only: no latencies, no queues, no pauses, so a real fabric may be slower, hardly
    ever faster.

    Args:
        topology: The fabric.
        schedule: What is sent; at least one transfer.
        paths: The path of each of the first connections; those behind join ranks of one host.
        nvlink_rate_bits_per_s: What each rank sends and receives at most inside its host.

    Returns:
        At least 1, but for rounding.
    """
    steps = _steps(schedule)
    # Behind the fabric's ports: one out of each rank's GPU and one into it.
    first = len(topology.ports) + 1
    inside = schedule.connections[len(paths) :]
    ports = [path.ports for path in paths] + [(first + 2 * src, first + 2 * dst + 1) for src, dst in inside]
    gpus = np.full(2 * schedule.nranks, nvlink_rate_bits_per_s)
    fabric, reference = (
        _time(schedule, ports, steps, np.concatenate([rates, gpus]))
        for rates in (port_rates(topology), nic_port_rates(topology))
    )
    return fabric / reference


def _time(
    schedule: Schedule,
    ports: Sequence[Sequence[int]],
    steps: npt.NDArray[np.int64],
    capacity: npt.NDArray[np.float64],
) -> float:
    """Return the larger of the two times, in bytes per unit of the capacities."""
    totals = np.zeros(len(schedule.connections))
    np.add.at(totals, schedule.connection, schedule.nbytes)
    used = np.flatnonzero(totals)
    busiest = completion_time([ports[connection] for connection in used.tolist()], totals[used], capacity)
    return max(busiest, _longest_chain(schedule, schedule.nbytes / _transfer_rates(schedule, ports, steps, capacity)))


def _steps(schedule: Schedule) -> npt.NDArray[np.int64]:
    """Return how many dependencies each transfer is away from the beginning, shape ``(transfers,)``."""
    steps = [0] * len(schedule)
    latest = [0] * len(schedule.connections)  # of the transfers before it on its connection
    deps, offsets, connections = schedule.deps.tolist(), schedule.dep_offsets.tolist(), schedule.connection.tolist()
    for transfer, connection in enumerate(connections):
        step = latest[connection]
        for dep in deps[offsets[transfer] : offsets[transfer + 1]]:
            step = max(step, steps[dep] + 1)
        steps[transfer] = latest[connection] = step
    return np.array(steps, np.int64)


def _transfer_rates(
    schedule: Schedule,
    ports: Sequence[Sequence[int]],
    steps: npt.NDArray[np.int64],
    capacity: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the rate at which each transfer goes while those of its step share the ports, shape ``(transfers,)``.

    Connections share in proportion to what they carry in the step, so those that meet at a port are done together.
    """
    rates = np.empty(len(schedule))
    known: dict[bytes, npt.NDArray[np.float64]] = {}  # steps of a ring are all alike
    order = np.argsort(steps, kind="stable")
    for transfers in np.split(order, np.flatnonzero(np.diff(steps[order])) + 1):
        active, which = np.unique(schedule.connection[transfers], return_inverse=True)
        carried = np.bincount(which, weights=schedule.nbytes[transfers])
        weights = np.maximum(np.rint(carried / carried.max() * 1e6), 1.0)  # chunks differ by a byte
        key = active.tobytes() + weights.tobytes()
        if key not in known:
            crossed = [ports[connection] for connection in active.tolist()]
            known[key] = max_min_rates(crossed, capacity, weights.tolist())
        rates[transfers] = known[key][which]
    return rates


def _longest_chain(schedule: Schedule, times: npt.NDArray[np.float64]) -> float:
    """Return when the last transfer ends, if each takes its time and waits only for what it depends on.

    Args:
        schedule: What is sent.
        times: Duration of each transfer, shape ``(transfers,)``.
    """
    ends = [0.0] * len(schedule)
    free = [0.0] * len(schedule.connections)
    deps, offsets, connections = schedule.deps.tolist(), schedule.dep_offsets.tolist(), schedule.connection.tolist()
    for transfer, (connection, time) in enumerate(zip(connections, times.tolist(), strict=True)):
        begin = free[connection]
        for dep in deps[offsets[transfer] : offsets[transfer + 1]]:
            begin = max(begin, ends[dep])
        ends[transfer] = free[connection] = begin + time
    return max(ends)
