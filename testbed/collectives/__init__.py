"""Collectives as schedules: who sends which bytes to whom, and what each transfer waits for.

Adding an algorithm is a file with a class that follows `CollectiveAlgorithm`, and its line in `ALGORITHMS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from testbed.collectives.broadcast import BinaryTreeBroadcast, RingBroadcast
from testbed.collectives.direct_all_to_all import DirectAllToAll
from testbed.collectives.double_binary_tree import DoubleBinaryTreeAllReduce
from testbed.collectives.gather import DirectGather
from testbed.collectives.halving_doubling import HalvingDoublingAllReduce
from testbed.collectives.hierarchical import HierarchicalAllReduce
from testbed.collectives.ideal import ideal_arrivals_ns, ideal_cct_ns, largest_frame_wire_bytes, wire_bytes
from testbed.collectives.intra_host import IntraHostLinks
from testbed.collectives.merge import keep_connections, merge_schedules, place_schedule
from testbed.collectives.order import RingOrder, ring_order
from testbed.collectives.pairwise import PairwiseAllToAll
from testbed.collectives.patterns import (
    Flow,
    Pattern,
    build_flows,
    busiest_nic_bytes,
    incast_flows,
    permutation_flows,
)
from testbed.collectives.qp_scaling import cut_into_pieces, deal_over_qps, split_over_qps, striped_bytes
from testbed.collectives.reduce import BinaryTreeReduce, RingReduce
from testbed.collectives.ring import RingAllReduce
from testbed.collectives.ring_all_gather import RingAllGather
from testbed.collectives.ring_reduce_scatter import RingReduceScatter
from testbed.collectives.scatter import DirectScatter
from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    Schedule,
    ScheduleBuilder,
    SteadyTraffic,
    TransferOp,
)
from testbed.collectives.send_recv import RingSendRecv


def _by_name(*algorithms: CollectiveAlgorithm) -> Mapping[str, CollectiveAlgorithm]:
    return {algorithm.name: algorithm for algorithm in algorithms}


ALGORITHMS: Mapping[Collective, Mapping[str, CollectiveAlgorithm]] = {
    Collective.ALL_REDUCE: _by_name(
        RingAllReduce(), HalvingDoublingAllReduce(), DoubleBinaryTreeAllReduce(), HierarchicalAllReduce()
    ),
    Collective.REDUCE_SCATTER: _by_name(RingReduceScatter()),
    Collective.ALL_GATHER: _by_name(RingAllGather()),
    Collective.ALL_TO_ALL: _by_name(DirectAllToAll(), PairwiseAllToAll()),
    Collective.BROADCAST: _by_name(RingBroadcast(), BinaryTreeBroadcast()),
    Collective.REDUCE: _by_name(RingReduce(), BinaryTreeReduce()),
    Collective.GATHER: _by_name(DirectGather()),
    Collective.SCATTER: _by_name(DirectScatter()),
    Collective.SEND_RECV: _by_name(RingSendRecv()),
}
"""Every algorithm by collective and name; the first of a collective is its default."""


def find_algorithm(collective: str, algorithm: str | None = None) -> CollectiveAlgorithm:
    """Return the algorithm of that name, or the collective's default when no name is given.

    Raises:
        ValueError: If there is no such collective or algorithm; the message lists those there are.
    """
    if collective not in set(Collective):
        raise ValueError(f"collective must be one of {', '.join(Collective)}, got {collective!r}")
    known = ALGORITHMS[Collective(collective)]
    if algorithm is None:
        return next(iter(known.values()))
    if algorithm not in known:
        raise ValueError(f"algorithm of {collective} must be one of {', '.join(known)}, got {algorithm!r}")
    return known[algorithm]


__all__ = [
    "ALGORITHMS",
    "SLICES_PER_CHUNK",
    "Collective",
    "CollectiveAlgorithm",
    "Flow",
    "HierarchicalAllReduce",
    "IntraHostLinks",
    "Pattern",
    "RingAllReduce",
    "RingOrder",
    "RingSendRecv",
    "Schedule",
    "ScheduleBuilder",
    "SteadyTraffic",
    "TransferOp",
    "build_flows",
    "busiest_nic_bytes",
    "cut_into_pieces",
    "deal_over_qps",
    "find_algorithm",
    "ideal_arrivals_ns",
    "ideal_cct_ns",
    "incast_flows",
    "keep_connections",
    "largest_frame_wire_bytes",
    "merge_schedules",
    "permutation_flows",
    "place_schedule",
    "ring_order",
    "split_over_qps",
    "striped_bytes",
    "wire_bytes",
]
