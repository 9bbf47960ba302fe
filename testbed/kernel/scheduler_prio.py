"""The scheduler of strict priorities alone: prio, which serves a band while those before it are empty, below one shaper.

A band whose queue is paused is passed over. The shaper above charges the frame that prio shows it, which is the one that leaves,
for a closed gate of either kind shows none.

Source:
    Linux net/sched/sch_prio.c ``prio_peek()``, ``prio_dequeue()``, ``prio_classify()``; include/uapi/linux/pkt_sched.h,
    ``struct tc_prio_qopt``.
"""

from __future__ import annotations

import struct

from testbed.kernel.egress import Egress
from testbed.kernel.netlink import Message
from testbed.kernel.shaper_above import create_below_shaper, create_port_shaper

_PRIORITIES = 16


class PrioScheduler:
    """See the module."""

    name = "prio"
    delays_above = True

    def create(self, egress: Egress) -> list[Message]:
        """Return the shaper, the delay where there is one, and the prio."""
        bands = len(egress.weights)
        default = [priority for priority, _ in egress.weights].index(egress.rest)
        described = f"bands {bands} priomap {' '.join([str(default)] * _PRIORITIES)}"
        return create_below_shaper(egress, self.name, pack_prio(bands, default), described)

    def change_rate(self, egress: Egress) -> list[Message]:
        """Return what changes the shaper."""
        return create_port_shaper(egress)


def pack_prio(bands: int, default_band: int) -> bytes:
    """Return ``struct tc_prio_qopt``: what names no band goes to one of them."""
    return struct.pack(f"=i{_PRIORITIES}B", bands, *([default_band] * _PRIORITIES))
