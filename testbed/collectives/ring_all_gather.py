"""Ring all-gather: the second half of the ring all-reduce."""

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


class RingAllGather(CollectiveAlgorithm):
    """All-gather around one ring in ``n - 1`` steps.

    At step ``k`` the rank at position ``p`` passes on the block of the rank at position ``(p - k) % n``: its own first,
    then what it received one step before. In place: a rank's own block stands where it belongs from the beginning.

    Source:
        NVIDIA/nccl, src/device/all_gather.h.
    """

    name = "ring"
    collective = Collective.ALL_GATHER

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`."""
        check_arguments(order, size_bytes, slices)
        nranks = len(order)
        step, position = np.ogrid[: nranks - 1, :nranks]
        chunk = np.array(order, np.int64)[(position - step) % nranks]
        return build_ring_steps(order, size_bytes, slices, chunk, reduce_steps=0)

    def steady_traffic(self, order: Sequence[int], size_bytes: int) -> SteadyTraffic:
        """Return a ring; see `CollectiveAlgorithm.steady_traffic`."""
        return SteadyTraffic.around(order, (len(order) - 1) / len(order) * size_bytes)

    def traffic_factor(self, nranks: int) -> float:
        """Return ``(n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return (nranks - 1) / nranks
