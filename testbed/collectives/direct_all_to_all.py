"""All-to-all at once: every rank sends to every other, and nothing waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    Schedule,
    ScheduleBuilder,
    check_arguments,
    slice_borders,
)


class DirectAllToAll(CollectiveAlgorithm):
    """Every rank sends its part to all others at the same time, each over a connection of its own.

    Source:
        nccl-tests, src/alltoall.cu (``ncclSend`` and ``ncclRecv`` to all in one group).
    """

    name = "direct"
    collective = Collective.ALL_TO_ALL

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`.

        What goes to one rank is a chunk. A rank begins with its successor in the order, so that not all begin with the
        same one.
        """
        check_arguments(order, size_bytes, slices)
        nranks = len(order)
        parts = AllToAllParts(nranks, size_bytes)
        builder = ScheduleBuilder(nranks, size_bytes, in_place=False)
        for distance in range(1, nranks):
            for position, src in enumerate(order):
                add_part(builder, parts, src, order[(position + distance) % nranks], slices)
        return builder.build()

    def traffic_factor(self, nranks: int) -> float:
        """Return ``(n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return (nranks - 1) / nranks


class AllToAllParts:
    """Who sends how much to whom in an all-to-all, and where it lies.

    Every rank sends ``size_bytes`` and receives ``size_bytes``, its part for itself included; where ``size_bytes`` is no
    multiple of ``n``, rank ``r`` sends a byte more to the ranks after it (nccl-tests rounds the size down instead). Parts
    lie in the order of the other rank in both buffers.

    Attributes:
        nbytes: Shape ``(nranks, nranks)``, int64, ``[src, dst]``, bytes.
        offset_bytes: First byte within the sender's buffer, same shape.
        dst_offset_bytes: First byte within the receiver's buffer, same shape.
    """

    def __init__(self, nranks: int, size_bytes: int) -> None:
        ranks = np.arange(nranks)
        longer = (ranks[None, :] - ranks[:, None] - 1) % nranks < size_bytes % nranks
        self.nbytes: npt.NDArray[np.int64] = size_bytes // nranks + longer.astype(np.int64)
        self.offset_bytes = np.cumsum(self.nbytes, axis=1) - self.nbytes
        self.dst_offset_bytes = np.cumsum(self.nbytes, axis=0) - self.nbytes


def add_part(
    builder: ScheduleBuilder, parts: AllToAllParts, src: int, dst: int, slices: int, after: Sequence[int] = ()
) -> int | None:
    """Append the slices of one part, the first waiting for ``after``; return the handle of the last, None if empty."""
    begin, into = int(parts.offset_bytes[src, dst]), int(parts.dst_offset_bytes[src, dst])
    last = None
    for offset, nbytes in slice_borders(begin, int(parts.nbytes[src, dst]), slices):
        last = builder.add(
            src, dst, offset_bytes=offset, nbytes=nbytes, after=after, dst_offset_bytes=into + offset - begin
        )
        after = ()  # a connection sends in order
    return last
