"""What the ways of many flows can carry, under many hash seeds at once: `testbed.routing.predict` as arrays.

Each seed is a fabric of its own: the ports of one seed and those of another have nothing to do with each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]

_LEVEL_TOLERANCE = 1e-9
"""Relative difference below which two ports saturate together: far above float64 rounding, far below 1 flow."""

_PRICE_ROUNDS = 600
_PRICE_SHARPNESS = 60.0
_COST_TOLERANCE = 1e-9


def port_loads(ports: Ints, seed: Ints, nbytes: Floats, *, seeds: int, nports: int) -> Floats:
    """Return what every port sends under each seed.

    Args:
        ports: Port ids of each way, shape ``(hops, ways)``; 0 behind its end.
        seed: Which seed each way belongs to, shape ``(ways,)``.
        nbytes: What each way carries, shape ``(ways,)``.
        seeds: Number of seeds.
        nports: Length of a row, index 0 included.

    Returns:
        Shape ``(seeds, nports)``, in the unit of ``nbytes``; index 0 is 0.
    """
    load = np.zeros(seeds * nports)
    for hop in ports:
        load += np.bincount(seed * nports + hop, weights=nbytes, minlength=seeds * nports)
    table = load.reshape(seeds, nports)
    table[:, 0] = 0.0
    return table


def max_min_rates(ports: Ints, seed: Ints, weights: Floats, capacity: Floats) -> Floats:
    """Return the max-min fair rate of every way, by progressive filling within each seed.

    Args:
        ports: As for `port_loads`.
        seed: As for `port_loads`; ascending.
        weights: A positive weight per way.
        capacity: Rate of each port id; ``inf`` does not limit.

    Returns:
        Shape ``(ways,)``; ``inf`` for ways that no port limits.

    Source:
        Bertsekas and Gallager, "Data Networks", 2nd edition, section 6.5.2 (max-min flow control).
    """
    nports = len(capacity)
    hop, way = np.nonzero((ports > 0) & np.isfinite(capacity)[ports])
    cells, cell = np.unique(seed[way] * nports + ports[hop, way], return_inverse=True)
    left = capacity[cells % nports].astype(np.float64)
    owners, first = np.unique(cells // nports, return_index=True)
    row_of_cell = np.repeat(np.arange(len(owners)), np.diff([*first, len(cells)]))
    row_of_way = np.zeros(len(seed), np.int64)
    if len(owners):
        row_of_way = np.minimum(np.searchsorted(owners, seed), len(owners) - 1)
    rates = np.full(len(seed), np.inf)
    floor = np.zeros(len(owners))
    while len(way):
        rising = np.bincount(cell, weights=weights[way], minlength=len(cells))
        level = np.full(len(cells), np.inf)
        np.divide(left, rising, out=level, where=rising > 0)
        # Rounding must not let a level sink below the one just filled.
        level = np.maximum(level, floor[row_of_cell])
        lowest = np.minimum.reduceat(level, first)
        full = level <= lowest[row_of_cell] * (1 + _LEVEL_TOLERANCE)
        settled = np.zeros(len(seed), bool)
        settled[way[full[cell] & (rising[cell] > 0)]] = True
        rates[settled] = lowest[row_of_way[settled]] * weights[settled]
        gone = settled[way]
        left -= np.bincount(cell[gone], weights=rates[way[gone]], minlength=len(cells))
        floor = np.where(np.isfinite(lowest), lowest, floor)
        way, cell = way[~gone], cell[~gone]
    return rates


def best_times(
    ports: Ints, seed: Ints, connection: Ints, nbytes: Floats, capacity: Floats, *, seeds: int, connections: int
) -> Floats:
    """Return the time that the busiest port needs if every connection divides its bytes over its ways for the best.

    By prices: every round, each connection prefers its ways whose ports are cheap, and ports that have much to do become
    dear. The mean over all rounds comes close to the best, from above.

    Args:
        ports: As for `port_loads`.
        seed: As for `port_loads`.
        connection: Whose way each is; those of a connection under a seed stand together.
        nbytes: What the connection of each way carries in all.
        capacity: Rate of each port id; ``inf`` does not limit.
        seeds: Number of seeds.
        connections: Number of connections.

    Returns:
        Shape ``(seeds,)``.

    Source:
        Arora, Hazan and Kale, "The Multiplicative Weights Update Method", 2012, section 3.2 (concurrent flow).
    """
    nports = len(capacity)
    _, starts, owner = np.unique(seed * connections + connection, return_index=True, return_inverse=True)
    times = nbytes / capacity[np.maximum(ports, 1)] * (ports > 0)
    cell = seed * nports + ports
    total = np.zeros(seeds * nports)
    for turn in range(1, _PRICE_ROUNDS + 1):
        mean = total.reshape(seeds, nports) / max(1, turn - 1)
        top = mean.max(axis=1, keepdims=True)
        scale = np.divide(mean, top, out=np.ones_like(mean), where=top > 0)
        price = np.exp(_PRICE_SHARPNESS * (scale - 1.0)).reshape(-1)
        cost = (times * price[cell]).sum(axis=0)
        cheapest = np.minimum.reduceat(cost, starts)[owner]
        chosen = (cost <= cheapest * (1 + _COST_TOLERANCE)).astype(np.float64)
        share = chosen / np.add.reduceat(chosen, starts)[owner]
        for hop in range(len(ports)):
            total += np.bincount(cell[hop], weights=times[hop] * share, minlength=len(total))
    busiest: Floats = total.reshape(seeds, nports).max(axis=1) / _PRICE_ROUNDS
    return busiest
