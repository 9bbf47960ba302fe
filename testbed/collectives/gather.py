"""Gather: everybody sends to the root at once."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    Schedule,
    ScheduleBuilder,
    check_arguments,
    slice_borders,
    split_evenly,
)


class DirectGather(CollectiveAlgorithm):
    """Every rank but the root sends its block to the root at the same time: an incast.

    A rank's block is the first of its send buffer, and lands at the rank's place in the root's receive buffer.

    Source:
        nccl-tests, src/gather.cu.
    """

    name = "direct"
    collective = Collective.GATHER

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`. A block is a chunk."""
        check_arguments(order, size_bytes, slices)
        borders = split_evenly(0, size_bytes, len(order)).tolist()
        builder = ScheduleBuilder(len(order), size_bytes, in_place=False)
        for src in order[1:]:
            for offset, nbytes in slice_borders(0, borders[src + 1] - borders[src], slices):
                builder.add(src, order[0], offset_bytes=offset, nbytes=nbytes, dst_offset_bytes=borders[src] + offset)
        return builder.build()

    def traffic_factor(self, nranks: int) -> float:
        """Return ``(n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return (nranks - 1) / nranks
