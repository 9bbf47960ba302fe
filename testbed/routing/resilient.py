"""Resilient hashing: when members of a group die, only their flows move."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

MAX_BUCKETS = 1024
"""Buckets of a group of fewer members: what 32 of them need to share a dead one's part exactly evenly, however many die."""


def replace_dead(members: Sequence[int], alive: Sequence[bool]) -> tuple[int, ...]:
    """Return the members of a hashed group whose dead ones are replaced, the part of the hash's range of all others unchanged.

    Every member's part becomes as many buckets as there are survivors, or fewer where `MAX_BUCKETS` allow no more; those of dead
    ones go to the survivors in turn, so that they share their flows evenly, to a bucket. Without this the range is divided anew,
    and flows of members that live move too.

    To be asked once, of the members as they were: buckets of buckets would multiply.

    Args:
        members: Egress port ids, each as often as its weight.
        alive: Whether each of them still leads anywhere; at least one does.

    Source:
        Broadcom "resilient hashing" and Cisco "resilient ECMP" keep a table of buckets, of which a dead member's alone are filled
        anew; RFC 2992, section 3: otherwise a quarter to half of all flows move.
    """
    survivors = [member for member, lives in zip(members, alive, strict=True) if lives]
    each = min(len(survivors), max(1, MAX_BUCKETS // len(members)))
    heirs = cycle(survivors)
    buckets: list[int] = []
    for member, lives in zip(members, alive, strict=True):
        buckets += [member] * each if lives else islice(heirs, each)
    return tuple(buckets)
