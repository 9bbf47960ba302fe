"""What a fabric's paths do to a schedule: the slowdown to expect, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.routing import ALL_UP, LinkState, Path, Route, max_min_rates, nic_port_rates, port_rates, single_route
from testbed.topology import Topology


def predict_cct_ratio(
    topology: Topology,
    schedule: Schedule,
    routes: Sequence[Sequence[Route]],
    nvlink_rate_bits_per_s: float = np.inf,
    *,
    shares_follow_rates: bool = False,
    links: LinkState = ALL_UP,
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
        routes: The ways of each of the first connections' bytes, over its queue pairs and over what a switch spreads. A
            transfer has arrived when its slowest part has. The connections behind join ranks of one host.
        nvlink_rate_bits_per_s: What each rank sends and receives at most inside its host.
        shares_follow_rates: Whether connections divide their bytes over their ways so that the busiest port has least to do,
            instead of by the shares: what queue pairs that take the next piece when they have credit come to, at best.
        links: Links that carry less than they should; the reference has them whole.

    Returns:
        At least 1, but for rounding.
    """
    steps = transfer_steps(schedule)
    # Behind the fabric's ports: one out of each rank's GPU and one into it.
    first = len(topology.ports) + 1
    inside = [
        single_route(Path((first + 2 * src, first + 2 * dst + 1), (), 0))
        for src, dst in schedule.connections[len(routes) :]
    ]
    gpus = np.full(2 * schedule.nranks, nvlink_rate_bits_per_s)
    fabric, reference = (
        _time(schedule, _Ways([*routes, *inside], np.concatenate([rates, gpus]), shares_follow_rates), steps)
        for rates in (port_rates(topology, links), nic_port_rates(topology))
    )
    return fabric / reference


class _Ways:
    """The ways of all connections over ports of given capacities."""

    def __init__(
        self, routes: Sequence[Sequence[Route]], capacity: npt.NDArray[np.float64], shares_follow_rates: bool
    ) -> None:
        counts = np.array([len(ways) for ways in routes], np.int64)
        self._first = np.concatenate(([0], np.cumsum(counts)))
        self._ports = [route.path.ports for ways in routes for route in ways]
        self._share = np.array([route.share for ways in routes for route in ways])
        self._capacity = capacity
        self._shares_follow_rates = shares_follow_rates

    def rates(
        self, connections: npt.NDArray[np.integer[Any]], carried: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Return the rate of each of some connections while these alone send.

        They share ports in proportion to what they carry, so those that meet at a port are done together.

        Args:
            connections: The connections.
            carried: Bytes of each.
        """
        first, last = self._first[connections], self._first[connections + 1]
        counts = last - first
        starts = np.cumsum(counts) - counts
        ways = np.arange(int(counts.sum())) + np.repeat(first - starts, counts)
        share = self._share[ways]
        if self._shares_follow_rates:
            return carried / self._best_time(ways, counts, carried)
        weights = np.repeat(carried, counts) * share
        rates = max_min_rates([self._ports[way] for way in ways.tolist()], self._capacity, weights.tolist())
        slowest: npt.NDArray[np.float64] = np.minimum.reduceat(rates / share, starts)
        return slowest

    def _best_time(
        self, ways: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], carried: npt.NDArray[np.float64]
    ) -> float:
        """Return the time that the busiest port needs if every connection divides its bytes over its ways for the best.

        By prices: every round, each connection prefers its ways whose ports are cheap, and ports that have much to do become
        dear. The mean over all rounds comes close to the best, from above.

        Source:
            Arora, Hazan and Kale, "The Multiplicative Weights Update Method", 2012, section 3.2 (concurrent flow).
        """
        starts = np.cumsum(counts) - counts
        owner = np.repeat(np.arange(len(counts)), counts)
        crossed = [self._ports[way] for way in ways.tolist()]
        port = np.array([one for ports in crossed for one in ports], np.int64)
        way = np.repeat(np.arange(len(crossed)), [len(ports) for ports in crossed])
        times = carried[owner][way] / self._capacity[port]
        load, worst = np.zeros(len(self._capacity)), 0.0
        total = np.zeros_like(load)
        for turn in range(1, _PRICE_ROUNDS + 1):
            mean = total / max(1, turn - 1)
            top = mean.max()
            price = np.exp(_PRICE_SHARPNESS * (mean / top - 1.0)) if top else np.ones_like(mean)
            cost = np.bincount(way, weights=times * price[port], minlength=len(crossed))
            cheapest = np.minimum.reduceat(cost, starts)[owner]
            chosen = cost <= cheapest * (1 + _COST_TOLERANCE)
            share = chosen / np.add.reduceat(chosen.astype(np.float64), starts)[owner]
            total += np.bincount(port, weights=times * share[way], minlength=len(load))
            worst = float(total.max()) / turn
        return worst


_PRICE_ROUNDS = 600
_PRICE_SHARPNESS = 60.0
_COST_TOLERANCE = 1e-9


def _time(schedule: Schedule, ways: _Ways, steps: npt.NDArray[np.int64]) -> float:
    """Return the larger of the two times, in bytes per unit of the capacities."""
    totals = np.zeros(len(schedule.connections))
    np.add.at(totals, schedule.connection, schedule.nbytes)
    used = np.flatnonzero(totals)
    # With bytes for weights the connections of the worst port are done together, and no other later.
    busiest = float((totals[used] / ways.rates(used, totals[used])).max())
    return max(busiest, _longest_chain(schedule, schedule.nbytes / _transfer_rates(schedule, ways, steps)))


def transfer_steps(schedule: Schedule) -> npt.NDArray[np.int64]:
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


def _transfer_rates(schedule: Schedule, ways: _Ways, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the rate at which each transfer goes while those of its step share the ports, shape ``(transfers,)``."""
    rates = np.empty(len(schedule))
    known: dict[bytes, npt.NDArray[np.float64]] = {}  # steps of a ring are all alike
    order = np.argsort(steps, kind="stable")
    for transfers in np.split(order, np.flatnonzero(np.diff(steps[order])) + 1):
        active, which = np.unique(schedule.connection[transfers], return_inverse=True)
        carried = np.bincount(which, weights=schedule.nbytes[transfers])
        weights = np.maximum(np.rint(carried / carried.max() * 1e6), 1.0)  # chunks differ by a byte
        key = active.tobytes() + weights.tobytes()
        if key not in known:
            known[key] = ways.rates(active, weights)
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
