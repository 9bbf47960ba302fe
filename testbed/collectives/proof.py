"""Executes schedules on arrays and compares the outcome with what the collective promises.

The execution is asynchronous on purpose: each transfer reads its sender's buffer at a random moment after its
dependencies arrived, and reaches its receiver a random while later. Connections run at wildly different
speeds; only what a schedule guarantees (dependencies, and the order within a connection) holds. A schedule
that lacks a dependency therefore reads a buffer too early in some execution.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from testbed.collectives.schedule import Collective, Schedule, TransferOp

Buffers = npt.NDArray[np.int64]
"""One row per rank, one int64 for each *byte* of the buffer, so that a wrong sum cannot be right by chance."""

SPEED_SPREAD = 2.0
"""Standard deviation of the logarithm of a connection's speed.

Two connections then differ by a factor of about 17 as often as not, so that a transfer whose dependency is
missing often overtakes it.
"""


class Expected(NamedTuple):
    """What a collective promises.

    Attributes:
        values: What each rank must hold, shape ``(nranks, size_bytes)``, int64; any number where nothing is promised.
        promised: Whether a byte is promised, same shape. What is left over from the work is not, nor what a rank would
            copy to itself: that never crosses the network.
    """

    values: Buffers
    promised: npt.NDArray[np.bool_]


def expected_result(collective: Collective, order: Sequence[int], inputs: Buffers) -> Expected:
    """Return what each rank must hold after the collective.

    Args:
        collective: The collective.
        order: The ranks in the order that the algorithm was given; the first is the root.
        inputs: What each rank held before, shape ``(nranks, size_bytes)``, int64.
    """
    return _SEMANTICS[collective](order, inputs)


def execute(schedule: Schedule, inputs: Buffers, rng: np.random.Generator) -> Buffers:
    """Return the buffers after one random execution of a schedule.

    Args:
        schedule: The schedule.
        inputs: Each rank's buffer, shape ``(nranks, size_bytes)``, int64; left unchanged.
        rng: Source of the random delays.

    Returns:
        The buffers that were written: the same ones when the schedule works in place, else the receive
        buffers, -1 where nothing arrived (so that adding to them shows).
    """
    outputs = inputs.copy() if schedule.in_place else np.full_like(inputs, -1)
    sources = outputs if schedule.in_place else inputs
    count = len(schedule)
    connection = schedule.connection.tolist()
    transfers_of: list[list[int]] = [[] for _ in schedule.connections]
    for transfer, owner in enumerate(connection):
        transfers_of[owner].append(transfer)
    followers: list[list[int]] = [[] for _ in range(count)]
    for transfer in range(count):
        for dep in schedule.dependencies(transfer).tolist():
            followers[dep].append(transfer)
    missing = np.diff(schedule.dep_offsets).tolist()
    next_read = [0] * len(transfers_of)
    reading = [False] * len(transfers_of)
    last_arrival = [0.0] * len(transfers_of)
    in_flight: dict[int, Buffers] = {}

    read_delay = np.exp(rng.normal(0, SPEED_SPREAD, len(transfers_of)))
    flight_delay = np.exp(rng.normal(0, SPEED_SPREAD, len(transfers_of)))
    read_delays = (rng.exponential(size=count) * read_delay[schedule.connection]).tolist()
    flight_delays = (rng.exponential(size=count) * flight_delay[schedule.connection]).tolist()
    events: list[tuple[float, int, bool]] = []  # time, transfer, whether it arrives (else it is read)

    def start_next(owner: int, now: float) -> None:
        if reading[owner] or next_read[owner] == len(transfers_of[owner]):
            return
        transfer = transfers_of[owner][next_read[owner]]
        if missing[transfer] == 0:
            reading[owner] = True
            heapq.heappush(events, (now + read_delays[transfer], transfer, False))

    for owner in range(len(transfers_of)):
        start_next(owner, 0.0)
    while events:
        now, transfer, arrives = heapq.heappop(events)
        owner = connection[transfer]
        if arrives:
            begin = int(schedule.dst_offset_bytes[transfer])
            part = slice(begin, begin + int(schedule.nbytes[transfer]))
            if schedule.op[transfer] == TransferOp.REDUCE:
                outputs[schedule.dst[transfer], part] += in_flight.pop(transfer)
            else:
                outputs[schedule.dst[transfer], part] = in_flight.pop(transfer)
            for follower in followers[transfer]:
                missing[follower] -= 1
                start_next(connection[follower], now)
        else:
            begin = int(schedule.offset_bytes[transfer])
            part = slice(begin, begin + int(schedule.nbytes[transfer]))
            in_flight[transfer] = sources[schedule.src[transfer], part].copy()
            last_arrival[owner] = max(now, last_arrival[owner]) + flight_delays[transfer]
            heapq.heappush(events, (last_arrival[owner], transfer, True))
            reading[owner] = False
            next_read[owner] += 1
            start_next(owner, now)
    return outputs


def find_counterexample(
    schedule: Schedule,
    collective: Collective,
    order: Sequence[int],
    rng: np.random.Generator,
    *,
    executions: int = 4,
) -> str | None:
    """Return how a schedule fails to carry out a collective, or None if no execution showed it.

    Args:
        schedule: The schedule under test.
        collective: What it claims to achieve.
        order: The ranks as given to the algorithm.
        rng: Source of the inputs and of the random executions.
        executions: Number of executions to try.

    Returns:
        A sentence that names the first wrong byte, or None.
    """
    for execution in range(executions):
        inputs = rng.integers(-(2**40), 2**40, (schedule.nranks, schedule.size_bytes), np.int64)
        outputs = execute(schedule, inputs, rng)
        expected = expected_result(collective, order, inputs)
        wrong = np.argwhere((outputs != expected.values) & expected.promised)
        if len(wrong):
            rank, byte = wrong[0]
            return f"execution {execution}: {len(wrong)} bytes are wrong, the first is byte {byte} of rank {rank}"
    return None


def _everywhere(values: Buffers) -> Expected:
    return Expected(values, np.ones(values.shape, np.bool_))


def _blocks(inputs: Buffers) -> list[slice]:
    """Return the bytes of each rank's block."""
    nranks, size = inputs.shape
    return [slice(rank * size // nranks, (rank + 1) * size // nranks) for rank in range(nranks)]


def _all_reduce(order: Sequence[int], inputs: Buffers) -> Expected:
    return _everywhere(np.broadcast_to(inputs.sum(axis=0), inputs.shape))


def _reduce_scatter(order: Sequence[int], inputs: Buffers) -> Expected:
    promised = np.zeros(inputs.shape, np.bool_)
    for rank, block in enumerate(_blocks(inputs)):
        promised[rank, block] = True
    return Expected(np.broadcast_to(inputs.sum(axis=0), inputs.shape), promised)


def _all_gather(order: Sequence[int], inputs: Buffers) -> Expected:
    values = np.empty_like(inputs)
    for rank, block in enumerate(_blocks(inputs)):
        values[:, block] = inputs[rank, block]
    return _everywhere(values)


def _all_to_all(order: Sequence[int], inputs: Buffers) -> Expected:
    """Written from the definition: the sizes are those of a matrix whose rows and columns all add up to the buffer."""
    nranks, size = inputs.shape
    sizes = np.array(
        [[(size + nranks - 1 - (dst - src - 1) % nranks) // nranks for dst in range(nranks)] for src in range(nranks)]
    )
    values, promised = np.zeros_like(inputs), np.zeros(inputs.shape, np.bool_)
    for src in range(nranks):
        for dst in range(nranks):
            count = sizes[src, dst]
            read, written = sizes[src, :dst].sum(), sizes[:src, dst].sum()
            values[dst, written : written + count] = inputs[src, read : read + count]
            promised[dst, written : written + count] = src != dst
    return Expected(values, promised)


def _broadcast(order: Sequence[int], inputs: Buffers) -> Expected:
    return _everywhere(np.broadcast_to(inputs[order[0]], inputs.shape))


def _reduce(order: Sequence[int], inputs: Buffers) -> Expected:
    promised = np.zeros(inputs.shape, np.bool_)
    promised[order[0]] = True
    return Expected(np.broadcast_to(inputs.sum(axis=0), inputs.shape), promised)


def _gather(order: Sequence[int], inputs: Buffers) -> Expected:
    values, promised = np.zeros_like(inputs), np.zeros(inputs.shape, np.bool_)
    for rank, block in enumerate(_blocks(inputs)):
        values[order[0], block] = inputs[rank, : block.stop - block.start]
        promised[order[0], block] = rank != order[0]
    return Expected(values, promised)


def _scatter(order: Sequence[int], inputs: Buffers) -> Expected:
    values, promised = np.zeros_like(inputs), np.zeros(inputs.shape, np.bool_)
    for rank, block in enumerate(_blocks(inputs)):
        values[rank, : block.stop - block.start] = inputs[order[0], block]
        promised[rank, : block.stop - block.start] = rank != order[0]
    return Expected(values, promised)


def _send_recv(order: Sequence[int], inputs: Buffers) -> Expected:
    values = np.empty_like(inputs)
    values[list(order)] = inputs[np.roll(order, 1)]
    return _everywhere(values)


_SEMANTICS: Mapping[Collective, Callable[[Sequence[int], Buffers], Expected]] = {
    Collective.ALL_REDUCE: _all_reduce,
    Collective.REDUCE_SCATTER: _reduce_scatter,
    Collective.ALL_GATHER: _all_gather,
    Collective.ALL_TO_ALL: _all_to_all,
    Collective.BROADCAST: _broadcast,
    Collective.REDUCE: _reduce,
    Collective.GATHER: _gather,
    Collective.SCATTER: _scatter,
    Collective.SEND_RECV: _send_recv,
}
