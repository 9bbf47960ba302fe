"""Reduce, pipelined: the broadcasts of `broadcast` run backwards, adding instead of copying."""

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
from testbed.collectives.trees import Tree, add_reduction, binary_tree, chain


class RingReduce(CollectiveAlgorithm):
    """The last rank of the order sends to the one before it, which adds its own and passes on, up to the root.

    The whole buffer is one chunk, cut into 8 slices for each hop. Partial sums pass through the ranks' own buffers.

    Source:
        NVIDIA/nccl, src/device/reduce.h (whose ring turns the other way round).
    """

    name = "ring"
    collective = Collective.REDUCE

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`. The first rank of the order is the root."""
        return _build_reduce(chain(len(order)), order, size_bytes, slices)

    def traffic_factor(self, nranks: int) -> float:
        """Return 1; see `CollectiveAlgorithm.traffic_factor`."""
        return 1.0

    def chunk_bytes(self, size_bytes: int, nranks: int) -> int:
        """Return the size of the buffer."""
        return size_bytes

    def slices_per_chunk(self, nranks: int) -> int:
        """Return 8 for each hop."""
        return SLICES_PER_CHUNK * (nranks - 1)


class BinaryTreeReduce(CollectiveAlgorithm):
    """Every rank adds what its children send to its own and passes each slice on to its parent.

    A rank with two children receives the buffer twice, so at most half of the NIC's rate is busbw. Leaves wait for
    nothing: two that share a parent send at twice the rate that it can take until they are done, and the switch before
    the parent must buffer that (NCCL bounds it by the size of its channels' buffers, which are not modelled).

    Source:
        NVIDIA/nccl, src/graph/trees.cc, for the tree; NCCL itself reduces along rings only.
    """

    name = "binary_tree"
    collective = Collective.REDUCE

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`. The first rank of the order is the root."""
        return _build_reduce(binary_tree(len(order)), order, size_bytes, slices)

    def traffic_factor(self, nranks: int) -> float:
        """Return 1; see `CollectiveAlgorithm.traffic_factor`."""
        return 1.0

    def chunk_bytes(self, size_bytes: int, nranks: int) -> int:
        """Return the size of the buffer."""
        return size_bytes

    def slices_per_chunk(self, nranks: int) -> int:
        """Return 8 for each level of the tree."""
        return SLICES_PER_CHUNK * binary_tree(nranks).depth


def _build_reduce(tree: Tree, order: Sequence[int], size_bytes: int, slices: int) -> Schedule:
    check_arguments(order, size_bytes, slices)
    builder = ScheduleBuilder(len(order), size_bytes)
    add_reduction(builder, tree.over(order), slice_borders(0, size_bytes, slices))
    return builder.build()
