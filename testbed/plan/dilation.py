"""How much slower than the emulated fabric this machine must run: the larger of two bounds.

Time dilation keeps bytes, divides rates and multiplies times by D. *Capacity*: the machine must carry the packets.
*Fidelity*: the tick must stay below a quarter of the smallest emulated time in use, or a control loop of the engine would
be coarser than what it emulates.

Source:
    Gupta et al., "To Infinity and Beyond: Time-Warped Network Emulation", NSDI 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

# The engine's tick. Shorter ticks cost more CPU than they add fidelity; at D = 2000 this is half a microsecond emulated.
WALL_TICK_NS = 1_000_000
# Every sender costs a system call a tick; above this many of them the tick grows in proportion.
SENDERS_PER_TICK = 20
# A tick is at most this part of the smallest emulated time in use.
TICK_FRACTION = 4
# Share of the measured capacity that a run may plan for. The measurement finds what the machine carries for a moment when it
# is left alone; twice that keeps a run trusted beside a neighbour, who on shared cores takes cache and clock too.
CAPACITY_SHARE = 0.45
# What the capacity measurement counts: packets over host, leaf, spine, leaf, host.
REFERENCE_HOPS = 4
# Cost of a packet that does not grow with its hops (the sender's side), as a number of hops.
_SENDER_HOPS = 2.0


class DilationBound(StrEnum):
    """What sets the time dilation."""

    CAPACITY = "capacity"
    FIDELITY = "fidelity"
    FIXED = "fixed"


def choose_tick_ns(senders: int, least_ns: int = WALL_TICK_NS) -> int:
    """Return the wall length of a tick for a number of hosts that send at once; ``least_ns`` with few of them."""
    return least_ns * max(1, -(-senders // SENDERS_PER_TICK))


@dataclass(frozen=True, slots=True)
class TimeDilation:
    """The chosen dilation and both bounds.

    Attributes:
        value: Wall time per emulated time.
        bound: What set it.
        capacity_value: D at which this machine carries the load; None where its capacity is not known.
        fidelity_value: D at which a tick is short enough.
        smallest_time_ns: The smallest emulated time in use; 0 when there is none.
        smallest_time_name: What that time is.
        wall_tick_ns: Length of a tick.
        offered_packets_per_s: Emulated packets per second at full load, all NICs together.
        capacity_packets_per_s: What this machine carries over four hops; None where unknown.
    """

    value: float
    bound: DilationBound
    capacity_value: float | None
    fidelity_value: float
    smallest_time_ns: int
    smallest_time_name: str
    wall_tick_ns: int
    offered_packets_per_s: float
    capacity_packets_per_s: float | None


def hops_factor(mean_hops: float) -> float:
    """Return the cost of a packet over ``mean_hops`` links relative to one over the reference path."""
    return (_SENDER_HOPS + mean_hops) / (_SENDER_HOPS + REFERENCE_HOPS)


def choose_dilation(
    requested: float | None,
    *,
    offered_packets_per_s: float,
    mean_hops: float,
    capacity_packets_per_s: float | None,
    smallest_time_ns: int,
    smallest_time_name: str,
    wall_tick_ns: int = WALL_TICK_NS,
) -> TimeDilation:
    """Choose the time dilation of a run.

    Args:
        requested: A fixed dilation, or None for automatic.
        offered_packets_per_s: Emulated packets per second at full load.
        mean_hops: Links per packet, on average.
        capacity_packets_per_s: Measured capacity of this machine, or None.
        smallest_time_ns: The smallest emulated time in use, 0 for none.
        smallest_time_name: Its name.
        wall_tick_ns: Length of a tick.
    """
    fidelity = TICK_FRACTION * wall_tick_ns / smallest_time_ns if smallest_time_ns else 1.0
    capacity = None
    if capacity_packets_per_s:
        capacity = offered_packets_per_s * hops_factor(mean_hops) / (capacity_packets_per_s * CAPACITY_SHARE)
    if requested is not None:
        value, bound = requested, DilationBound.FIXED
    elif capacity is not None and capacity > fidelity:
        value, bound = capacity, DilationBound.CAPACITY
    else:
        value, bound = fidelity, DilationBound.FIDELITY
    if requested is None:
        value = float(max(1, math.ceil(value)))  # never below a bound
    return TimeDilation(
        value,
        bound,
        capacity,
        fidelity,
        smallest_time_ns,
        smallest_time_name,
        wall_tick_ns,
        offered_packets_per_s,
        capacity_packets_per_s,
    )
