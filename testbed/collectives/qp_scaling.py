"""QP scaling: the transfers of a connection spread over several queue pairs.

A pure transformation of a schedule. Connection ``c`` becomes the connections ``c * qps`` to ``c * qps + qps - 1``, one per
queue pair, so that hashing sees several flows where there was one.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from testbed.collectives.schedule import Schedule


def split_over_qps(schedule: Schedule, qps: int, mtu: int, networked: int | None = None) -> Schedule:
    """Return the schedule with every transfer striped over all queue pairs of its connection.

    What depends on a transfer depends on all its pieces: the slowest queue pair decides. Pieces are whole packets. The
    packets of a connection are dealt as evenly as they can be: a queue pair carries at most one more than another, also
    where a transfer has fewer packets than there are queue pairs.

    Args:
        schedule: What is sent.
        qps: Queue pairs per connection; at least 1.
        mtu: Payload of a full packet, bytes.
        networked: Connections, the first ones, that have queue pairs; by default all. The others stay as they are, behind.

    Raises:
        ValueError: If ``qps`` or ``mtu`` is below 1.

    Source:
        NCCL, ``NCCL_IB_SPLIT_DATA_ON_QPS=1`` (there in units of 128 bytes).
    """
    pieces = _stripe(schedule, qps, mtu, networked)
    return _spread(schedule, qps, *pieces, networked)


def striped_bytes(schedule: Schedule, qps: int, mtu: int, networked: int | None = None) -> npt.NDArray[np.float64]:
    """Return what each queue pair carries under `split_over_qps`, shape ``(networked, qps)``, bytes.

    Args:
        schedule: What is sent.
        qps: Queue pairs per connection; at least 1.
        mtu: Payload of a full packet, bytes.
        networked: Connections, the first ones, that have queue pairs; by default all.

    Raises:
        ValueError: If ``qps`` or ``mtu`` is below 1.
    """
    owner, qp, _, nbytes = _stripe(schedule, qps, mtu, networked)
    count = _networked(schedule, networked)
    row = schedule.connection[owner].astype(np.int64) * qps + qp
    mine = row < count * qps
    return np.bincount(row[mine], nbytes[mine], count * qps).astype(np.float64).reshape(count, qps)


def _stripe(
    schedule: Schedule, qps: int, mtu: int, networked: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the pieces of striped transfers: their owner, queue pair, first byte and size."""
    if mtu < 1:
        raise ValueError(f"mtu must be at least 1, got {mtu}")
    _check_qps(qps)
    inside = schedule.connection >= _networked(schedule, networked)
    packets = np.where(inside, qps, np.maximum(1, -(-schedule.nbytes // mtu)))
    least, extra = packets // qps, packets % qps
    pieces = np.where(inside, 1, np.where(least > 0, qps, extra))
    first_qp = _before_on_connection(schedule, extra) % qps
    first_piece = np.concatenate(([0], np.cumsum(pieces)))

    owner = np.repeat(np.arange(len(schedule)), pieces)
    part = np.arange(len(owner)) - first_piece[owner]
    begin = (part * least[owner] + np.minimum(part, extra[owner])) * mtu
    end = np.minimum(((part + 1) * least[owner] + np.minimum(part + 1, extra[owner])) * mtu, schedule.nbytes[owner])
    qp = np.where(inside[owner], 0, (first_qp[owner] + part) % qps)
    nbytes = np.where(inside[owner], schedule.nbytes[owner], end - begin)
    return owner, qp, begin, nbytes


def cut_into_pieces(schedule: Schedule, piece_bytes: int, networked: int | None = None) -> Schedule:
    """Return the schedule with every transfer cut into messages of at most ``piece_bytes`` on the same connection.

    Args:
        schedule: What is sent.
        piece_bytes: Largest piece; a multiple of the MTU keeps packets full.
        networked: Connections, the first ones, whose transfers are cut; by default all.

    Raises:
        ValueError: If ``piece_bytes`` is below 1.
    """
    if piece_bytes < 1:
        raise ValueError(f"a piece needs at least 1 byte, got {piece_bytes}")
    inside = schedule.connection >= _networked(schedule, networked)
    pieces = np.where(inside, 1, -(-schedule.nbytes // piece_bytes))
    first_piece = np.concatenate(([0], np.cumsum(pieces)))
    owner = np.repeat(np.arange(len(schedule)), pieces)
    begin = (np.arange(len(owner)) - first_piece[owner]) * piece_bytes
    nbytes = np.where(inside[owner], schedule.nbytes[owner], np.minimum(schedule.nbytes[owner] - begin, piece_bytes))
    return _spread(schedule, 1, owner, np.zeros(len(owner), np.int64), begin, nbytes)


def deal_over_qps(schedule: Schedule, qps: int, networked: int | None = None) -> Schedule:
    """Return the schedule with whole transfers dealt in turn over the queue pairs of their connection.

    What depends on a transfer depends on all before it on the connection, as the receiver of a connection takes them in order.

    Args:
        schedule: What is sent.
        qps: Queue pairs per connection; at least 1.
        networked: Connections, the first ones, that have queue pairs; by default all. The others stay as they are, behind.

    Raises:
        ValueError: If ``qps`` is below 1.

    Source:
        Gangidi et al., SIGCOMM 2024 (the strategy that was chosen); NCCL, ``NCCL_IB_SPLIT_DATA_ON_QPS=0``.
    """
    _check_qps(qps)
    count = len(schedule)
    turn = _before_on_connection(schedule, np.ones(count, np.int64)) % qps
    turn[schedule.connection >= _networked(schedule, networked)] = 0
    return _spread(schedule, qps, np.arange(count), turn, np.zeros(count, np.int64), schedule.nbytes, networked)


def _spread(
    schedule: Schedule,
    qps: int,
    owner: npt.NDArray[np.int64],
    qp: npt.NDArray[np.int64],
    begin: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    networked: int | None = None,
) -> Schedule:
    """Return the schedule whose transfers are pieces of another's.

    A connection sent in order, and what arrived last told that all before had arrived. Queue pairs do not wait for each
    other, so both become dependencies. What waited for a transfer waits for the last piece up to it on every queue pair; and
    a piece waits for all that any transfer before it on its connection waited for.

    Args:
        schedule: The schedule before.
        qps: Queue pairs per connection.
        owner: The transfer that each piece belongs to, ascending, shape ``(pieces,)``.
        qp: Queue pair of each piece, below ``qps``; a queue pair carries one piece of a transfer at most.
        begin: First byte of each piece within its transfer.
        nbytes: Bytes of each piece.
        networked: Connections, the first ones, that have queue pairs; by default all.
    """
    first_row, pairs = _rows(schedule, qps, networked)
    connection = schedule.connection.tolist()
    offsets, all_deps = schedule.dep_offsets.tolist(), schedule.deps.tolist()
    latest = [-1] * len(pairs)  # piece on each queue pair
    waits: list[list[int]] = [[] for _ in schedule.connections]  # deps of a connection's transfers so far, in order
    taken = [0] * len(latest)  # how many of these each queue pair has waited for
    followed = np.zeros(len(schedule), np.bool_)
    followed[schedule.deps] = True
    arrived_with: dict[int, list[int]] = {}  # the pieces that have arrived when a transfer has
    counts: list[int] = []
    deps: list[int] = []
    bounds = np.searchsorted(owner, np.arange(len(schedule) + 1)).tolist()
    qp_of = qp.tolist()
    for transfer in range(len(schedule)):
        here = connection[transfer]
        waiting = waits[here]
        waiting += all_deps[offsets[transfer] : offsets[transfer + 1]]
        known: tuple[int, list[int]] = (-1, [])
        for piece in range(bounds[transfer], bounds[transfer + 1]):
            row = first_row[here] + qp_of[piece]
            if taken[row] != known[0]:
                last_of = {connection[dep]: dep for dep in sorted(waiting[taken[row] :])}
                known = taken[row], [one for dep in last_of.values() for one in arrived_with[dep]]
            taken[row] = len(waiting)
            latest[row] = piece
            counts.append(len(known[1]))
            deps += known[1]
        if followed[transfer]:
            arrived_with[transfer] = [one for one in latest[first_row[here] : first_row[here + 1]] if one >= 0]
    return Schedule(
        nranks=schedule.nranks,
        size_bytes=schedule.size_bytes,
        src=schedule.src[owner],
        dst=schedule.dst[owner],
        nbytes=nbytes,
        offset_bytes=schedule.offset_bytes[owner] + begin,
        op=schedule.op[owner],
        connection=(np.array(first_row)[schedule.connection[owner]] + qp).astype(np.int32),
        dep_offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        deps=np.array(deps, np.int64),
        connections=pairs,
        in_place=schedule.in_place,
        start_ns=np.repeat(schedule.start_ns, np.diff(first_row)),
        dst_offset_bytes=schedule.dst_offset_bytes[owner] + begin,
    )


def _networked(schedule: Schedule, networked: int | None) -> int:
    return len(schedule.connections) if networked is None else networked


def _rows(schedule: Schedule, qps: int, networked: int | None) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Return where the queue pairs of each connection begin, the end behind, and the ranks of all that comes of them."""
    counts = [qps if index < _networked(schedule, networked) else 1 for index in range(len(schedule.connections))]
    pairs = tuple(pair for pair, count in zip(schedule.connections, counts, strict=True) for _ in range(count))
    return [0, *itertools.accumulate(counts)], pairs


def _check_qps(qps: int) -> None:
    if qps < 1:
        raise ValueError(f"a connection needs at least 1 queue pair, got {qps}")


def _before_on_connection(schedule: Schedule, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the sum of ``values`` over the earlier transfers of each transfer's connection, shape ``(transfers,)``."""
    order = np.argsort(schedule.connection, kind="stable")
    sums = np.cumsum(values[order]) - values[order]
    counts = np.bincount(schedule.connection, minlength=len(schedule.connections))
    used = counts[counts > 0]
    starts = np.cumsum(used) - used
    before = np.empty(len(schedule), np.int64)
    before[order] = sums - np.repeat(sums[starts], used)
    return before
