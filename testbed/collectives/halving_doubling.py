"""All-reduce by recursive halving and doubling."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    Schedule,
    ScheduleBuilder,
    TransferOp,
    check_arguments,
    slice_borders,
)

Range = tuple[int, int]
"""Blocks of the buffer from the first to before the second."""


class HalvingDoublingAllReduce(CollectiveAlgorithm):
    """All-reduce in ``2 * log2(n)`` steps, each with another partner.

    Halving: at step ``k`` positions that differ in bit ``k`` exchange halves of the range that they still share; the one
    whose bit is 0 keeps the lower half, adds what it gets and goes on with it. After ``log2(n)`` steps each has a block of
    its own, summed up. Doubling: the same steps backwards; each sends all that it has, which doubles every time.

    What is sent in one step is a chunk. Its first slice waits until the last slices of all that the rank received in
    earlier steps have arrived (some of them have, whenever others have); its other slices follow in order. Letting each
    slice go as soon as its bytes are there was tried: steps then share the NIC, the early ones that all others wait for
    slow down, and 64 ranks lose a fifth of the bandwidth.

    It needs a power of two of ranks: otherwise some ranks have no partner. (MPICH lets the surplus ranks hand their
    buffers to a neighbour first, which costs two more transfers of the whole buffer; NCCL has no such algorithm.)

    Source:
        Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005, section 4.5
        (recursive vector halving and distance doubling).
    """

    name = "halving_doubling"
    collective = Collective.ALL_REDUCE

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`.

        Raises:
            ValueError: If an argument breaks its rule, or the number of ranks is no power of two.
        """
        check_arguments(order, size_bytes, slices)
        nranks = len(order)
        if nranks & (nranks - 1):
            raise ValueError(
                f"halving_doubling needs a power of two of ranks, got {nranks}: every rank needs a partner"
            )
        builder = ScheduleBuilder(nranks, size_bytes)
        received: list[list[int]] = [[] for _ in order]  # by position: the last slice of each step

        def exchange(step: int, sent: Sequence[Range], op: TransferOp) -> None:
            """Let every position send a range to its partner of a step."""
            arriving: dict[int, int] = {}
            for position, (first, last) in enumerate(sent):
                partner = position ^ (1 << step)
                begin, end = first * size_bytes // nranks, last * size_bytes // nranks
                after = received[position]
                for offset, nbytes in slice_borders(begin, end - begin, slices):
                    arriving[partner] = builder.add(
                        order[position], order[partner], offset_bytes=offset, nbytes=nbytes, op=op, after=after
                    )
                    after = []  # a connection sends in order
            for position, handle in arriving.items():
                received[position].append(handle)

        steps = nranks.bit_length() - 1
        ranges: list[Range] = [(0, nranks)] * nranks
        kept: list[list[Range]] = []
        for step in range(steps):
            halves = [((first, (first + last) // 2), ((first + last) // 2, last)) for first, last in ranges]
            exchange(step, [pair[1 - (p >> step & 1)] for p, pair in enumerate(halves)], TransferOp.REDUCE)
            ranges = [pair[p >> step & 1] for p, pair in enumerate(halves)]
            kept.append(ranges)
        for step in reversed(range(steps)):
            exchange(step, kept[step], TransferOp.COPY)
        return builder.build()

    def traffic_factor(self, nranks: int) -> float:
        """Return ``2 * (n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return 2 * (nranks - 1) / nranks
