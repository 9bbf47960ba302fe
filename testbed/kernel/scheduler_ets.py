"""The scheduler of IEEE 802.1Qaz: ETS, deficit round robin over the priorities, below one token bucket filter at the link's rate.

It is for ports that nothing pauses: ETS asks the first band that has frames, and where that holds them back it asks no other.

Source:
    Linux net/sched/sch_ets.c ``ets_qdisc_dequeue()``; include/uapi/linux/pkt_sched.h, ``TCA_ETS_*``.
"""

from __future__ import annotations

import struct

from testbed.kernel import tc
from testbed.kernel.delay_netem import create_netem, netem_handle
from testbed.kernel.egress import Egress
from testbed.kernel.netlink import (
    NLA_F_NESTED,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTM_NEWQDISC,
    Message,
    attribute,
    attribute_u32,
)

_TCA_ETS_NBANDS, _TCA_ETS_QUANTA, _TCA_ETS_QUANTA_BAND = 1, 3, 4
_TCA_ETS_PRIOMAP, _TCA_ETS_PRIOMAP_BAND = 5, 6
# A band for every priority that may hold data, so that the class that a frame names is the band of its priority.
_BANDS = 6
_PRIORITIES = 16


class EtsScheduler:
    """See the module."""

    name = "ets"
    delays_above = True

    def create(self, egress: Egress) -> list[Message]:
        """Return the shaper, the delay where there is one, and the ETS; priorities without data have a plain queue."""
        index, ifname = egress.index, egress.ifname
        messages, parent = self.change_rate(egress), tc.SHAPER_HANDLE + 1
        if egress.wall_delay_ns:
            messages.append(create_netem(index, ifname, parent, netem_handle(0), egress.wall_delay_ns))
            parent = netem_handle(0) + 1
        lightest = min(weight for _, weight in egress.weights)
        given = dict(egress.weights)
        quanta = [
            round(egress.frame_wire_bytes * given.get(priority, lightest) / lightest) for priority in range(_BANDS)
        ]
        payload = tc.qdisc_payload(index, tc.DATA_HANDLE, parent, "ets", pack_ets(quanta, egress.weights[0][0]))
        operation = (
            f"tc qdisc replace dev {ifname} parent {tc.handle_text(parent)} handle {tc.handle_text(tc.DATA_HANDLE)} ets "
            f"bands {_BANDS} quanta {' '.join(map(str, quanta))}"
        )
        messages.append(Message(operation, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload))
        messages += [
            tc.create_pfifo(
                index, ifname, tc.class_of(priority), tc.SHAPER_HANDLE + (priority + 1 << 16), tc.MOST_PACKETS
            )
            for priority in range(_BANDS)
            if priority not in given
        ]
        return messages

    def change_rate(self, egress: Egress) -> list[Message]:
        """Return what creates or changes the shaper."""
        return [
            tc.create_tbf(
                egress.index,
                egress.ifname,
                tc.ROOT_HANDLE + 1,
                tc.SHAPER_HANDLE,
                rate_bytes_per_s=egress.wall_rate_bytes_per_s,
                burst_bytes=egress.burst_bytes,
                overhead_bytes=egress.overhead_bytes,
            )
        ]


def pack_ets(quanta: list[int], default_band: int) -> bytes:
    """Return the options of an ETS: a band for each quantum; what names no band goes to one of them."""
    bands = b"".join(attribute_u32(_TCA_ETS_QUANTA_BAND, quantum) for quantum in quanta)
    chosen = attribute(_TCA_ETS_PRIOMAP_BAND, struct.pack("=B", default_band)) * _PRIORITIES
    return (
        attribute(_TCA_ETS_NBANDS, struct.pack("=B", len(quanta)))
        + attribute(_TCA_ETS_QUANTA | NLA_F_NESTED, bands)
        + attribute(_TCA_ETS_PRIOMAP | NLA_F_NESTED, chosen)
    )
