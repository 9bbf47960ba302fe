"""All-reduce over two binary trees, each with half of the buffer."""

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
)
from testbed.collectives.trees import add_broadcast, add_reduction, binary_tree, double_binary_tree


class DoubleBinaryTreeAllReduce(CollectiveAlgorithm):
    """Each half of the buffer is summed up its own tree and then spread down it, slice by slice.

    A rank with two children in one tree is a leaf of the other, so no NIC carries more than twice the buffer each way:
    ``busbw`` comes within a factor ``(n - 1) / n`` of the NIC's rate, as around a ring, in ``4 * log2(n)`` hops. The trees
    have connections of their own, as NCCL's channels have. Up and down of a tree run at once.

    Leaves wait for nothing: two that share a parent send at twice the rate that it can take until they are done, and the
    switch before the parent must buffer that (NCCL bounds it by the size of its channels' buffers, which are not modelled).

    Source:
        NVIDIA/nccl, src/graph/trees.cc (the trees) and src/device/all_reduce.h, ``runTreeSplit()``.
    """

    name = "double_binary_tree"
    collective = Collective.ALL_REDUCE

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`. Each half of the buffer is a chunk."""
        check_arguments(order, size_bytes, slices)
        half = size_bytes // 2
        builder = ScheduleBuilder(len(order), size_bytes)
        halves = (slice_borders(0, half, slices), slice_borders(half, size_bytes - half, slices))
        for channel, (tree, parts) in enumerate(zip(double_binary_tree(len(order)), halves, strict=True)):
            placed = tree.over(order)
            summed = add_reduction(builder, placed, parts, channel)
            add_broadcast(builder, placed, parts, summed, channel)
        return builder.build()

    def traffic_factor(self, nranks: int) -> float:
        """Return ``2 * (n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return 2 * (nranks - 1) / nranks

    def chunk_bytes(self, size_bytes: int, nranks: int) -> int:
        """Return half of the buffer."""
        return size_bytes // 2

    def slices_per_chunk(self, nranks: int) -> int:
        """Return 8 for each level of the tree.

        Source:
            NVIDIA/nccl, src/enqueue.cc ("Optimize chunkSize / nSteps": chunks shrink until there are ``depth * 8``).
        """
        return SLICES_PER_CHUNK * binary_tree(nranks).depth
