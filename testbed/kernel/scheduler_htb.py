"""The scheduler that every kernel has: HTB, a class at the link's rate, below it a class per priority that may borrow all of it.

A class whose queue is paused is passed over, so gates may hang below it.

Source:
    Linux net/sched/sch_htb.c ``htb_dequeue_tree()``.
"""

from __future__ import annotations

from testbed.kernel import tc
from testbed.kernel.egress import Egress
from testbed.kernel.netlink import Message

# Minor numbers below are the priorities' (`tc.class_of`).
_TRUNK_CLASS = 0x10


class HtbScheduler:
    """See the module."""

    name = "htb"
    delays_above = False

    def create(self, egress: Egress) -> list[Message]:
        """Return the HTB and its classes."""
        default = tc.class_of(egress.weights[0][0])
        return [
            tc.create_htb(egress.index, egress.ifname, tc.ROOT_HANDLE + 1, tc.DATA_HANDLE, default),
            *_create_classes(egress),
        ]

    def change_rate(self, egress: Egress) -> list[Message]:
        """Return what changes its classes."""
        return _create_classes(egress)


def _create_classes(egress: Egress) -> list[Message]:
    rate = egress.wall_rate_bytes_per_s
    total = sum(weight for _, weight in egress.weights)
    lightest = min(weight for _, weight in egress.weights)
    trunk = tc.DATA_HANDLE + _TRUNK_CLASS
    return [
        tc.create_htb_class(
            egress.index,
            egress.ifname,
            parent,
            classid,
            rate_bytes_per_s=max(1, round(rate * share)),
            ceil_bytes_per_s=rate,
            burst_bytes=egress.burst_bytes,
            quantum_bytes=quantum,
            overhead_bytes=egress.overhead_bytes,
        )
        for parent, classid, share, quantum in (
            (tc.DATA_HANDLE, trunk, 1.0, egress.frame_wire_bytes),
            *(
                (trunk, tc.class_of(priority), weight / total, round(egress.frame_wire_bytes * weight / lightest))
                for priority, weight in egress.weights
            ),
        )
    ]
