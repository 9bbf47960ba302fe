"""What is noted along a run, tick by tick: queues, pauses, marks, and what every QP does.

A tick copies counters into preallocated blocks and computes nothing. When a block is full, increments are formed, rows in which
nothing happened are left out, and the rest goes to a sink, which writes it at once: memory is bounded, and what was seen
is kept, however the run ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from testbed.roce.congestion import CongestionControl
from testbed.roce.queue_pairs import REQUESTER, Connection, qp_index

Ints = npt.NDArray[np.int64]
# Ports and QPs times samples of a block: what is formed and written at once stays far below a tick.
_BLOCK_ROWS = 4096
_MIN_BLOCK_SAMPLES, _MAX_BLOCK_SAMPLES = 4, 256
_QUEUE_FIELDS = ("enq_bytes", "deq_packets", "marked_packets", "drop_packets", "lost_packets", "pause_frames")
_QP_FIELDS = ("acked_packets", "naks_packets", "cnps_packets")


class Sink(Protocol):
    """Takes the blocks of one table."""

    written_bytes: int

    def write(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append a block, by name of column."""


class Recorder(Protocol):
    """Is shown the fabric once a tick."""

    def start(self, now_ns: int) -> None:
        """Begin an iteration: increments count from here."""

    def sample(self, now_ns: int, sent_packets: Ints) -> None:
        """Take note of a tick.

        Args:
            now_ns: The clock.
            sent_packets: Data packets that each QP has sent since `start`, shape ``(qps,)``.
        """

    def finish(self, now_ns: int, sent_packets: Ints) -> None:
        """Take note of the end of an iteration, when all is at rest."""


class NoRecorder:
    """Notes nothing."""

    def start(self, now_ns: int) -> None:
        """Do nothing."""

    def sample(self, now_ns: int, sent_packets: Ints) -> None:
        """Do nothing."""

    def finish(self, now_ns: int, sent_packets: Ints) -> None:
        """Do nothing."""


class TickRecorder:
    """Samples ports and QPs every tick; every second, fourth, ... once it has written much.

    Args:
        ports: Port ids to look at.
        queues: The fabric's queues, shape ``(ports + 1, 8)``.
        ingress: Its ingress accounts, the same shape.
        qps: Its QP table.
        priority: The data priority.
        time_dilation: Wall time per emulated time.
        limit_bytes: What both tables may have at most, before compression. When half of what is left of it is written, every
            second tick is left out from then on.
        queue_sink: Takes the rows of ports; its column ``port`` is an index into `ports`.
        qp_sink: Takes the rows of QPs.

    Attributes:
        sample_ticks: Ticks from one sample to the next.
    """

    def __init__(
        self,
        ports: Sequence[int],
        *,
        queues: npt.NDArray[Any],
        ingress: npt.NDArray[Any],
        qps: npt.NDArray[Any],
        priority: int,
        time_dilation: float,
        limit_bytes: int,
        queue_sink: Sink,
        qp_sink: Sink,
    ) -> None:
        self._ports = np.array(ports, np.int64)
        self._priority, self._dilation = priority, time_dilation
        rows = queues[:, priority]
        self._words, self._word_of = _words_of(rows, _QUEUE_FIELDS)
        self._deq_bytes = rows["deq_bytes"].view(np.int64)
        self._ingress_used, self._ingress_xoff = ingress[:, priority]["used_bytes"], ingress[:, priority]["xoff"]
        self._qps = qps
        self._queue_sink, self._qp_sink = queue_sink, qp_sink
        self._limit_bytes, self._next_bytes = limit_bytes, limit_bytes // 2
        self.sample_ticks = 1
        self._origin_ns: int | None = None
        self._count = 0
        self._control: CongestionControl | None = None
        self._mark: dict[str, int] = {}

    @property
    def is_full(self) -> bool:
        """Whether the tables have reached their limit, so that nothing more is noted."""
        return self._queue_sink.written_bytes + self._qp_sink.written_bytes >= self._limit_bytes

    def begin_workload(
        self,
        row: int,
        connections: Sequence[Connection],
        closed: npt.NDArray[np.bool_],
        control: CongestionControl | None,
    ) -> None:
        """Look at the QPs of a workload from now on.

        Args:
            row: Its row in the results.
            connections: Its QPs.
            closed: Whether each port is paused, kept up to date by flow control, shape ``(ports + 1,)``.
            control: The reaction points, if there are any.
        """
        self._flush()
        qps, ports = len(connections), len(self._ports)
        self._mark = {"row": row, "iteration": 0, "warmup": 0}
        self._closed, self._control = closed, control
        requesters = self._qps[qp_index(0, REQUESTER) : 2 * qps : 2]
        self._qp_words, self._qp_word_of = _words_of(requesters, _QP_FIELDS)
        ends = [connection.requester for connection in connections]
        self._qp_labels = {
            "qpn": np.array([end.qpn for end in ends], np.int32),
            "src_rank": np.array([end.local.rank for end in ends], np.int16),
            "dst_rank": np.array([end.remote.rank for end in ends], np.int16),
        }
        self._samples = min(_MAX_BLOCK_SAMPLES, max(_MIN_BLOCK_SAMPLES, _BLOCK_ROWS // max(1, qps + ports)))
        # Row 0 is the sample before the block's first.
        size = self._samples + 1
        self._now_ns = np.zeros(size, np.int64)
        self._queue_block = np.zeros((size, ports, self._words.shape[1]), np.int64)
        self._deq_block = np.zeros((size, ports), np.int64)
        self._paused_block = np.zeros((size, ports), bool)
        self._used_block = np.zeros((size, ports), np.int64)
        self._xoff_block = np.zeros((size, ports), np.uint32)
        self._qp_block = np.zeros((size, qps, self._qp_words.shape[1]), np.int64)
        self._sent_block = np.zeros((size, qps), np.int64)
        names = [] if control is None else ["rate_limit_bytes_per_s", *control.state()]
        self._state_blocks = {name: np.zeros((size, qps)) for name in names}
        self._nothing_sent = np.zeros(qps, np.int64)

    def begin_iteration(self, number: int, *, warmup: bool) -> None:
        """Mark what follows as of an iteration."""
        self._flush()
        self._mark |= {"iteration": number, "warmup": int(warmup)}

    def start(self, now_ns: int) -> None:
        """Begin an iteration: increments count from here."""
        self._flush()
        if self._origin_ns is None:
            self._origin_ns = now_ns
        self._take(0, now_ns, self._nothing_sent)
        self._ticks = 0

    def sample(self, now_ns: int, sent_packets: Ints) -> None:
        """Take note of a tick."""
        self._ticks += 1
        if self._ticks < self.sample_ticks:
            return
        self._ticks = 0
        self._count += 1
        self._take(self._count, now_ns, sent_packets)
        if self._count == self._samples:
            self._flush()

    def finish(self, now_ns: int, sent_packets: Ints) -> None:
        """Take note of the end of an iteration, when all is at rest."""
        self._count += 1
        self._take(self._count, now_ns, sent_packets)
        self._flush()

    def close(self) -> None:
        """Write what was not written yet."""
        self._flush()

    def _take(self, index: int, now_ns: int, sent_packets: Ints) -> None:
        ports = self._ports
        self._now_ns[index] = now_ns
        self._deq_block[index] = self._deq_bytes[ports]  # before enq: a depth is never negative
        self._queue_block[index] = self._words[ports]
        self._used_block[index] = self._ingress_used[ports]
        self._xoff_block[index] = self._ingress_xoff[ports]
        self._paused_block[index] = self._closed[ports]
        self._qp_block[index] = self._qp_words
        self._sent_block[index] = sent_packets
        if self._control is not None:
            blocks = self._state_blocks
            blocks["rate_limit_bytes_per_s"][index] = self._control.rate_bytes_per_s
            for name, values in self._control.state().items():
                blocks[name][index] = values

    def _flush(self) -> None:
        """Write the samples of the block, and keep the last as the one before the next."""
        count, self._count = self._count, 0
        if not count:
            return
        if not self.is_full:
            self._write_queues(count)
            self._write_qps(count)
            written = self._queue_sink.written_bytes + self._qp_sink.written_bytes
            if written >= self._next_bytes:
                self.sample_ticks *= 2
                self._next_bytes = written + max(0, self._limit_bytes - written) // 2
        blocks: list[npt.NDArray[Any]] = [self._now_ns, self._queue_block, self._deq_block, self._paused_block]
        blocks += [self._used_block, self._xoff_block, self._qp_block, self._sent_block]
        blocks += self._state_blocks.values()
        for block in blocks:
            block[0] = block[count]

    def _write_queues(self, count: int) -> None:
        words = {name: self._queue_block[: count + 1, :, word] for name, word in self._word_of.items()}
        values: dict[str, npt.NDArray[Any]] = {name: np.diff(column, axis=0) for name, column in words.items()}
        deq = self._deq_block[: count + 1]
        values["deq_bytes"] = np.diff(deq, axis=0)
        values["depth_bytes"] = (words["enq_bytes"] - deq)[1:]
        values["ingress_used_bytes"] = self._used_block[1 : count + 1]
        values["ingress_xoff"] = self._xoff_block[1 : count + 1] != 0
        values["paused"] = self._paused_block[:count]  # gates move right after a sample
        happened = np.zeros((count, len(self._ports)), bool)
        for column in values.values():
            happened |= column != 0
        samples, ports = np.nonzero(happened)
        rows = {name: column[happened] for name, column in values.items()}
        rows |= {"port": ports, "priority": np.full(len(ports), self._priority)}
        self._queue_sink.write(rows | self._when(samples, count))

    def _write_qps(self, count: int) -> None:
        values: dict[str, npt.NDArray[Any]] = {
            name: np.diff(self._qp_block[: count + 1, :, word], axis=0) for name, word in self._qp_word_of.items()
        }
        values["sent_packets"] = np.diff(self._sent_block[: count + 1], axis=0)
        happened = np.zeros(values["sent_packets"].shape, bool)
        for column in values.values():
            happened |= column != 0
        for name, block in self._state_blocks.items():
            if name == "rate_limit_bytes_per_s":
                happened |= block[1 : count + 1] != block[:count]
            values[name] = block[1 : count + 1]
        samples, qps = np.nonzero(happened)
        rows = {name: column[happened] for name, column in values.items()}
        rows |= {name: labels[qps] for name, labels in self._qp_labels.items()}
        self._qp_sink.write(rows | self._when(samples, count))

    def _when(self, samples: npt.NDArray[np.intp], count: int) -> dict[str, npt.NDArray[Any]]:
        """Return the columns that say when, for rows of these samples of the block."""
        assert self._origin_ns is not None
        time_ns = np.rint((self._now_ns[: count + 1] - self._origin_ns) / self._dilation).astype(np.int64)
        rows = len(samples)
        return {
            "time_ns": time_ns[1:][samples],
            "interval_ns": np.diff(time_ns)[samples],
            "row": np.full(rows, self._mark["row"]),
            "iteration": np.full(rows, self._mark["iteration"]),
            "warmup": np.full(rows, self._mark["warmup"], bool),
        }


def _words_of(rows: npt.NDArray[Any], fields: Sequence[str]) -> tuple[Ints, dict[str, int]]:
    """Return the span of 64-bit words of structured rows that holds some fields, as a view, and the word of each.

    Returns:
        Shape ``(rows, words)``, and the index of each field in its second axis.
    """
    assert rows.dtype.fields is not None
    places = {name: rows.dtype.fields[name][1] // 8 for name in fields}
    first, last = min(places.values()), max(places.values())
    column = rows[min(places, key=lambda name: places[name])].view(np.int64)
    span = np.lib.stride_tricks.as_strided(column, (len(rows), last - first + 1), (column.strides[0], 8))
    return span, {name: place - first for name, place in places.items()}
