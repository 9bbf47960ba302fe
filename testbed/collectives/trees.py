"""Trees over the ranks, and the transfers that run down and up a tree in a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testbed.collectives.schedule import ScheduleBuilder, TransferOp


@dataclass(frozen=True, slots=True)
class Tree:
    """A rooted tree over ranks.

    Attributes:
        root: The rank at the top.
        children: Children of each rank, by rank.
    """

    root: int
    children: tuple[tuple[int, ...], ...]

    def levels(self) -> list[list[int]]:
        """Return the ranks by their distance from the root."""
        levels = [[self.root]]
        while below := [child for rank in levels[-1] for child in self.children[rank]]:
            levels.append(below)
        return levels

    @property
    def depth(self) -> int:
        """Return the number of hops from the root to the farthest rank."""
        return len(self.levels()) - 1

    def over(self, order: Sequence[int]) -> Tree:
        """Return the same tree with rank ``order[p]`` in the place of ``p``."""
        children: list[tuple[int, ...]] = [()] * len(order)
        for position, below in enumerate(self.children):
            children[order[position]] = tuple(order[child] for child in below)
        return Tree(order[self.root], tuple(children))


def chain(nranks: int) -> Tree:
    """Return the tree in which rank ``p`` has the one child ``p + 1``."""
    return Tree(0, tuple((rank + 1,) if rank + 1 < nranks else () for rank in range(nranks)))


def binary_tree(nranks: int) -> Tree:
    """Return NCCL's binary tree: rank 0 on top with one child, below it a tree in which odd ranks are leaves.

    The parent of a rank whose lowest set bit is ``b`` is found by clearing ``b`` and setting the bit above it, or by
    clearing ``b`` alone where that leaves the ranks.

    Source:
        NVIDIA/nccl, src/graph/trees.cc, ``ncclGetBtree()``.
    """
    children: list[list[int]] = [[] for _ in range(nranks)]
    for rank in range(1, nranks):
        bit = rank & -rank
        parent = (rank ^ bit) | (bit << 1)
        if parent >= nranks:
            parent = rank ^ bit
        children[parent].append(rank)
    return Tree(0, tuple(tuple(below) for below in children))


def double_binary_tree(nranks: int) -> tuple[Tree, Tree]:
    """Return NCCL's two trees: a rank that has children in one is a leaf in the other, all but a root or two.

    The second is the first mirrored (``n - 1 - rank``) where ``nranks`` is even, else shifted by one rank.

    Source:
        NVIDIA/nccl, src/graph/trees.cc, ``ncclGetDtree()``; Sanders, Speck and Träff, "Two-tree algorithms for full
        bandwidth broadcast, reduction and scan", 2009.
    """
    first = binary_tree(nranks)
    if nranks % 2:
        return first, first.over([(rank + 1) % nranks for rank in range(nranks)])
    return first, first.over([nranks - 1 - rank for rank in range(nranks)])


Slices = Sequence[tuple[int, int]]
"""First byte and size of each slice."""

Handles = list[list[int]]
"""Handles of what a rank received, by slice."""


def add_reduction(builder: ScheduleBuilder, tree: Tree, slices: Slices, channel: int = 0) -> Handles:
    """Append the transfers that sum up at the root, from the leaves upwards.

    A rank sends a slice to its parent as soon as it has that slice from all its children.

    Returns:
        What arrives at the root.
    """
    received: dict[int, Handles] = {rank: [[] for _ in slices] for rank in range(len(tree.children))}
    parents = {child: rank for rank, below in enumerate(tree.children) for child in below}
    for level in reversed(tree.levels()[1:]):
        for rank in level:
            for number, (offset, nbytes) in enumerate(slices):
                handle = builder.add(
                    rank,
                    parents[rank],
                    offset_bytes=offset,
                    nbytes=nbytes,
                    op=TransferOp.REDUCE,
                    after=received[rank][number],
                    channel=channel,
                )
                received[parents[rank]][number].append(handle)
    return received[tree.root]


def add_broadcast(builder: ScheduleBuilder, tree: Tree, slices: Slices, after: Handles, channel: int = 0) -> None:
    """Append the transfers that spread from the root, from the top downwards.

    A rank passes a slice on to its children as soon as it has it.

    Args:
        builder: Where to append.
        tree: The tree.
        slices: What is sent.
        after: Handles of what the root waits for, by slice.
        channel: Which of several connections between two ranks.
    """
    received = {tree.root: after}
    for level in tree.levels():
        for rank in level:
            for child in tree.children[rank]:
                received[child] = [
                    [
                        builder.add(
                            rank,
                            child,
                            offset_bytes=offset,
                            nbytes=nbytes,
                            after=received[rank][number],
                            channel=channel,
                        )
                    ]
                    for number, (offset, nbytes) in enumerate(slices)
                ]
