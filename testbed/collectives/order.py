"""The order in which a collective visits the ranks of a fabric."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np


class RingOrder(StrEnum):
    """How a ring is laid over the racks; ranks are numbered rack after rack, and host after host within."""

    PACKED = "packed"
    """0, 1, 2, …: the GPUs of a host in turn; only the last rank of a rack talks to another rack."""
    RAILS = "rails"
    """One rank of each rack in turn, GPU 0 of each rack's first host first: with equal racks every hop crosses the spine, and
    joins GPUs of the same number."""
    MIN_CUT = "min_cut"
    """Zone after zone, within each as ``rails``: one hop leaves each zone. With one zone alone it is ``rails``."""
    RANDOM = "random"
    """Any order, drawn at random."""


def ring_order(
    kind: str | Sequence[int],
    ranks_per_leaf: Sequence[int],
    rng: np.random.Generator | None = None,
    *,
    zones: int = 1,
) -> tuple[int, ...]:
    """Return the ranks in the order in which the ring, or another algorithm, visits them.

    Args:
        kind: A `RingOrder` or its text, or the ranks themselves.
        ranks_per_leaf: Number of ranks under each leaf, in leaf order.
        zones: Into how many zones the leaves divide, evenly; those of a zone follow each other.
        rng: Draws a ``random`` order; not used, and not needed, for others.

    Returns:
        Each rank once. ``rails`` goes over the racks in turn and skips those whose ranks are used up, so that
        some hops stay inside a rack when racks are uneven.

    Raises:
        ValueError: If ``kind`` is unknown, a list that does not hold each rank once, or ``random`` without ``rng``.

    Example:
        >>> ring_order("rails", [2, 2, 1])
        (0, 2, 4, 1, 3)
    """
    nranks = sum(ranks_per_leaf)
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
    if kind == RingOrder.MIN_CUT and zones > 1:
        size, zoned = len(ranks_per_leaf) // zones, []
        for zone in range(zones):
            begin = sum(ranks_per_leaf[: zone * size])
            within = ring_order(RingOrder.RAILS, ranks_per_leaf[zone * size : (zone + 1) * size])
            zoned += [begin + rank for rank in within]
        return tuple(zoned)
    first = [sum(ranks_per_leaf[:leaf]) for leaf in range(len(ranks_per_leaf))]
    return tuple(
        first[leaf] + number
        for number in range(max(ranks_per_leaf, default=0))
        for leaf, ranks in enumerate(ranks_per_leaf)
        if number < ranks
    )
