"""Which hosts each of several jobs gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Which half of a rack a job that begins there takes when jobs are fragmented: of racks 0, 1, 2, 3, and so on. With this
# pattern the next racks of a rack's two jobs, the one after it and the one before it, always hold them in the same half.
_LOWER_HALVES = (True, True, False, False)


def place_jobs(
    wanted: Sequence[tuple[str | tuple[int, ...], int]], hosts_per_leaf: Sequence[int], rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Return the hosts of each job; lists come first, then the others in turn from what is free.

    Args:
        wanted: The placement of each job (``packed``, ``fragmented``, ``random``, or its hosts) and its number of hosts.
        hosts_per_leaf: Hosts under each leaf; hosts are numbered leaf after leaf.
        rng: Draws random placements.

    Returns:
        Host numbers, ascending; a list as it is.

    Raises:
        ValueError: If there are not enough hosts, a placement is unknown, or lists share a host.
    """
    free = set(range(sum(hosts_per_leaf)))
    for placement, _ in wanted:
        if not isinstance(placement, str):
            if not free.issuperset(placement):
                raise ValueError(f"hosts {sorted(set(placement) - free)} are in two jobs, or do not exist")
            free -= set(placement)
    placed = []
    for number, (placement, count) in enumerate(wanted):
        if not isinstance(placement, str):
            placed.append(placement)
            continue
        if count > len(free):
            raise ValueError(f"job {number} needs {count} hosts, {len(free)} are free")
        if placement == "packed":
            hosts = sorted(free)[:count]
        elif placement == "random":
            hosts = sorted(rng.choice(sorted(free), count, replace=False).tolist())
        elif placement == "fragmented":
            hosts = sorted(_fragments(number, hosts_per_leaf, free)[:count])
        else:
            raise ValueError(f"there is no placement {placement!r}")
        free -= set(hosts)
        placed.append(tuple(hosts))
    return placed


def _fragments(number: int, hosts_per_leaf: Sequence[int], free: set[int]) -> list[int]:
    """Return all free hosts in the order in which a fragmented job takes them: half a rack, half the next rack, ….

    Job ``number`` begins in the rack of its number. There it takes the half of `_LOWER_HALVES`, in the racks behind it
    the half that jobs which begin there leave.
    """
    racks = len(hosts_per_leaf)
    first = [sum(hosts_per_leaf[:rack]) for rack in range(racks)]
    preferred: list[int] = []
    rest: list[int] = []
    for step in range(racks):
        rack = (number + step) % racks
        hosts = range(first[rack], first[rack] + hosts_per_leaf[rack])
        middle = hosts.start + (len(hosts) + 1) // 2
        takes_lower = _LOWER_HALVES[rack % len(_LOWER_HALVES)] == (step == 0)
        for host in hosts:
            if host in free:
                (preferred if (host < middle) == takes_lower else rest).append(host)
    return preferred + rest
