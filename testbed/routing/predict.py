"""What a set of paths can carry: max-min fair rates, and the slowdown of a collective.

The rates are those that long flows settle at when every port shares its rate equally and nobody is held back
otherwise. Frame times, queues and pauses are not modelled: head-of-line blocking makes a real fabric slower,
never faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from testbed.routing.links import ALL_UP, LinkState
from testbed.routing.paths import Path
from testbed.topology import Topology

_LEVEL_TOLERANCE = 1e-9
"""Relative difference below which two ports saturate together: far above float64 rounding, far below 1 flow."""


def max_min_rates(
    paths: Sequence[Sequence[int]],
    capacity_per_port: Mapping[int, float] | npt.NDArray[np.float64],
    weights: Sequence[float] | None = None,
) -> npt.NDArray[np.float64]:
    """Return the max-min fair rate of every flow, by progressive filling.

    The rates of all flows rise together, in proportion to their weights, until a port is full; its flows are
    settled, the others go on rising.

    Args:
        paths: The port ids that each flow crosses, each at most once.
        capacity_per_port: Rate of each port, by port id, in any unit; ports missing from a mapping, and
            ``inf``, do not limit.
        weights: A positive weight per flow; None means 1 each.

    Returns:
        Shape ``(flows,)``, float64, in the unit of the capacities; ``inf`` for flows that no port limits.

    Raises:
        ValueError: If there are not as many weights as paths, or a weight is not positive.

    Source:
        Bertsekas and Gallager, "Data Networks", 2nd edition, section 6.5.2 (max-min flow control).
    """
    nflows = len(paths)
    weight = np.ones(nflows) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(weight) != nflows:
        raise ValueError(f"{len(weight)} weights for {nflows} paths")
    if not np.all(weight > 0):
        raise ValueError("weights must be positive")

    # Flow -> port entries, the ports renumbered densely and without those that cannot limit.
    entry_flow = np.repeat(np.arange(nflows), [len(path) for path in paths])
    port_ids, entry_port = np.unique(
        np.fromiter((port for path in paths for port in path), dtype=np.int64), return_inverse=True
    )
    left = np.array([_capacity(capacity_per_port, int(port_id)) for port_id in port_ids], dtype=np.float64)
    limits = np.isfinite(left)[entry_port]
    entry_flow, entry_port = entry_flow[limits], entry_port[limits]
    # Both directions as compressed rows: the ports of a flow, and the flows of a port.
    flow_start = np.searchsorted(entry_flow, np.arange(nflows + 1))
    by_port = np.argsort(entry_port, kind="stable")
    flows_by_port = entry_flow[by_port]
    port_start = np.searchsorted(entry_port[by_port], np.arange(len(port_ids) + 1))

    rising = np.bincount(entry_port, minlength=len(port_ids))  # flows not yet settled, per port
    rising_weight = np.bincount(entry_port, weights=weight[entry_flow], minlength=len(port_ids))
    level = np.full(len(port_ids), np.inf)  # rate per unit of weight at which a port fills
    active = rising > 0
    level[active] = left[active] / rising_weight[active]
    rates = np.full(nflows, np.inf)
    settled = np.zeros(nflows, dtype=bool)
    while np.isfinite(lowest := level.min(initial=np.inf)):
        full = np.flatnonzero(level <= lowest * (1 + _LEVEL_TOLERANCE))
        flows = np.unique(np.concatenate([flows_by_port[port_start[p] : port_start[p + 1]] for p in full]))
        flows = flows[~settled[flows]]
        settled[flows] = True
        rates[flows] = lowest * weight[flows]
        # Take what they use off every port they cross.
        entries = _ranges(flow_start[flows], flow_start[flows + 1])
        ports, which = np.unique(entry_port[entries], return_inverse=True)
        left[ports] -= np.bincount(which, weights=rates[entry_flow[entries]])
        rising[ports] -= np.bincount(which)
        rising_weight[ports] -= np.bincount(which, weights=weight[entry_flow[entries]])
        open_ports = ports[rising[ports] > 0]
        level[ports] = np.inf
        # Rounding must not let a level sink below the one just filled.
        level[open_ports] = np.maximum(left[open_ports] / rising_weight[open_ports], lowest)
    return rates


def port_rates(topology: Topology, links: LinkState = ALL_UP) -> npt.NDArray[np.float64]:
    """Return the rate of every port: its line rate, or what is left of it.

    Returns:
        Shape ``(ports + 1,)``, float64, bits per second, indexed by port id; index 0 is ``inf``.
    """
    rates = np.array([np.inf, *(float(port.rate_bits_per_s) for port in topology.ports)])
    for port_id, rate in links.rates_bits_per_s:
        rates[port_id] = float(rate)
    return rates


def nic_port_rates(topology: Topology) -> npt.NDArray[np.float64]:
    """Return the rates of a fabric whose core never blocks: only ports on host links limit.

    Returns:
        As ``port_rates``, with ``inf`` for ports between switches.
    """
    rates = port_rates(topology)
    for port in topology.ports:
        if not topology.is_nic_port(port.id):
            rates[port.id] = np.inf
    return rates


def completion_time(
    paths: Sequence[Sequence[int]],
    nbytes: Sequence[float] | npt.NDArray[np.float64],
    capacity_per_port: Mapping[int, float] | npt.NDArray[np.float64],
) -> float:
    """Return when flows that begin together are all done, if the port that has most to do is never idle.

    That is each port's bytes over its rate, at its largest: no order of service is faster, and flows that share ports
    fairly come close to it, because those that carry less leave their share to the others when they are done.

    Args:
        paths: The port ids that each flow crosses, each at most once.
        nbytes: What each flow carries, above 0, in any unit.
        capacity_per_port: As for `max_min_rates`.

    Returns:
        Time in the unit of ``nbytes`` over that of the capacities; 0 if no port limits.
    """
    carried = np.asarray(nbytes, np.float64)
    # With bytes for weights the flows of the worst port are done together, and no other flow later.
    return float((carried / max_min_rates(paths, capacity_per_port, weights=carried.tolist())).max(initial=0.0))


def predicted_cct_ratio(
    topology: Topology, connections: Sequence[Sequence[Path]], nbytes: Sequence[float] | None = None
) -> float:
    """Return the completion time of a collective over that in a non-blocking core.

    For collectives whose connections run all at once, as in a ring, an incast or an all-to-all; where connections wait for
    one another see `testbed.plan.predict`. A connection splits its bytes equally over its flows (QPs) and is done when the
    last of them is. The reference is the same flows limited by the ports on host links alone, so that a receiver that
    several senders share is no slowdown. Both times are those of `completion_time`. Bandwidth terms only: no latencies, no
    queues.

    Where all NICs are alike this is, at one QP per connection of a ring that crosses the core at line rate, the number of
    flows on the worst link.

    Args:
        topology: The fabric.
        connections: The paths of each connection's flows; at least one connection, at least one flow each.
        nbytes: What each connection carries, above 0, in any unit; None for all alike.

    Returns:
        At least 1, but for rounding.

    Raises:
        ValueError: If there is no connection, one has no flow, or there are not as many ``nbytes``.
    """
    if not connections or not all(connections):
        raise ValueError("a prediction needs at least one connection, and a flow in each")
    carried = [1.0] * len(connections) if nbytes is None else list(nbytes)
    paths = [path.ports for flows in connections for path in flows]
    shares = [share / len(flows) for flows, share in zip(connections, carried, strict=True) for _ in flows]
    fabric_time = completion_time(paths, shares, port_rates(topology))
    return fabric_time / completion_time(paths, shares, nic_port_rates(topology))


def _capacity(capacity_per_port: Mapping[int, float] | npt.NDArray[np.float64], port_id: int) -> float:
    if isinstance(capacity_per_port, Mapping):
        return float(capacity_per_port.get(port_id, np.inf))
    return float(capacity_per_port[port_id])


def _ranges(starts: npt.NDArray[np.intp], stops: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return the integers of all ranges ``[starts[i], stops[i])``, one range after the other."""
    lengths = stops - starts
    offsets = np.cumsum(lengths) - lengths
    ranges: npt.NDArray[np.intp] = np.arange(lengths.sum()) + np.repeat(starts - offsets, lengths)
    return ranges
