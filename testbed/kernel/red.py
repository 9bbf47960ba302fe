"""The kernel's own marker: RED without averaging, which marks ECT frames and drops nothing.

With ``Wlog`` 0 its average is the instantaneous depth, so below the first threshold nothing and from the second on everything is
marked. The depth is that of its queue before the frame is added (``red_enqueue()``), where our marker counts the frame itself:
the frame whose addition passes a threshold is still marked as below it. In between it does not draw for each frame: the distance
from one mark to the next is uniform between one frame and 1/p, half of that on average. ``max_p`` is chosen so that at the second
threshold the share of marked frames is the asked one; halfway it is up to a tenth above the straight line.

Source:
    Linux net/sched/sch_red.c (``red_enqueue()``: ``child->qstats.backlog``) and include/net/red.h (``red_cmp_thresh()``);
    include/uapi/linux/pkt_sched.h, ``struct tc_red_qopt``.
"""

from __future__ import annotations

import struct

from testbed.kernel import tc
from testbed.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTM_NEWQDISC,
    Message,
    RouteSocket,
    attribute,
    attribute_u32,
)

_TCA_RED_PARMS, _TCA_RED_STAB, _TCA_RED_MAX_P, _TCA_RED_FLAGS = 1, 2, 3, 4
_TC_RED_ECN, _TC_RED_NODROP = 1, 8
_STAB_BYTES = 256
_XSTATS = struct.Struct("=4I")
# After an idle time nothing is left of the average: it is shifted by so many bits.
_NO_MEMORY = 31
_LIMIT_BYTES = 0x7FFFFFFF


def create_red(
    index: int,
    ifname: str,
    priority: int,
    parent: int,
    *,
    kmin_bytes: int,
    kmax_bytes: int,
    pmax: float,
) -> Message:
    """Return what hangs a marker under a class.

    Args:
        index: Interface.
        ifname: Its name, for messages.
        priority: Priority of the queue.
        parent: The class.
        kmin_bytes: Depth up to which nothing is marked.
        kmax_bytes: Depth from which everything is.
        pmax: Share of marked frames at kmax.
    """
    payload = tc.qdisc_payload(index, red_handle(priority), parent, "red", pack_red(kmin_bytes, kmax_bytes, pmax))
    operation = (
        f"tc qdisc replace dev {ifname} parent {tc.handle_text(parent)} red limit {_LIMIT_BYTES} min {kmin_bytes} "
        f"max {kmax_bytes} probability {spacing_probability(pmax):g} ecn nodrop"
    )
    return Message(operation, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload)


def red_handle(priority: int) -> int:
    """Return the handle of a queue's marker."""
    return tc.RED_HANDLE + (priority << 16)


def read_marks(route: RouteSocket) -> dict[tuple[int, int], int]:
    """Return the frames that each marker of the socket's namespace has marked, by interface index and priority.

    Source:
        include/uapi/linux/pkt_sched.h, ``struct tc_red_xstats``: early, pdrop, other, marked.
    """
    found = {}
    for index, handle, kind, statistics in tc.read_qdiscs(route):
        if kind == "red" and len(statistics) >= _XSTATS.size:
            found[index, (handle - tc.RED_HANDLE) >> 16] = _XSTATS.unpack_from(statistics)[3]
    return found


def spacing_probability(share: float) -> float:
    """Return the p of RED's uniform distances (1 to 1/p) that marks this share of the frames.

    The mean distance is (1/p + 1)/2, so the share is 2p/(1 + p).
    """
    return share / (2.0 - share)


def pack_red(kmin_bytes: int, kmax_bytes: int, pmax: float) -> bytes:
    """Return the options of a RED qdisc: no averaging, marks instead of drops."""
    flags = _TC_RED_ECN | _TC_RED_NODROP
    # ``struct tc_red_qopt``; Plog and Scell_log only matter where max_p is absent and where there is averaging.
    parms = struct.pack("=IIIBBBB", _LIMIT_BYTES, kmin_bytes, max(kmax_bytes, kmin_bytes + 1), 0, 0, 0, 0)
    options = attribute(_TCA_RED_PARMS, parms) + attribute(_TCA_RED_STAB, bytes([_NO_MEMORY] * _STAB_BYTES))
    options += attribute_u32(_TCA_RED_MAX_P, min(0xFFFFFFFF, round(spacing_probability(pmax) * (1 << 32))))
    return options + attribute(_TCA_RED_FLAGS, struct.pack("=II", flags, flags))
