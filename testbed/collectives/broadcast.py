"""Broadcast, pipelined: along a ring, and down a binary tree."""

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
from testbed.collectives.trees import Tree, add_broadcast, binary_tree, chain


class RingBroadcast(CollectiveAlgorithm):
    """The root sends to its successor, which passes each slice on as soon as it has it, to the last rank of the ring.

    The whole buffer is one chunk, cut into 8 slices for each hop: while the pipeline fills and empties, ``n - 2`` slice
    times go by, an eighth of the whole.

    Source:
        NVIDIA/nccl, src/device/broadcast.h.
    """

    name = "ring"
    collective = Collective.BROADCAST

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`. The first rank of the order is the root."""
        return _build_broadcast(chain(len(order)), order, size_bytes, slices)

    def traffic_factor(self, nranks: int) -> float:
        """Return 1; see `CollectiveAlgorithm.traffic_factor`."""
        return 1.0

    def chunk_bytes(self, size_bytes: int, nranks: int) -> int:
        """Return the size of the buffer."""
        return size_bytes

    def slices_per_chunk(self, nranks: int) -> int:
        """Return 8 for each hop."""
        return SLICES_PER_CHUNK * (nranks - 1)


class BinaryTreeBroadcast(CollectiveAlgorithm):
    """The root sends to its child, every rank passes each slice on to its children as soon as it has it.

    Few hops, so low latency; but a rank with two children sends the buffer twice, so at most half of the NIC's rate is
    busbw (two trees would mend that, see `double_binary_tree`).

    Source:
        NVIDIA/nccl, src/graph/trees.cc, for the tree; NCCL itself broadcasts along rings only.
    """

    name = "binary_tree"
    collective = Collective.BROADCAST

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`. The first rank of the order is the root."""
        return _build_broadcast(binary_tree(len(order)), order, size_bytes, slices)

    def traffic_factor(self, nranks: int) -> float:
        """Return 1; see `CollectiveAlgorithm.traffic_factor`."""
        return 1.0

    def chunk_bytes(self, size_bytes: int, nranks: int) -> int:
        """Return the size of the buffer."""
        return size_bytes

    def slices_per_chunk(self, nranks: int) -> int:
        """Return 8 for each level of the tree."""
        return SLICES_PER_CHUNK * binary_tree(nranks).depth


def _build_broadcast(tree: Tree, order: Sequence[int], size_bytes: int, slices: int) -> Schedule:
    check_arguments(order, size_bytes, slices)
    builder = ScheduleBuilder(len(order), size_bytes)
    parts = slice_borders(0, size_bytes, slices)
    add_broadcast(builder, tree.over(order), parts, after=[[] for _ in parts])
    return builder.build()
