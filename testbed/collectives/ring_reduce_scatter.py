"""Ring reduce-scatter: the first half of the ring all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from testbed.collectives.ring import build_ring_steps
from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    Schedule,
    SteadyTraffic,
    check_arguments,
)


class RingReduceScatter(CollectiveAlgorithm):
    """Reduce-scatter around one ring in ``n - 1`` steps.

    At step ``k`` the rank at position ``p`` sends the block of the rank at position ``(p - k - 1) % n`` to its successor,
    which adds it to its own. After ``n - 1`` steps each rank has received its own block last, with everybody's share in
    it. Partial sums pass through the same buffer, so a rank's other blocks are used up.

    Source:
        NVIDIA/nccl, src/device/reduce_scatter.h (the same walk, its partial sums in the channels' buffers).
    """

    name = "ring"
    collective = Collective.REDUCE_SCATTER

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`."""
        check_arguments(order, size_bytes, slices)
        nranks = len(order)
        step, position = np.ogrid[: nranks - 1, :nranks]
        chunk = np.array(order, np.int64)[(position - step - 1) % nranks]
        return build_ring_steps(order, size_bytes, slices, chunk, reduce_steps=nranks - 1)

    def steady_traffic(self, order: Sequence[int], size_bytes: int) -> SteadyTraffic:
        """Return a ring; see `CollectiveAlgorithm.steady_traffic`."""
        return SteadyTraffic.around(order, (len(order) - 1) / len(order) * size_bytes)

    def traffic_factor(self, nranks: int) -> float:
        """Return ``(n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return (nranks - 1) / nranks
