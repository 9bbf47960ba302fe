"""Each rank's buffers with real contents: what carriers that move data send from and write to, and the check of the outcome."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.collectives.proof import expected_result
from testbed.collectives.schedule import Collective, TransferOp

# Sums wrap around: exact in any order, so that a wrong element is a wrong transfer and nothing else.
Bytes = npt.NDArray[np.uint8]


class RankBuffers:
    """The buffers of all ranks, filled from a seed.

    Elements are bytes (``uint8`` in nccl-tests' words), sums are modulo 256.

    Args:
        schedule: What will be sent.
        seed: Of the contents.

    Attributes:
        inputs: What each rank held before, shape ``(nranks, size_bytes)``.
        outputs: What is written; sent from as well where the schedule works in place.
    """

    def __init__(self, schedule: Schedule, seed: int) -> None:
        self._schedule = schedule
        shape = (schedule.nranks, schedule.size_bytes)
        self.inputs: Bytes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        self.outputs: Bytes = np.empty_like(self.inputs)
        self._src, self._dst = schedule.src.tolist(), schedule.dst.tolist()
        self._nbytes, self._op = schedule.nbytes.tolist(), schedule.op.tolist()
        self._src_offset, self._dst_offset = schedule.offset_bytes.tolist(), schedule.dst_offset_bytes.tolist()
        self.restart()

    def restart(self) -> None:
        """Fill the buffers as they were before."""
        self.outputs[:] = self.inputs if self._schedule.in_place else 0

    def source(self, transfer: int) -> Bytes:
        """Return the bytes that a transfer sends, a view."""
        sources = self.outputs if self._schedule.in_place else self.inputs
        begin = self._src_offset[transfer]
        return sources[self._src[transfer], begin : begin + self._nbytes[transfer]]

    def deliver(self, transfer: int, data: Bytes) -> None:
        """Do at the receiver what a transfer asks for: copy or add."""
        begin = self._dst_offset[transfer]
        target = self.outputs[self._dst[transfer], begin : begin + self._nbytes[transfer]]
        if self._op[transfer] == TransferOp.REDUCE:
            np.add(target, data, out=target)
        else:
            target[:] = data

    def count_wrong_elements(self, collective: Collective, order: tuple[int, ...]) -> int:
        """Return how many elements are not what the collective promises, all ranks together."""
        expected = expected_result(collective, order, self.inputs)  # type: ignore[arg-type]  # sums are cut to bytes below
        wrong = 0
        for rank in range(self._schedule.nranks):
            values = expected.values[rank].astype(np.uint8)
            wrong += int(np.count_nonzero((values != self.outputs[rank]) & expected.promised[rank]))
        return wrong

    def count_undelivered(self) -> int:
        """Return how many bytes of a pattern's flows are not at their receiver as they were sent; each is copied once."""
        wrong = 0
        for transfer, nbytes in enumerate(self._nbytes):
            begin = self._dst_offset[transfer]
            written = self.outputs[self._dst[transfer], begin : begin + nbytes]
            wrong += int(np.count_nonzero(written != self.source(transfer)))
        return wrong
