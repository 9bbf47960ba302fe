"""Samples of counters as rows of a series: increments, without the rows in which nothing happened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.measure.sample_ring import QP_FIELDS, QUEUE_FIELDS

Columns = dict[str, npt.NDArray[Any]]
RATE_STATE = "rate_limit_bytes_per_s"


@dataclass(frozen=True, slots=True)
class QpLabels:
    """Whose samples those of a row of the results are: QP number and ranks, shape ``(qps,)`` each."""

    qpn: npt.NDArray[np.int32]
    src_rank: npt.NDArray[np.int16]
    dst_rank: npt.NDArray[np.int16]


class SampleRows:
    """Turns samples into the rows of both tables.

    Args:
        time_dilation: Wall time per emulated time.
        priorities: The data priorities: a sample has a queue for each of them at each port, port by port.
        labels: The QPs of each row of the results.
        states: Names of the states of congestion control, in the order of the samples.
    """

    def __init__(
        self, *, time_dilation: float, priorities: Sequence[int], labels: Sequence[QpLabels], states: Sequence[str]
    ) -> None:
        self._dilation, self._priorities = time_dilation, np.array(priorities, np.int64)
        self._labels, self._states = list(labels), list(states)
        self._origin_ns: int | None = None
        self._last: npt.NDArray[Any] | None = None

    def split(self, samples: npt.NDArray[Any]) -> Iterator[tuple[Columns, Columns]]:
        """Yield the rows of queues and of QPs, a pair for each stretch of one iteration.

        Args:
            samples: The next ones in order of time, shape ``(samples,)``, of type `RingShape.sample`.
        """
        if self._last is not None:
            samples = np.concatenate([self._last, samples])
        if not len(samples):
            return
        if self._origin_ns is None:
            self._origin_ns = int(samples["now_ns"][0])
        # The first sample of an iteration, and the last one seen before, only say where increments begin.
        bounds = [0, *(np.flatnonzero(samples["first"][1:]) + 1).tolist(), len(samples)]
        for begin, end in pairwise(bounds):
            if end - begin > 1:
                stretch = samples[begin:end]
                yield self._queue_rows(stretch), self._qp_rows(stretch)
        self._last = samples[-1:].copy()

    def _queue_rows(self, samples: npt.NDArray[Any]) -> Columns:
        counters = samples["queues"]
        increments = np.diff(counters, axis=0)
        values: Columns = {name: increments[:, index] for index, name in enumerate(QUEUE_FIELDS)}
        depth = counters[1:, QUEUE_FIELDS.index("enq_bytes")] - counters[1:, QUEUE_FIELDS.index("deq_bytes")]
        values |= {"depth_bytes": depth, "ingress_used_bytes": samples["used_bytes"][1:]}
        values["ingress_xoff"] = samples["xoff"][1:] != 0
        values["paused"] = samples["closed"][:-1] != 0  # gates move right after a sample
        happened: npt.NDArray[np.bool_] = np.zeros(depth.shape, bool)
        for column in values.values():
            happened |= column != 0
        when, watched, rows = _pick(values, happened)
        count = len(self._priorities)
        rows |= {"port": watched // count, "priority": self._priorities[watched % count]}
        return rows | self._when(samples, when)

    def _qp_rows(self, samples: npt.NDArray[Any]) -> Columns:
        labels = self._labels[int(samples["row"][0])]
        qps = len(labels.qpn)
        increments = np.diff(samples["qps"][:, :, :qps], axis=0)
        values: Columns = {name: increments[:, index] for index, name in enumerate(QP_FIELDS)}
        happened: npt.NDArray[np.bool_] = (increments != 0).any(axis=1)
        for index, name in enumerate(self._states):
            state = samples["states"][:, index, :qps]
            values[name] = state[1:]
            if name == RATE_STATE:
                happened |= state[1:] != state[:-1]
        when, which, rows = _pick(values, happened)
        rows |= {"qpn": labels.qpn[which], "src_rank": labels.src_rank[which], "dst_rank": labels.dst_rank[which]}
        return rows | self._when(samples, when)

    def _when(self, samples: npt.NDArray[Any], which: npt.NDArray[np.intp]) -> Columns:
        """Return the columns that say when, for rows of the samples behind the first."""
        assert self._origin_ns is not None
        time_ns = np.rint((samples["now_ns"] - self._origin_ns) / self._dilation).astype(np.int64)
        begins = samples[:1]
        return {
            "time_ns": time_ns[1:][which],
            "interval_ns": np.diff(time_ns)[which],
            **{name: np.full(len(which), begins[name][0]) for name in ("row", "iteration")},
            "warmup": np.full(len(which), begins["warmup"][0] != 0),
        }


def _pick(
    values: Mapping[str, npt.NDArray[Any]], happened: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Columns]:
    """Return the sample and the column of every place where something happened, and the values there."""
    samples, places = np.nonzero(happened)
    return samples, places, {name: column[happened] for name, column in values.items()}
