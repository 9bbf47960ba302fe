"""What a collective sends: transfers, their order on each connection, and what each waits for.

A schedule says nothing of time or of how bytes travel. The engine, the ideal completion time and the
proof all execute the same one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

SLICES_PER_CHUNK = 8
"""Messages that a chunk is sent in, unless the caller asks for more.

A rank may forward a slice as soon as that slice has arrived. With one slice per chunk every ring step would
pay the whole path latency; with 8 only 1/8 of a chunk is exposed to it, which hides the latency whenever
``latency <= 7/8 * chunk time``. More slices add a RETH and an ACK each and hide nothing further.

Source: facts.md section 3 ("a chunk is sent in at least 8 slices").
"""

MIN_RANKS = 2


class Collective(StrEnum):
    """What a schedule achieves, in the words of nccl-tests.

    ``S`` is the size that the schedule is built for. Block ``r`` of a buffer is its bytes from ``r * S // n`` to
    ``(r + 1) * S // n``; the root is the first rank of the order.
    """

    ALL_REDUCE = "all_reduce"
    """Every rank gets the sum of all ranks' ``S`` bytes."""
    REDUCE_SCATTER = "reduce_scatter"
    """Rank ``r`` gets block ``r`` of the sum of all ranks' ``S`` bytes."""
    ALL_GATHER = "all_gather"
    """Every rank gets block ``r`` from rank ``r``, ``S`` bytes in all."""
    ALL_TO_ALL = "all_to_all"
    """Every rank sends ``S / n`` bytes of its ``S`` to each, and gets as much from each."""
    BROADCAST = "broadcast"
    """Every rank gets the root's ``S`` bytes."""
    REDUCE = "reduce"
    """The root gets the sum of all ranks' ``S`` bytes."""
    GATHER = "gather"
    """The root gets ``S / n`` bytes from each rank, ``S`` in all."""
    SCATTER = "scatter"
    """Rank ``r`` gets block ``r`` of the root's ``S`` bytes."""
    SEND_RECV = "send_recv"
    """Every rank gets the ``S`` bytes of the rank before it in the order."""


class TransferOp(IntEnum):
    """What the receiver does with the bytes of a transfer."""

    COPY = 0
    REDUCE = 1


@dataclass(frozen=True, eq=False)
class Schedule:
    """Transfers of one collective, as a struct of arrays.

    A transfer is one RDMA WRITE message. A connection sends its transfers in index order. Transfer ``i`` may
    start when all ``deps[dep_offsets[i]:dep_offsets[i + 1]]`` have arrived. The index is a topological order:
    every dependency has a smaller index than its dependant, so sending in order can never deadlock.

    Attributes:
        nranks: Number of ranks.
        size_bytes: Size of the buffer on each rank.
        src: Sending rank, shape ``(transfers,)``, int32.
        dst: Receiving rank, shape ``(transfers,)``, int32.
        nbytes: Payload bytes, at least 1, shape ``(transfers,)``, int64.
        offset_bytes: First byte within the sender's buffer, shape ``(transfers,)``, int64.
        op: A `TransferOp`, shape ``(transfers,)``, uint8.
        connection: Index into `connections`, shape ``(transfers,)``, int32.
        dep_offsets: Start of each transfer's dependencies in `deps`, shape ``(transfers + 1,)``, int64.
        deps: Indices of transfers, int64.
        connections: ``(src, dst)`` of each connection; two ranks may have several.
        in_place: Whether each rank has one buffer, read and written. If not, transfers read a send buffer and
            write a receive buffer, as in nccl-tests' out-of-place columns.
        dst_offset_bytes: First byte within the receiver's buffer, to which the RETH points, shape ``(transfers,)``,
            int64; None stands for `offset_bytes` and is replaced by it.
        start_ns: Time before which each connection sends nothing, emulated, shape ``(connections,)``, int64; None stands for 0.

    Raises:
        ValueError: If the arrays contradict each other, leave the buffer, or could not be executed in order.
    """

    nranks: int
    size_bytes: int
    src: npt.NDArray[np.int32]
    dst: npt.NDArray[np.int32]
    nbytes: npt.NDArray[np.int64]
    offset_bytes: npt.NDArray[np.int64]
    op: npt.NDArray[np.uint8]
    connection: npt.NDArray[np.int32]
    dep_offsets: npt.NDArray[np.int64]
    deps: npt.NDArray[np.int64]
    connections: tuple[tuple[int, int], ...]
    in_place: bool = True
    dst_offset_bytes: npt.NDArray[np.int64] = None  # type: ignore[assignment]  # never None once constructed
    start_ns: npt.NDArray[np.int64] = None  # type: ignore[assignment]  # never None once constructed

    def __post_init__(self) -> None:
        if self.dst_offset_bytes is None:
            object.__setattr__(self, "dst_offset_bytes", self.offset_bytes)
        if self.start_ns is None:
            object.__setattr__(self, "start_ns", np.zeros(len(self.connections), np.int64))
        self._check()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    def __len__(self) -> int:
        return len(self.nbytes)

    def dependencies(self, transfer: int) -> npt.NDArray[np.int64]:
        """Return the indices of the transfers that must arrive before ``transfer`` may start."""
        return self.deps[self.dep_offsets[transfer] : self.dep_offsets[transfer + 1]]

    def sorted_by_sender(self, last: npt.NDArray[np.bool_] | None = None) -> Schedule:
        """Return the same schedule with its connections numbered in the order of the ranks that send.

        Args:
            last: Which connections come behind all others, shape ``(connections,)``; by default none.
        """
        behind = [False] * len(self.connections) if last is None else last.tolist()
        order = sorted(range(len(self.connections)), key=lambda index: (behind[index], self.connections[index]))
        number = np.empty(len(order), np.int32)
        number[order] = np.arange(len(order), dtype=np.int32)
        connections = tuple(self.connections[index] for index in order)
        return dataclasses.replace(
            self, connection=number[self.connection], connections=connections, start_ns=self.start_ns[order]
        )

    def sent_bytes(self) -> npt.NDArray[np.int64]:
        """Return the payload bytes that each rank sends, shape ``(nranks,)``, int64."""
        sent = np.zeros(self.nranks, np.int64)
        np.add.at(sent, self.src, self.nbytes)
        return sent

    def unbidden_bytes(self) -> npt.NDArray[np.int64]:
        """Return the bytes that each connection may send before anything has arrived, shape ``(connections,)``, int64.

        A connection sends in order: it stops at its first transfer that waits for something.
        """
        waits = np.diff(self.dep_offsets) > 0
        first_wait = np.full(len(self.connections), len(self), np.int64)
        blocked = np.flatnonzero(waits)
        np.minimum.at(first_wait, self.connection[blocked], blocked)
        free = np.flatnonzero(np.arange(len(self)) < first_wait[self.connection])
        total = np.zeros(len(self.connections), np.int64)
        np.add.at(total, self.connection[free], self.nbytes[free])
        return total

    def _check(self) -> None:
        count = len(self.nbytes)
        arrays = (self.src, self.dst, self.offset_bytes, self.dst_offset_bytes, self.op, self.connection)
        if any(array.shape != (count,) for array in arrays) or self.dep_offsets.shape != (count + 1,):
            raise ValueError("a schedule's arrays must have one entry per transfer")
        if self.dep_offsets[0] != 0 or self.dep_offsets[-1] != len(self.deps):
            raise ValueError("dep_offsets must begin at 0 and end at the number of deps")
        if self.start_ns.shape != (len(self.connections),) or (self.start_ns < 0).any():
            raise ValueError("start_ns must have a time from 0 on for every connection")
        deps_of_each = np.diff(self.dep_offsets)
        if (deps_of_each < 0).any():
            raise ValueError("dep_offsets must not decrease")
        if count == 0:
            return
        if self.connection.min() < 0 or self.connection.max() >= len(self.connections):
            raise ValueError("a transfer names a connection that does not exist")
        ends = np.array(self.connections, np.int64).reshape(-1, 2)
        if ends.min() < 0 or ends.max() >= self.nranks:
            raise ValueError(f"a connection leaves the ranks 0 to {self.nranks - 1}")
        if (ends[:, 0] == ends[:, 1]).any():
            raise ValueError("a connection joins a rank to itself")
        if (ends[self.connection, 0] != self.src).any() or (ends[self.connection, 1] != self.dst).any():
            raise ValueError("a transfer's src and dst differ from its connection's")
        if self.nbytes.min() < 1:
            raise ValueError("a transfer must have at least 1 byte")
        for offsets in (self.offset_bytes, self.dst_offset_bytes):
            if offsets.min() < 0 or (offsets + self.nbytes).max() > self.size_bytes:
                raise ValueError(f"a transfer leaves the buffer of {self.size_bytes} bytes")
        if self.op.max() > max(TransferOp):
            raise ValueError("a transfer has an unknown op")
        owner = np.repeat(np.arange(count), deps_of_each)
        if len(self.deps) and (self.deps.min() < 0 or (self.deps >= owner).any()):
            late = int(owner[np.argmax((self.deps < 0) | (self.deps >= owner))])
            raise ValueError(f"transfer {late} depends on a transfer that does not come before it")


class SteadyTraffic(NamedTuple):
    """Connections that all run at once.

    Attributes:
        src: Sending ranks, shape ``(connections,)``, int64.
        dst: Receiving ranks, likewise.
        nbytes: What each carries, shape ``(connections,)``, float64.
    """

    src: npt.NDArray[np.int64]
    dst: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.float64]

    @classmethod
    def around(cls, order: Sequence[int], nbytes: float) -> SteadyTraffic:
        """Return a ring in which every rank sends as much to its successor."""
        here = np.array(order, np.int64)
        return cls(here, np.roll(here, -1), np.full(len(here), float(nbytes)))


class CollectiveAlgorithm(Protocol):
    """One way of carrying out one collective; one file per algorithm.

    The methods with a body suit algorithms that cut the buffer into one chunk per rank.
    """

    @property
    def name(self) -> str:
        """Name of the algorithm in scenarios and results, such as ``ring``."""
        ...

    @property
    def collective(self) -> Collective:
        """The collective that it carries out."""
        ...

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule for a buffer of ``size_bytes`` on each rank.

        Args:
            order: The ranks ``0`` to ``n - 1`` in the order in which the algorithm visits them; at least 2.
            size_bytes: Size of the buffer on each rank, in bytes; at least 1.
            slices: Messages that each chunk is cut into; at least 1. Empty ones are left out.

        Raises:
            ValueError: If an argument breaks its rule, or the algorithm cannot work with that many ranks.
        """
        ...

    def traffic_factor(self, nranks: int) -> float:
        """Return busbw / algbw, the bytes that the busiest NIC must carry each way per byte of the buffer.

        It belongs to the collective, not to the algorithm: it is what the best algorithm needs, so that busbw can be held
        against the NIC's rate.

        Source:
            nccl-tests, doc/PERFORMANCE.md, and ``*GetBw()`` in src/*.cu.
        """
        ...

    def on_hosts(self, gpus_per_host: int) -> CollectiveAlgorithm:
        """Return the algorithm for hosts of that many ranks; most do not care."""
        return self

    def steady_traffic(self, order: Sequence[int], size_bytes: int) -> SteadyTraffic | None:
        """Return what each connection carries if all of them run at once from beginning to end, in place of a schedule.

        Where there are too many ranks for a schedule, this is enough to predict what paths do to it.

        Args:
            order: As for `build_schedule`.
            size_bytes: As for `build_schedule`.

        Returns:
            The traffic, but for the rounding of chunks to bytes; None where connections take turns, or wait for each other
            longer than a slice.
        """
        return None

    def chunk_bytes(self, size_bytes: int, nranks: int) -> int:
        """Return the size of the smallest chunk that `build_schedule` cuts into slices."""
        return size_bytes // nranks

    def slices_per_chunk(self, nranks: int) -> int:
        """Return how many slices a chunk should have where it is large enough for that."""
        return SLICES_PER_CHUNK


class ScheduleBuilder:
    """Appends transfers one by one; for algorithms that are not worth vectorising.

    Example:
        >>> builder = ScheduleBuilder(nranks=3, size_bytes=10)
        >>> first = builder.add(0, 1, offset_bytes=0, nbytes=10)
        >>> second = builder.add(1, 2, offset_bytes=0, nbytes=10, after=[first])
        >>> len(builder.build())
        2
    """

    def __init__(self, nranks: int, size_bytes: int, *, in_place: bool = True) -> None:
        check_sizes(nranks, size_bytes)
        self._nranks = nranks
        self._size_bytes = size_bytes
        self._in_place = in_place
        self._columns: list[tuple[int, int, int, int, int, int, int]] = []
        self._deps: list[tuple[int, ...]] = []
        self._connections: dict[tuple[int, int, int], int] = {}
        self._handles: list[tuple[int, tuple[int, ...]]] = []  # receiving rank, transfers it stands for

    def add(
        self,
        src: int,
        dst: int,
        *,
        offset_bytes: int,
        nbytes: int,
        op: TransferOp = TransferOp.COPY,
        after: Sequence[int] = (),
        dst_offset_bytes: int | None = None,
        channel: int = 0,
    ) -> int:
        """Append a transfer and return its handle, to be named in a later ``after``.

        An empty transfer is left out: its handle stands for what it waits for.

        Args:
            src: Sending rank.
            dst: Receiving rank, another one.
            offset_bytes: First byte within the buffer.
            nbytes: Payload bytes, at least 0.
            op: What the receiver does with them.
            after: Handles of transfers to ``src`` that must have arrived before this one starts.
            dst_offset_bytes: First byte within the receiver's buffer; by default as in the sender's.
            channel: Which of several connections between the two ranks carries it.

        Raises:
            ValueError: If a handle is unknown, or belongs to a transfer that ``src`` does not receive: a
                rank cannot know of it.
        """
        waits_for: dict[int, None] = {}
        for handle in after:
            if not 0 <= handle < len(self._handles):
                raise ValueError(f"handle {handle} is not that of an earlier transfer")
            receiver, transfers = self._handles[handle]
            if receiver != src:
                raise ValueError(f"rank {src} cannot wait for a transfer that arrives at rank {receiver}")
            waits_for.update(dict.fromkeys(transfers))
        if nbytes == 0:
            self._handles.append((dst, tuple(waits_for)))
            return len(self._handles) - 1
        connection = self._connections.setdefault((src, dst, channel), len(self._connections))
        into = offset_bytes if dst_offset_bytes is None else dst_offset_bytes
        self._handles.append((dst, (len(self._columns),)))
        self._columns.append((src, dst, nbytes, offset_bytes, op, connection, into))
        self._deps.append(tuple(waits_for))
        return len(self._handles) - 1

    def build(self) -> Schedule:
        """Return the schedule of all transfers appended so far.

        Raises:
            ValueError: As `Schedule` does.
        """
        columns = np.array(self._columns, np.int64).reshape(-1, 7)
        dep_offsets = np.zeros(len(columns) + 1, np.int64)
        np.cumsum([len(deps) for deps in self._deps], out=dep_offsets[1:])
        return Schedule(
            nranks=self._nranks,
            size_bytes=self._size_bytes,
            src=columns[:, 0].astype(np.int32),
            dst=columns[:, 1].astype(np.int32),
            nbytes=columns[:, 2].copy(),
            offset_bytes=columns[:, 3].copy(),
            op=columns[:, 4].astype(np.uint8),
            connection=columns[:, 5].astype(np.int32),
            dep_offsets=dep_offsets,
            deps=np.array([dep for deps in self._deps for dep in deps], np.int64),
            connections=tuple((src, dst) for src, dst, _ in self._connections),
            in_place=self._in_place,
            dst_offset_bytes=columns[:, 6].copy(),
        )


def check_sizes(nranks: int, size_bytes: int) -> None:
    """Raise ValueError unless there are at least two ranks and at least one byte."""
    if nranks < MIN_RANKS:
        raise ValueError(f"a collective needs at least {MIN_RANKS} ranks, got {nranks}")
    if size_bytes < 1:
        raise ValueError(f"a collective needs a buffer of at least 1 byte, got {size_bytes}")


def check_arguments(order: Sequence[int], size_bytes: int, slices: int) -> None:
    """Raise ValueError unless the arguments of `CollectiveAlgorithm.build_schedule` follow their rules."""
    check_sizes(len(order), size_bytes)
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"order must hold each rank from 0 to {len(order) - 1} once")
    if slices < 1:
        raise ValueError(f"a chunk needs at least 1 slice, got {slices}")


def slice_borders(begin: int, nbytes: int, slices: int) -> list[tuple[int, int]]:
    """Return first byte and size of each slice of a chunk that is not empty."""
    borders = [begin + part * nbytes // slices for part in range(slices + 1)]
    return [(first, last - first) for first, last in itertools.pairwise(borders) if last > first]


def split_evenly(begin: npt.ArrayLike, nbytes: npt.ArrayLike, parts: int) -> npt.NDArray[np.int64]:
    """Return the borders of ``parts`` pieces whose sizes differ by at most one byte.

    Args:
        begin: First byte of each range, shape ``(ranges,)`` or a scalar.
        nbytes: Bytes in each range, same shape.
        parts: Number of pieces; piece ``i`` begins at ``begin + i * nbytes // parts``.

    Returns:
        Borders, shape ``(..., parts + 1)``, int64, bytes; neighbours are equal where a piece is empty.
    """
    first = np.asarray(begin, np.int64)[..., None]
    total = np.asarray(nbytes, np.int64)[..., None]
    return first + np.arange(parts + 1, dtype=np.int64) * total // parts
