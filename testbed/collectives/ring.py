"""Ring all-reduce: reduce-scatter, then all-gather, each rank talking to its successor only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    Schedule,
    TransferOp,
    check_arguments,
    split_evenly,
)


class RingAllReduce:
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
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`.

        Transfers are ordered by step, then position in the ring, then slice. An empty slice is empty at every
        step, because it is the same slice of the same chunk all the way round: leaving it out cuts no chain
        of dependencies.
        """
        check_arguments(order, size_bytes, slices)
        nranks = len(order)
        steps = 2 * (nranks - 1)
        chunks = split_evenly(0, size_bytes, nranks)
        borders = split_evenly(chunks[:-1], np.diff(chunks), slices)  # [chunk, slice]

        shape = (steps, nranks, slices)
        step, position = np.ogrid[:steps, :nranks]
        chunk = (position - step) % nranks
        nbytes = np.diff(borders)[chunk]
        kept = nbytes > 0
        index = np.where(kept, np.cumsum(kept).reshape(shape) - 1, -1)
        previous = np.full(shape, -1, np.int64)
        previous[1:] = np.roll(index[:-1], 1, axis=1)  # what the predecessor sent one step before
        deps = previous[kept]

        here = np.array(order, np.int32)
        successor = np.roll(here, -1)
        positions = np.broadcast_to(position[:, :, None], shape)[kept]
        ops = np.where(np.arange(steps) < nranks - 1, TransferOp.REDUCE, TransferOp.COPY).astype(np.uint8)
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

    def traffic_factor(self, nranks: int) -> float:
        """Return ``2 * (n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return 2 * (nranks - 1) / nranks
