"""Traffic patterns: flows that start together and wait for nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from testbed.collectives.schedule import SLICES_PER_CHUNK, Schedule, ScheduleBuilder, slice_borders


class Pattern(StrEnum):
    """Patterns beside collectives; the first rank is 0."""

    INCAST = "incast"
    """Ranks 1 to ``fan_in`` send to rank 0."""
    PERMUTATION = "permutation"
    """Every rank sends to one other and receives from one other, drawn at random."""
    FLOWS = "flows"
    """As listed."""


class Flow(NamedTuple):
    """Bytes from one rank to another, over a connection of their own, sent from ``start_ns`` on."""

    src: int
    dst: int
    nbytes: int
    start_ns: int = 0


def incast_flows(fan_in: int, size_bytes: int) -> list[Flow]:
    """Return the flows of an incast: ranks 1 to ``fan_in`` send ``size_bytes`` each to rank 0."""
    return [Flow(src, 0, size_bytes) for src in range(1, fan_in + 1)]


def permutation_flows(nranks: int, size_bytes: int, rng: np.random.Generator) -> list[Flow]:
    """Return the flows of a random permutation in which nobody sends to itself.

    Drawn until one has no fixed point, which leaves all such permutations equally likely; it takes 2.7 draws on average.

    Args:
        nranks: Number of ranks; at least 2.
        size_bytes: What each sends.
        rng: Draws the permutation.
    """
    if nranks < 2:
        raise ValueError(f"a permutation without fixed points needs at least 2 ranks, got {nranks}")
    own = np.arange(nranks)
    target = rng.permutation(nranks)
    while (target == own).any():
        target = rng.permutation(nranks)
    return [Flow(src, dst, size_bytes) for src, dst in enumerate(target.tolist())]


def build_flows(
    nranks: int, flows: Sequence[Flow], slices: int = SLICES_PER_CHUNK, min_slice_bytes: int = 1
) -> Schedule:
    """Return the schedule of flows, which start together unless they say otherwise.

    A flow is cut into ``slices`` messages, or into fewer that have at least ``min_slice_bytes``. What a rank sends lies one
    after the other in its send buffer, in the order of the flows; so does what it receives in its receive buffer.

    Args:
        nranks: Number of ranks of the fabric.
        flows: The flows; at least one. Two between the same ranks have a connection each.
        slices: Messages of a flow; at least 1.
        min_slice_bytes: The least that is worth a message of its own; at least 1.

    Raises:
        ValueError: If there is no flow, or one is empty, leaves the ranks or joins a rank to itself.
    """
    if not flows:
        raise ValueError("a pattern needs at least one flow")
    if slices < 1 or min_slice_bytes < 1:
        raise ValueError(f"a flow needs at least 1 slice of at least 1 byte, got {slices} of {min_slice_bytes}")
    sent, received = [0] * nranks, [0] * nranks
    placed = []
    for flow in flows:
        if not (0 <= flow.src < nranks and 0 <= flow.dst < nranks) or flow.src == flow.dst:
            raise ValueError(f"a flow must join two of the ranks 0 to {nranks - 1}, got {flow.src} to {flow.dst}")
        if flow.nbytes < 1:
            raise ValueError(f"a flow must have at least 1 byte, got {flow.nbytes}")
        placed.append((sent[flow.src], received[flow.dst]))
        sent[flow.src] += flow.nbytes
        received[flow.dst] += flow.nbytes
    builder = ScheduleBuilder(nranks, max(*sent, *received), in_place=False)
    for number, (flow, (begin, into)) in enumerate(zip(flows, placed, strict=True)):
        for offset, nbytes in slice_borders(begin, flow.nbytes, max(1, min(slices, flow.nbytes // min_slice_bytes))):
            builder.add(
                flow.src,
                flow.dst,
                offset_bytes=offset,
                nbytes=nbytes,
                dst_offset_bytes=into + offset - begin,
                channel=number,
            )
    return dataclasses.replace(builder.build(), start_ns=np.array([flow.start_ns for flow in flows], np.int64))


def busiest_nic_bytes(flows: Sequence[Flow]) -> int:
    """Return the payload that the busiest NIC sends, or receives, whichever is more."""
    totals: dict[tuple[str, int], int] = {}
    for flow in flows:
        for way in (("out", flow.src), ("in", flow.dst)):
            totals[way] = totals.get(way, 0) + flow.nbytes
    return max(totals.values())
