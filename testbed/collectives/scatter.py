"""Scatter: the root sends to everybody at once."""

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


class DirectScatter(CollectiveAlgorithm):
    """The root sends every other rank its block at the same time, sharing its NIC among them.

    A block comes from the rank's place in the root's send buffer, and lands at the beginning of the receive buffer.

    Source:
        nccl-tests, src/scatter.cu.
    """

    name = "direct"
    collective = Collective.SCATTER

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`. A block is a chunk."""
        check_arguments(order, size_bytes, slices)
        borders = split_evenly(0, size_bytes, len(order)).tolist()
        builder = ScheduleBuilder(len(order), size_bytes, in_place=False)
        for dst in order[1:]:
            begin = borders[dst]
            for offset, nbytes in slice_borders(begin, borders[dst + 1] - begin, slices):
                builder.add(order[0], dst, offset_bytes=offset, nbytes=nbytes, dst_offset_bytes=offset - begin)
        return builder.build()

    def traffic_factor(self, nranks: int) -> float:
        """Return ``(n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return (nranks - 1) / nranks
