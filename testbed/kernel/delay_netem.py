"""Propagation on the wire, on kernels that have it: netem, which holds every frame for the delay of its cable.

It stands below the shaper, so a frame waits for its cable first and for its turn after. For a constant delay both orders let
every frame go at the same moment; a queue's depth then counts what the cable holds.

Source:
    Linux net/sched/sch_netem.c; include/uapi/linux/pkt_sched.h, ``struct tc_netem_qopt`` and ``TCA_NETEM_LATENCY64``.
"""

from __future__ import annotations

import struct

from testbed.kernel import tc
from testbed.kernel.netlink import NLM_F_CREATE, NLM_F_REPLACE, RTM_NEWQDISC, Message, attribute

_TCA_NETEM_LATENCY64 = 10


def create_netem(index: int, ifname: str, parent: int, handle: int, wall_delay_ns: int) -> Message:
    """Return what hangs a delay under a class.

    Args:
        index: Interface.
        ifname: Its name, for messages.
        parent: The class.
        handle: Its own handle.
        wall_delay_ns: How long each frame is held.
    """
    payload = tc.qdisc_payload(index, handle, parent, "netem", pack_netem(wall_delay_ns))
    operation = (
        f"tc qdisc replace dev {ifname} parent {tc.handle_text(parent)} handle {tc.handle_text(handle)} netem "
        f"delay {wall_delay_ns}ns limit {tc.MOST_PACKETS}"
    )
    return Message(operation, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload)


def netem_handle(priority: int) -> int:
    """Return the handle of the delay of a priority's queue."""
    return tc.NETEM_HANDLE + (priority << 16)


def pack_netem(wall_delay_ns: int) -> bytes:
    """Return the options of a netem: a delay, no jitter, no loss."""
    # latency (in ticks, which the 64 bits below replace), limit, loss, gap, duplicate, jitter
    fields = struct.pack("=6I", 0, tc.MOST_PACKETS, 0, 0, 0, 0)
    return fields + attribute(_TCA_NETEM_LATENCY64, struct.pack("=q", wall_delay_ns))
