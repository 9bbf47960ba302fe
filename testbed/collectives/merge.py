"""Several schedules as one, so that they run at the same time over one fabric."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from testbed.collectives.schedule import Schedule


def place_schedule(schedule: Schedule, ranks: Sequence[int], nranks: int, start_ns: int = 0) -> Schedule:
    """Return the same schedule among other ranks, all of it later.

    Args:
        schedule: What is sent.
        ranks: What each of its ranks is called there; each another one.
        nranks: Ranks that there are there.
        start_ns: How much later each connection may begin.

    Raises:
        ValueError: If there are too few names, or a rank leaves ``nranks``.
    """
    if len(set(ranks)) < schedule.nranks:
        raise ValueError(f"{schedule.nranks} ranks need as many places, got {len(set(ranks))}")
    names = np.asarray(ranks, np.int32)
    return dataclasses.replace(
        schedule,
        nranks=nranks,
        src=names[schedule.src],
        dst=names[schedule.dst],
        connections=tuple((int(names[src]), int(names[dst])) for src, dst in schedule.connections),
        start_ns=schedule.start_ns + start_ns,
    )


def merge_schedules(schedules: Sequence[Schedule]) -> Schedule:
    """Return one schedule that sends what all of them do, at the same time; none waits for another.

    The connections of the first come first, then those of the second, and so on; two schedules share none, even between the
    same ranks.

    Args:
        schedules: At least one, all among the same ranks.

    Raises:
        ValueError: If there is none, or they differ in their ranks.
    """
    if not schedules or len({one.nranks for one in schedules}) > 1:
        raise ValueError("schedules to merge must be among the same ranks, and at least one")
    connections = np.cumsum([0, *(len(one.connections) for one in schedules)])
    transfers = np.cumsum([0, *(len(one) for one in schedules)])
    deps = np.cumsum([0, *(len(one.deps) for one in schedules)])

    def joined(name: str) -> npt.NDArray[np.int64]:
        return np.concatenate([getattr(one, name) for one in schedules])

    return Schedule(
        nranks=schedules[0].nranks,
        size_bytes=max(one.size_bytes for one in schedules),
        src=joined("src").astype(np.int32),
        dst=joined("dst").astype(np.int32),
        nbytes=joined("nbytes"),
        offset_bytes=joined("offset_bytes"),
        op=joined("op").astype(np.uint8),
        connection=np.concatenate(
            [one.connection + first for one, first in zip(schedules, connections, strict=False)]
        ).astype(np.int32),
        dep_offsets=np.concatenate(
            [[0], *(one.dep_offsets[1:] + first for one, first in zip(schedules, deps, strict=False))]
        ).astype(np.int64),
        deps=np.concatenate([one.deps + first for one, first in zip(schedules, transfers, strict=False)]),
        connections=tuple(pair for one in schedules for pair in one.connections),
        in_place=all(one.in_place for one in schedules),
        dst_offset_bytes=joined("dst_offset_bytes"),
        start_ns=joined("start_ns"),
    )


def keep_connections(schedule: Schedule, kept: npt.NDArray[np.bool_]) -> Schedule:
    """Return the schedule without the transfers of some connections, which stay as connections that send nothing.

    Args:
        schedule: What is sent.
        kept: Which connections keep their transfers, shape ``(connections,)``; none of these may wait for another's.

    Raises:
        ValueError: If a transfer that is kept waits for one that is not.
    """
    stays = kept[schedule.connection]
    number = np.cumsum(stays) - 1
    waits = np.diff(schedule.dep_offsets)
    of_kept = np.repeat(stays, waits)
    deps = schedule.deps[of_kept]
    if not stays[deps].all():
        raise ValueError("what is kept waits for what is not")
    return dataclasses.replace(
        schedule,
        src=schedule.src[stays],
        dst=schedule.dst[stays],
        nbytes=schedule.nbytes[stays],
        offset_bytes=schedule.offset_bytes[stays],
        op=schedule.op[stays],
        connection=schedule.connection[stays],
        dep_offsets=np.concatenate(([0], np.cumsum(waits[stays]))).astype(np.int64),
        deps=number[deps].astype(np.int64),
        dst_offset_bytes=schedule.dst_offset_bytes[stays],
    )
