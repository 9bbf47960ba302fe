"""The scheduler of IEEE 802.1Qaz: ETS, strict bands, then deficit round robin over the others, below one token bucket filter.

A held strict band is passed over. Of the bands with a weight ETS asks the first that has frames, and where that holds them back
it asks no other: several of them are for ports where none of them is paused.

Source:
    Linux net/sched/sch_ets.c ``ets_qdisc_dequeue()``; include/uapi/linux/pkt_sched.h, ``TCA_ETS_*``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from testbed.kernel.egress import Egress
from testbed.kernel.netlink import NLA_F_NESTED, Message, attribute, attribute_u32
from testbed.kernel.shaper_above import create_below_shaper, create_port_shaper

_TCA_ETS_NBANDS, _TCA_ETS_NSTRICT, _TCA_ETS_QUANTA, _TCA_ETS_QUANTA_BAND = 1, 2, 3, 4
_TCA_ETS_PRIOMAP, _TCA_ETS_PRIOMAP_BAND = 5, 6
_PRIORITIES = 16


class EtsScheduler:
    """See the module."""

    name = "ets"
    delays_above = True

    def create(self, egress: Egress) -> list[Message]:
        """Return the shaper, the delay where there is one, and the ETS."""
        weights = [weight for _, weight in egress.shares]
        quanta = [round(egress.frame_wire_bytes * weight / min(weights)) for weight in weights]
        default = [priority for priority, _ in egress.weights].index(egress.rest)
        described = f"bands {len(egress.weights)} strict {egress.strict_classes}"
        if quanta:
            described += f" quanta {' '.join(map(str, quanta))}"
        return create_below_shaper(egress, self.name, pack_ets(egress.strict_classes, quanta, default), described)

    def change_rate(self, egress: Egress) -> list[Message]:
        """Return what changes the shaper."""
        return create_port_shaper(egress)


def pack_ets(strict: int, quanta: Sequence[int], default_band: int) -> bytes:
    """Return the options of an ETS: strict bands, then one for each quantum; what names no band goes to one of them."""
    options = attribute(_TCA_ETS_NBANDS, struct.pack("=B", strict + len(quanta)))
    options += attribute(_TCA_ETS_NSTRICT, struct.pack("=B", strict))
    if quanta:
        bands = b"".join(attribute_u32(_TCA_ETS_QUANTA_BAND, quantum) for quantum in quanta)
        options += attribute(_TCA_ETS_QUANTA | NLA_F_NESTED, bands)
    chosen = attribute(_TCA_ETS_PRIOMAP_BAND, struct.pack("=B", default_band)) * _PRIORITIES
    return options + attribute(_TCA_ETS_PRIOMAP | NLA_F_NESTED, chosen)
