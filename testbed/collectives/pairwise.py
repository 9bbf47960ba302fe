"""Pairwise all-to-all: one partner at a time."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.collectives.direct_all_to_all import AllToAllParts, add_part
from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    Schedule,
    ScheduleBuilder,
    check_arguments,
)


class PairwiseAllToAll(CollectiveAlgorithm):
    """All-to-all in ``n - 1`` steps; at step ``k`` position ``p`` sends to ``p + k`` and receives from ``p - k``.

    What waits: at each rank, the first slice of step ``k`` waits until the *last* slice of what the rank receives in step
    ``k - 1`` has arrived; the other slices follow it in order. So a rank receives from one other at a time while all are
    in step, and every step pays a path's latency. It does not wait for the completion of its own send, which
    ``MPI_Sendrecv`` would: a rank that received early sends two parts at once for a while. Nothing else waits: there is no
    barrier, so ranks may drift apart by as much as their steps differ.

    Source:
        Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005, section 4.3
        (the pairwise exchange for long messages).
    """

    name = "pairwise"
    collective = Collective.ALL_TO_ALL

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`. What goes to one rank is a chunk.

        Where a rank receives nothing in a step (fewer bytes than ranks), it waits for what it received before.
        """
        check_arguments(order, size_bytes, slices)
        nranks = len(order)
        parts = AllToAllParts(nranks, size_bytes)
        builder = ScheduleBuilder(nranks, size_bytes, in_place=False)
        received: dict[int, int] = {}  # rank -> what it received last
        for step in range(1, nranks):
            arriving = {}
            for position, src in enumerate(order):
                dst = order[(position + step) % nranks]
                after = [received[src]] if src in received else []
                last = add_part(builder, parts, src, dst, slices, after)
                if last is not None:
                    arriving[dst] = last
            received |= arriving
        return builder.build()

    def traffic_factor(self, nranks: int) -> float:
        """Return ``(n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return (nranks - 1) / nranks
