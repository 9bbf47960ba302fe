"""What to expect of a scenario over many hash seeds: paths, fair shares and the slowdown, nothing built.

The model is that of `testbed.plan.predict`, computed for all seeds at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.errors import PlanError
from testbed.plan.predict import transfer_steps
from testbed.routing import nic_port_rates, port_rates
from testbed.routing.fair_share import best_times, max_min_rates, port_loads
from testbed.routing.links import ALL_UP, LinkState
from testbed.routing.seeds import tables_of_seeds
from testbed.routing.spread import Flows, Spread, Tracer
from testbed.routing.tables import ForwardingTables
from testbed.topology import Topology

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]

# How many numbers an array may hold: what does not fit is done some seeds at a time.
_BATCH_NUMBERS = 4_000_000


@dataclass(frozen=True, eq=False)
class Messages:
    """What is sent over a fabric, and by which flows.

    Attributes:
        connections: Connections that send. The first ones cross the network, the others join ranks of a host.
        nbytes: What each of them carries in all, shape ``(connections,)``.
        schedule: The transfers, whose connections these are; None where all connections run at once from beginning to end.
        flows: The queue pairs' flows.
        owner: The connection of each flow, ascending, shape ``(flows,)``.
        share: Part of the connection's bytes that each flow carries, above 0, shape ``(flows,)``.
        inside: Ranks that each connection behind joins, shape ``(connections behind, 2)``.
        nranks: Number of ranks.
        divides_best: Whether a connection divides its bytes over its flows so that the busiest port has least to do, instead
            of by the shares.
    """

    connections: int
    nbytes: Floats
    schedule: Schedule | None
    flows: Flows
    owner: Ints
    share: Floats
    inside: Ints
    nranks: int
    divides_best: bool = False


@dataclass(frozen=True, eq=False)
class Forecast:
    """What to expect of messages under each of some hash seeds.

    Attributes:
        cct_ratios: Completion time over that in a non-blocking core, shape ``(seeds,)``; at least 1, but for rounding.
        port_times_ns: How long each port needs for what it carries, shape ``(seeds, ports)`` by port id, or ``(1, ports)``
            where all seeds are alike; None unless asked for.
    """

    cct_ratios: Floats
    port_times_ns: Floats | None = None


def forecast(
    topology: Topology,
    messages: Messages,
    build_tables: Callable[[int], ForwardingTables],
    hash_seeds: Sequence[int],
    *,
    nvlink_rate_bits_per_s: float = np.inf,
    links: LinkState = ALL_UP,
    port_times: bool = False,
) -> Forecast:
    """Return the completion time over that in a non-blocking core, under each of some hash seeds.

    Args:
        topology: The fabric.
        messages: What is sent.
        build_tables: Returns the forwarding tables of a hash seed.
        hash_seeds: The seeds; at least one.
        nvlink_rate_bits_per_s: What each rank sends and receives at most inside its host.
        links: Links that carry less than they should; the reference has them whole.
        port_times: Return how long each port needs, too.

    Raises:
        PlanError: A flow has no way to its destination.
    """
    gpus = np.full(2 * messages.nranks, nvlink_rate_bits_per_s)
    capacity, unblocked = (
        np.concatenate([rates, gpus]) for rates in (port_rates(topology, links), nic_port_rates(topology))
    )
    tracer = Tracer(topology, messages.flows)
    widest = max(len(messages.flows) + len(messages.inside), len(capacity), len(messages.schedule or ()))
    reference: float | None = None
    ratios: list[Floats] = []
    loads: list[Floats] = []
    for seeded in tables_of_seeds(build_tables, hash_seeds, batch=max(1, _BATCH_NUMBERS // widest)):
        # Where no switch hashes, one seed tells of all.
        traced = tracer.trace(seeded.first() if seeded.are_alike else seeded)
        _check_links(topology, traced, links)
        times = _Times(topology, messages, traced, capacity)
        if reference is None:  # the hosts' links are the same under every seed
            reference = float(_Times(topology, messages, traced.of_seed(0), unblocked).total()[0])
        ratios.append(np.broadcast_to(times.total() / reference, (len(seeded.seeds),)))
        if port_times:
            loads.append(8e9 * times.port_times()[:, : len(topology.ports) + 1])
    return Forecast(np.concatenate(ratios), np.concatenate(loads) if loads else None)


def _check_links(topology: Topology, traced: Spread, links: LinkState) -> None:
    """Raise PlanError if a flow crosses a link that is down: the tables have not learnt of it."""
    if not links.dead_ports:
        return
    dead = np.zeros(len(topology.ports) + 1, bool)
    for port in topology.ports:
        dead[port.id] = not links.is_up(port)
    crossed = np.unique(traced.ports[dead[traced.ports]])
    if len(crossed):
        flows = len(np.unique(traced.flow[dead[traced.ports].any(axis=0)]))
        raise PlanError(f"{flows} flows leave by {topology.port_name(int(crossed[0]))}, whose link is down")


class _Times:
    """How long messages take over their ways, under each seed."""

    def __init__(self, topology: Topology, messages: Messages, traced: Spread, capacity: Floats) -> None:
        self._messages = messages
        self._capacity = capacity
        self._seeds = int(traced.seed[-1]) + 1 if len(traced.seed) else 1
        self._with_inside(messages, traced, len(topology.ports) + 1)

    def _with_inside(self, messages: Messages, traced: Spread, first_gpu_port: int) -> None:
        """Add the ways inside hosts: behind the fabric's ports there is one out of each rank's GPU and one into it."""
        seeds, inside = self._seeds, messages.inside
        networked = messages.connections - len(inside)
        connection = messages.owner[traced.flow]
        share = messages.share[traced.flow] * traced.share
        ports, seed = traced.ports, traced.seed
        if len(inside):
            if not traced.flow.size:  # nothing leaves a host: no way has told how long they are
                ports = np.zeros((2, 0), ports.dtype)
            gpus = np.zeros((len(ports), len(inside)), np.int64)
            gpus[0] = first_gpu_port + 2 * inside[:, 0]
            gpus[1] = first_gpu_port + 2 * inside[:, 1] + 1
            seed = np.concatenate([seed, np.repeat(np.arange(seeds), len(inside))])
            connection = np.concatenate([connection, np.tile(networked + np.arange(len(inside)), seeds)])
            share = np.concatenate([share, np.ones(seeds * len(inside))])
            ports = np.concatenate([ports, np.tile(gpus, seeds)], axis=1)
            order = np.argsort(seed, kind="stable")
            seed, connection, share, ports = seed[order], connection[order], share[order], ports[:, order]
        self._seed, self._connection, self._share, self._ports = seed, connection, share, ports

    def total(self) -> Floats:
        """Return the completion times, shape ``(seeds,)``, in bytes per unit of the capacities.

        Where all connections run at once from beginning to end, the busiest port decides; else it may be the dependencies.
        """
        messages = self._messages
        if messages.divides_best:
            rates = self._connection_rates(np.flatnonzero(messages.nbytes), messages.nbytes[messages.nbytes > 0])
            busiest: Floats = (messages.nbytes[messages.nbytes > 0] / rates).max(axis=1)
        else:
            busiest = np.max(self.port_times(), axis=1)
        if messages.schedule is None:
            return busiest
        chain = self._longest_chain(messages.schedule)
        return busiest if chain is None else np.maximum(busiest, chain)

    def port_times(self) -> Floats:
        """Return how long each port needs for what it carries, shape ``(seeds, ports)``."""
        nbytes = self._messages.nbytes[self._connection] * self._share
        load = port_loads(self._ports, self._seed, nbytes, seeds=self._seeds, nports=len(self._capacity))
        return load / self._capacity

    def _connection_rates(self, active: Ints, carried: Floats) -> Floats:
        """Return the rate of each of some connections while these alone send, shape ``(seeds, active)``.

        They share ports in proportion to what they carry, so those that meet at a port are done together.
        """
        number = np.full(self._messages.connections, -1, np.int64)
        number[active] = np.arange(len(active))
        ways = np.flatnonzero(number[self._connection] >= 0)
        seed, connection, share = self._seed[ways], number[self._connection[ways]], self._share[ways]
        ports = self._ports[:, ways]
        if self._messages.divides_best:
            times = best_times(
                ports,
                seed,
                connection,
                carried[connection],
                self._capacity,
                seeds=self._seeds,
                connections=len(active),
            )
            return carried / times[:, np.newaxis]
        rates = max_min_rates(ports, seed, carried[connection] * share, self._capacity) / share
        starts = np.flatnonzero(np.diff(seed * len(active) + connection, prepend=-1))
        slowest: Floats = np.minimum.reduceat(rates, starts).reshape(self._seeds, len(active))
        return slowest

    def _longest_chain(self, schedule: Schedule) -> Floats | None:
        """Return when the last transfer ends if each waits only for what it depends on, shape ``(seeds,)``.

        None where every step of the schedule has the same connections, each with the same part of the bytes: its steps then
        take together what the busiest port needs.
        """
        steps = transfer_steps(schedule)
        order = np.argsort(steps, kind="stable")
        patterns: dict[bytes, tuple[Ints, Floats]] = {}
        parts: list[tuple[Ints, bytes, Ints]] = []
        for transfers in np.split(order, np.flatnonzero(np.diff(steps[order])) + 1):
            active, which = np.unique(schedule.connection[transfers], return_inverse=True)
            carried = np.bincount(which, weights=schedule.nbytes[transfers])
            weights = np.maximum(np.rint(carried / carried.max() * 1e6), 1.0)  # chunks differ by a byte
            key = active.tobytes() + weights.tobytes()
            patterns[key] = (active.astype(np.int64), weights)
            parts.append((transfers, key, which))
        if len(patterns) == 1:
            return None
        known = {key: self._connection_rates(*pattern) for key, pattern in patterns.items()}
        times = np.empty((len(schedule), self._seeds))
        for some, key, column in parts:
            times[some] = (schedule.nbytes[some] / known[key][:, column]).T
        return _follow_dependencies(schedule, times)


def _follow_dependencies(schedule: Schedule, times: Floats) -> Floats:
    """Return when the last transfer ends, if each takes its time and waits only for what it depends on.

    Args:
        schedule: What is sent.
        times: Duration of each transfer under each seed, shape ``(transfers, seeds)``; overwritten.

    Returns:
        Shape ``(seeds,)``.
    """
    free: list[Floats | None] = [None] * len(schedule.connections)
    offsets, deps = schedule.dep_offsets.tolist(), schedule.deps.tolist()
    for transfer, connection in enumerate(schedule.connection.tolist()):
        begin = free[connection]
        for dep in deps[offsets[transfer] : offsets[transfer + 1]]:
            begin = times[dep] if begin is None else np.maximum(begin, times[dep])
        if begin is not None:
            times[transfer] += begin
        free[connection] = times[transfer]
    last: Floats = times.max(axis=0)
    return last
