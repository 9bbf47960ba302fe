"""The completion time that a schedule would have over a core that never blocks.

What limits it: each NIC's out rate, each NIC's in rate, and each path's latency; inside a host, the NVLink model. The
core's capacity is never in it, so CCT / ideal CCT is what the fabric did to the collective.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from testbed.collectives.fluid import FluidPorts
from testbed.collectives.intra_host import IntraHostLinks, IntraHostModel
from testbed.collectives.schedule import Schedule

PACKET_OVERHEAD_BYTES = 82
"""Wire bytes of a packet beside its padded payload: 58 of headers and ICRC, 24 of FCS, preamble and gap.

The same as `testbed.roce.wire`, which this package must not import; a test keeps them equal.
"""
RETH_BYTES = 16
"""Further bytes of a message's first (or only) packet."""

Latency = npt.ArrayLike | Callable[[int, int], float]


def wire_bytes(nbytes: npt.ArrayLike, mtu: int) -> npt.NDArray[np.int64]:
    """Return the bytes that messages occupy on a link, all their packets together.

    Args:
        nbytes: Payload of each message, bytes.
        mtu: Payload of a full packet, bytes; a multiple of 4.

    Returns:
        Array of the shape of ``nbytes``, int64, with FCS, preamble and gap.

    Raises:
        ValueError: If ``mtu`` is not a positive multiple of 4.

    Source:
        docs/architecture.md, "On the wire".
    """
    payload = np.asarray(nbytes, np.int64)
    _check_mtu(mtu)
    packets = np.maximum(-(-payload // mtu), 1)
    return np.asarray(-(-payload // 4) * 4 + packets * PACKET_OVERHEAD_BYTES + RETH_BYTES)


def largest_frame_wire_bytes(nbytes: npt.ArrayLike, mtu: int) -> int:
    """Return the wire bytes of the largest packet of any of these messages.

    A path of ``h`` hops adds ``h - 1`` times this to the time of a message: switches forward whole frames.
    Use it for the ``latency_ns`` of `ideal_cct_ns`; with messages below one MTU a full frame would be too
    much.

    Args:
        nbytes: Payload of each message, bytes.
        mtu: Payload of a full packet, bytes.
    """
    _check_mtu(mtu)
    payload = min(int(np.max(nbytes)), mtu)
    return -(-payload // 4) * 4 + PACKET_OVERHEAD_BYTES + RETH_BYTES


def ideal_cct_ns(
    schedule: Schedule,
    *,
    nic_rate_bits_per_s: npt.ArrayLike,
    latency_ns: Latency,
    mtu: int,
    nic_of_rank: npt.ArrayLike | None = None,
    intra_host: IntraHostLinks | None = None,
) -> float:
    """Return the time at which the last transfer of a schedule arrives; see `ideal_arrivals_ns`."""
    arrivals = ideal_arrivals_ns(
        schedule,
        nic_rate_bits_per_s=nic_rate_bits_per_s,
        latency_ns=latency_ns,
        mtu=mtu,
        nic_of_rank=nic_of_rank,
        intra_host=intra_host,
    )
    return float(arrivals.max(initial=0.0))


def ideal_arrivals_ns(
    schedule: Schedule,
    *,
    nic_rate_bits_per_s: npt.ArrayLike,
    latency_ns: Latency,
    mtu: int,
    nic_of_rank: npt.ArrayLike | None = None,
    intra_host: IntraHostLinks | None = None,
) -> npt.NDArray[np.float64]:
    """Return when each transfer has arrived whole, over a core that never blocks.

    Connections are fluids. A NIC shares its rate evenly among its connections whose next transfer is ready, as a NIC does
    that serves its QPs in turn, packet by packet; a transfer is ready when its dependencies have arrived. What reaches a
    NIC from several senders queues before it, first come first served, and enters at the NIC's rate. Nothing slows the
    senders down: the queue is as long as it gets. Inside a host, `IntraHostModel` carries transfers.

    Real packets come one after the other: where ``k`` connections share a NIC, a message of few packets ends up to
    ``k - 1`` frames earlier than here, and what waits for it begins earlier. Against a simulation packet by packet
    (tests/unit/test_ideal.py) rings, chains, exchanges, incasts and all-to-alls are exact, trees within 1.5 % at a packet
    per slice and 0.4 % from 32 packets on, random schedules of messages of 1 to 8 packets between -2 % and +10 %.

    Args:
        schedule: What is sent.
        nic_rate_bits_per_s: Rate of each NIC, in and out alike: one number, or shape ``(nics,)``.
        latency_ns: Propagation delay of the path plus one frame time for each hop after the first, ns: shape
            ``(connections,)``, or ``(nranks, nranks)``, ``[src, dst]``, or a function of source and destination rank. Not
            looked at for connections inside a host.
        mtu: Payload of a full packet, bytes.
        nic_of_rank: The NIC of each rank, shape ``(nranks,)``; None gives every rank its own.
        intra_host: What carries transfers inside a host; None sends all through NICs.

    Returns:
        Arrival time of each transfer, shape ``(transfers,)``, float64, ns after the collective began.

    Raises:
        ValueError: If a rate is not positive, a latency is negative, or ``mtu`` is no multiple of 4.

    Source:
        facts.md section 3 (the definition of cct_ideal).
    """
    nranks = schedule.nranks
    nic = np.arange(nranks) if nic_of_rank is None else np.asarray(nic_of_rank, np.int64)
    nics = int(nic.max()) + 1
    rates = np.broadcast_to(np.asarray(nic_rate_bits_per_s, np.float64), (nics,))
    if (rates <= 0).any():
        raise ValueError("a NIC's rate must be above 0")
    latencies = _latency_of_connections(schedule, latency_ns)
    if any(latency < 0 for latency in latencies):
        raise ValueError("a path's latency must not be negative")
    ends = nic[np.array(schedule.connections, np.int64).reshape(-1, 2)]
    network = FluidPorts(
        connection=schedule.connection.tolist(),
        nbytes=wire_bytes(schedule.nbytes, mtu).tolist(),
        source=ends[:, 0].tolist(),
        target=ends[:, 1].tolist(),
        latency_ns=latencies,
        rate_bytes_per_ns=(rates / 8e9).tolist(),
    )
    if intra_host is None or not (inside := intra_host.find_connections(schedule)).any():
        return _follow_dependencies(schedule, [network] * len(schedule.connections), network.arrivals)
    hosts = IntraHostModel(schedule, intra_host)
    carriers = [hosts if one else network for one in inside.tolist()]
    return _follow_dependencies(schedule, carriers, functools.partial(_merged_arrivals, network, hosts))


def _merged_arrivals(network: FluidPorts, hosts: IntraHostModel, until_ns: float) -> Iterator[tuple[float, int]]:
    """Yield the arrivals of both up to a time, in order; what they release may come to either."""
    while True:
        carrier, other = (network, hosts) if network.next_ns <= hosts.next_ns else (hosts, network)
        if carrier.next_ns == math.inf or carrier.next_ns > until_ns:
            return
        for arrival in carrier.arrivals(min(other.next_ns, until_ns)):
            yield arrival
            break  # it may have released something in the other


def _follow_dependencies(
    schedule: Schedule,
    carriers: Sequence[FluidPorts | IntraHostModel],
    arrivals: Callable[[float], Iterator[tuple[float, int]]],
) -> npt.NDArray[np.float64]:
    """Release every transfer as soon as all it waits for has arrived and its connection may send; return the arrival times.

    Args:
        schedule: What is sent.
        carriers: What carries each connection.
        arrivals: Yields all their arrivals up to a time, in order.
    """
    count, connections = len(schedule), len(schedule.connections)
    missing: list[int] = np.diff(schedule.dep_offsets).tolist()
    connection_of: list[int] = schedule.connection.tolist()
    # The transfers of connection c are queue[head[c]:end[c]].
    queue: list[int] = np.argsort(schedule.connection, kind="stable").tolist()
    end: list[int] = np.cumsum(np.bincount(schedule.connection, minlength=connections)).tolist()
    head: list[int] = [0, *end[:-1]]
    # The transfers that wait for transfer i are follower[first_follower[i]:first_follower[i + 1]].
    waiting = np.repeat(np.arange(count), np.diff(schedule.dep_offsets))
    follower: list[int] = waiting[np.argsort(schedule.deps, kind="stable")].tolist()
    followers = np.bincount(schedule.deps, minlength=count)
    first_follower: list[int] = [0, *np.cumsum(followers).tolist()]

    start: list[float] = schedule.start_ns.tolist()

    def release(connection: int, now: float) -> None:
        if now < start[connection]:
            return
        at = head[connection]
        while at < end[connection] and missing[queue[at]] == 0:
            carriers[connection].release(queue[at], now)
            at += 1
        head[connection] = at

    arrival_ns = [0.0] * count
    arrived = 0
    moments = sorted({0.0, *start})
    for moment, following in zip(moments, [*moments[1:], math.inf], strict=True):
        for connection in range(connections):
            if start[connection] == moment or moment == 0.0:
                release(connection, moment)
        for now, transfer in arrivals(following):
            arrived += 1
            arrival_ns[transfer] = now
            for at in range(first_follower[transfer], first_follower[transfer + 1]):
                dependant = follower[at]
                missing[dependant] -= 1
                if missing[dependant] == 0:
                    release(connection_of[dependant], now)
    assert arrived == count, "a schedule is in topological order"
    return np.array(arrival_ns, np.float64)


def _latency_of_connections(schedule: Schedule, latency_ns: Latency) -> list[float]:
    if callable(latency_ns):
        return [float(latency_ns(src, dst)) for src, dst in schedule.connections]
    table = np.asarray(latency_ns, np.float64)
    if table.shape == (len(schedule.connections),):
        return [float(latency) for latency in table]
    if table.shape != (schedule.nranks, schedule.nranks):
        raise ValueError(
            f"latency_ns must have shape ({schedule.nranks}, {schedule.nranks}) or ({len(schedule.connections)},), "
            f"got {table.shape}"
        )
    return [float(table[src, dst]) for src, dst in schedule.connections]


def _check_mtu(mtu: int) -> None:
    if mtu < 4 or mtu % 4:
        raise ValueError(f"mtu must be a positive multiple of 4, got {mtu}")
