"""Ring all-reduce: reduce-scatter, then all-gather, each rank talking to its successor only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    Schedule,
    SteadyTraffic,
    TransferOp,
    check_arguments,
    split_evenly,
)


class RingAllReduce(CollectiveAlgorithm):
    """All-reduce around one ring in ``2 * (n - 1)`` steps.

    The buffer is cut into ``n`` chunks. At step ``k`` the rank at position ``p`` sends chunk ``(p - k) % n`` to
    its successor, which adds it (steps below ``n - 1``) or stores it. It is the chunk that the rank received
    one step before, so each slice waits for the arrival of the same slice in the step before.

    Source:
        Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
    """

    name = "ring"
    collective = Collective.ALL_REDUCE

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`."""
        check_arguments(order, size_bytes, slices)
        nranks = len(order)
        step, position = np.ogrid[: 2 * (nranks - 1), :nranks]
        return build_ring_steps(order, size_bytes, slices, (position - step) % nranks, reduce_steps=nranks - 1)

    def steady_traffic(self, order: Sequence[int], size_bytes: int) -> SteadyTraffic:
        """Return a ring; see `CollectiveAlgorithm.steady_traffic`."""
        return SteadyTraffic.around(order, 2 * (len(order) - 1) / len(order) * size_bytes)

    def traffic_factor(self, nranks: int) -> float:
        """Return ``2 * (n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return 2 * (nranks - 1) / nranks


def build_ring_steps(
    order: Sequence[int], size_bytes: int, slices: int, chunk: npt.NDArray[np.int64], *, reduce_steps: int
) -> Schedule:
    """Return the schedule of a ring in which every rank sends one chunk to its successor at every step.

    Each slice waits for the same slice of the step before, which its sender received then. Transfers are ordered by step,
    then position in the ring, then slice. An empty slice is empty at every step, because it is the same slice of the same
    chunk all the way round: leaving it out cuts no chain of dependencies.

    Args:
        order: The ranks around the ring.
        size_bytes: Size of the buffer.
        slices: Slices of a chunk.
        chunk: The chunk that each position sends at each step, shape ``(steps, n)``; chunk ``c`` is block ``c`` of the
            buffer. What a position sends is what its predecessor sent one step before.
        reduce_steps: Number of steps, the first ones, whose slices are added at the receiver.
    """
    nranks = len(order)
    steps = len(chunk)
    chunks = split_evenly(0, size_bytes, nranks)
    borders = split_evenly(chunks[:-1], np.diff(chunks), slices)  # [chunk, slice]

    shape = (steps, nranks, slices)
    nbytes = np.diff(borders)[chunk]
    kept = nbytes > 0
    index = np.where(kept, np.cumsum(kept).reshape(shape) - 1, -1)
    previous = np.full(shape, -1, np.int64)
    previous[1:] = np.roll(index[:-1], 1, axis=1)  # what the predecessor sent one step before
    deps = previous[kept]

    here = np.array(order, np.int32)
    successor = np.roll(here, -1)
    positions = np.broadcast_to(np.arange(nranks)[None, :, None], shape)[kept]
    ops = np.where(np.arange(steps) < reduce_steps, TransferOp.REDUCE, TransferOp.COPY).astype(np.uint8)
    return Schedule(
        nranks=nranks,
        size_bytes=size_bytes,
        src=here[positions],
        dst=successor[positions],
        nbytes=nbytes[kept],
        offset_bytes=borders[:, :-1][chunk][kept],
        op=np.broadcast_to(ops[:, None, None], shape)[kept],
        connection=positions.astype(np.int32),
        dep_offsets=np.concatenate(([0], np.cumsum(deps >= 0))),
        deps=deps[deps >= 0],
        connections=tuple(zip(here.tolist(), successor.tolist(), strict=True)),
    )
