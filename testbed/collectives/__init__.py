"""Collectives as schedules: who sends which bytes to whom, and what each transfer waits for.

Adding an algorithm is a file with a class that follows `CollectiveAlgorithm`, and its line in `ALGORITHMS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from testbed.collectives.ideal import ideal_arrivals_ns, ideal_cct_ns, largest_frame_wire_bytes, wire_bytes
from testbed.collectives.order import RingOrder, ring_order
from testbed.collectives.ring import RingAllReduce
from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    Schedule,
    ScheduleBuilder,
    TransferOp,
)
from testbed.collectives.send_recv import RingSendRecv

ALGORITHMS: Mapping[Collective, Mapping[str, CollectiveAlgorithm]] = {
    Collective.ALL_REDUCE: {"ring": RingAllReduce()},
    Collective.SEND_RECV: {"direct": RingSendRecv()},
}
"""Every algorithm by collective and name; the first of a collective is its default."""


def find_algorithm(collective: str, algorithm: str | None = None) -> CollectiveAlgorithm:
    """Return the algorithm of that name, or the collective's default when no name is given.

    Raises:
        ValueError: If there is no such collective or algorithm; the message lists those there are.
    """
    if collective not in set(Collective):
        raise ValueError(f"collective must be one of {', '.join(Collective)}, got {collective!r}")
    known = ALGORITHMS[Collective(collective)]
    if algorithm is None:
        return next(iter(known.values()))
    if algorithm not in known:
        raise ValueError(f"algorithm of {collective} must be one of {', '.join(known)}, got {algorithm!r}")
    return known[algorithm]


__all__ = [
    "ALGORITHMS",
    "SLICES_PER_CHUNK",
    "Collective",
    "CollectiveAlgorithm",
    "RingAllReduce",
    "RingOrder",
    "RingSendRecv",
    "Schedule",
    "ScheduleBuilder",
    "TransferOp",
    "find_algorithm",
    "ideal_arrivals_ns",
    "ideal_cct_ns",
    "largest_frame_wire_bytes",
    "ring_order",
    "wire_bytes",
]
