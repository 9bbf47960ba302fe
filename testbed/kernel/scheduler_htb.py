"""The scheduler that every kernel has: HTB, a class at the link's rate, below it a class per priority that may borrow all of it.

A class whose queue is paused is passed over, so gates may hang below it.

HTB's prio orders borrowing alone: a class below its guaranteed rate is served before any that borrows, whatever their prios. So
where a priority is strict no class is guaranteed anything, all of them borrow, strict ones at prios of their own, and those with
a weight behind them in turn, a quantum each.

Source:
    Linux net/sched/sch_htb.c ``htb_dequeue()`` (levels, then prios), ``htb_dequeue_tree()``.
"""

from __future__ import annotations

from testbed.kernel import tc
from testbed.kernel.egress import Egress
from testbed.kernel.netlink import Message

# Minor numbers below are the priorities' (`tc.class_of`).
_TRUNK_CLASS = 0x10
# HTB takes no 0. A frame at this rate is an hour's debt, of which HTB keeps a minute: nothing but a frame a minute is guaranteed.
_NO_GUARANTEE_BYTES_PER_S = 1


class HtbScheduler:
    """See the module."""

    name = "htb"
    delays_above = False

    def create(self, egress: Egress) -> list[Message]:
        """Return the HTB and its classes."""
        default = egress.class_of(egress.rest)
        return [
            tc.create_htb(egress.index, egress.ifname, tc.ROOT_HANDLE + 1, tc.DATA_HANDLE, default),
            *_create_classes(egress),
        ]

    def change_rate(self, egress: Egress) -> list[Message]:
        """Return what changes its classes."""
        return _create_classes(egress)


def _create_classes(egress: Egress) -> list[Message]:
    rate, frame = egress.wall_rate_bytes_per_s, egress.frame_wire_bytes
    strict, weights = egress.strict_classes, [weight for _, weight in egress.shares]
    trunk = tc.DATA_HANDLE + _TRUNK_CLASS
    rows = [(tc.DATA_HANDLE, trunk, rate, frame, 0)]
    for place, (priority, weight) in enumerate(egress.weights):
        guaranteed = _NO_GUARANTEE_BYTES_PER_S if strict or weight is None else round(rate * weight / sum(weights))
        quantum = frame if weight is None else round(frame * weight / min(weights))
        rows.append((trunk, egress.class_of(priority), max(1, guaranteed), quantum, min(place, strict)))
    return [
        tc.create_htb_class(
            egress.index,
            egress.ifname,
            parent,
            classid,
            rate_bytes_per_s=guaranteed,
            ceil_bytes_per_s=rate,
            burst_bytes=egress.burst_bytes,
            quantum_bytes=quantum,
            overhead_bytes=egress.overhead_bytes,
            rank=rank,
        )
        for parent, classid, guaranteed, quantum, rank in rows
    ]
