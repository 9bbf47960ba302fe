"""Send-receive: every rank sends its whole buffer to its successor, once, all at the same time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


class RingSendRecv(CollectiveAlgorithm):
    """Every rank sends to its successor around the ring; nothing waits for anything.

    Source:
        nccl-tests, src/sendrecv.cu.
    """

    name = "direct"
    collective = Collective.SEND_RECV

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`. The whole buffer is one chunk."""
        check_arguments(order, size_bytes, slices)
        nranks = len(order)
        borders = split_evenly(0, size_bytes, slices)
        kept = np.diff(borders) > 0
        per_rank = int(kept.sum())
        transfers = nranks * per_rank

        here = np.array(order, np.int32)
        successor = np.roll(here, -1)
        return Schedule(
            nranks=nranks,
            size_bytes=size_bytes,
            src=np.repeat(here, per_rank),
            dst=np.repeat(successor, per_rank),
            nbytes=np.tile(np.diff(borders)[kept], nranks),
            offset_bytes=np.tile(borders[:-1][kept], nranks),
            op=np.full(transfers, TransferOp.COPY, np.uint8),
            connection=np.repeat(np.arange(nranks, dtype=np.int32), per_rank),
            dep_offsets=np.zeros(transfers + 1, np.int64),
            deps=np.zeros(0, np.int64),
            connections=tuple(zip(here.tolist(), successor.tolist(), strict=True)),
            in_place=False,
        )

    def steady_traffic(self, order: Sequence[int], size_bytes: int) -> SteadyTraffic:
        """Return a ring; see `CollectiveAlgorithm.steady_traffic`."""
        return SteadyTraffic.around(order, size_bytes)

    def traffic_factor(self, nranks: int) -> float:
        """Return 1; see `CollectiveAlgorithm.traffic_factor`."""
        return 1.0

    def chunk_bytes(self, size_bytes: int, nranks: int) -> int:
        """Return the size of the buffer."""
        return size_bytes
