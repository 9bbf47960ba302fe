"""The order in which a collective visits the ranks of a fabric."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np


class RingOrder(StrEnum):
    """How a ring is laid over the racks; ranks are numbered rack after rack."""

    PACKED = "packed"
    """0, 1, 2, …: only the last rank of a rack talks to another rack."""
    RAILS = "rails"
    """One rank of each rack in turn: with equal racks every hop crosses the spine."""
    RANDOM = "random"
    """Any order, drawn at random."""


def ring_order(
    kind: str | Sequence[int], hosts_per_leaf: Sequence[int], rng: np.random.Generator | None = None
) -> tuple[int, ...]:
    """Return the ranks in the order in which the ring, or another algorithm, visits them.

    Args:
        kind: A `RingOrder` or its text, or the ranks themselves.
        hosts_per_leaf: Number of ranks under each leaf, in leaf order.
        rng: Draws a ``random`` order; not used, and not needed, for others.

    Returns:
        Each rank once. ``rails`` goes over the racks in turn and skips those whose hosts are used up, so that
        some hops stay inside a rack when racks are uneven.

    Raises:
        ValueError: If ``kind`` is unknown, a list that does not hold each rank once, or ``random`` without ``rng``.

    Example:
        >>> ring_order("rails", [2, 2, 1])
        (0, 2, 4, 1, 3)
    """
    nranks = sum(hosts_per_leaf)
    if not isinstance(kind, str):
        order = tuple(int(rank) for rank in kind)
        if sorted(order) != list(range(nranks)):
            raise ValueError(f"order must hold each rank from 0 to {nranks - 1} once, got {list(order)}")
        return order
    if kind not in set(RingOrder):
        raise ValueError(f"order must be one of {', '.join(RingOrder)} or a list of ranks, got {kind!r}")
    if kind == RingOrder.PACKED:
        return tuple(range(nranks))
    if kind == RingOrder.RANDOM:
        if rng is None:
            raise ValueError("a random order needs a source of random numbers")
        return tuple(rng.permutation(nranks).tolist())
    first = [sum(hosts_per_leaf[:leaf]) for leaf in range(len(hosts_per_leaf))]
    return tuple(
        first[leaf] + host
        for host in range(max(hosts_per_leaf, default=0))
        for leaf, hosts in enumerate(hosts_per_leaf)
        if host < hosts
    )
