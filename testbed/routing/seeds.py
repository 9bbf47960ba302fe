"""Forwarding tables under many hash seeds, without building those of each.

A scheme is asked for the tables of two seeds. Where these differ in nothing but the seeds of their groups, and each of those is
what `testbed.routing.hashing.tier_seed` derives from the fabric's, the tables of all other seeds are known. A scheme that uses
the seed otherwise is asked again for every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from testbed.routing.hashing import tier_seed
from testbed.routing.tables import ForwardingTables, Selector

_TIERS = 8
_PROBE_SEED = 0x5EED_CAFE
"""The seed whose tables are compared with another's; one from which nothing follows that a scheme uses without a seed."""

_WORD = 0xFFFF_FFFF


@dataclass(frozen=True, eq=False)
class SeededTables:
    """Tables of a run of seeds that differ in the seeds of their groups alone.

    Attributes:
        tables: Those of one of the seeds.
        seeds: The hash seeds.
        group_seeds: Seed of each group under each hash seed, shape ``(seeds, groups)``, uint32.
    """

    tables: ForwardingTables
    seeds: tuple[int, ...]
    group_seeds: npt.NDArray[np.uint32]

    def one(self, index: int) -> ForwardingTables:
        """Return the tables of one of the seeds."""
        own = self.group_seeds[index].tolist()
        groups = tuple(replace(group, seed=seed) for group, seed in zip(self.tables.groups, own, strict=True))
        return replace(self.tables, groups=groups)

    def first(self) -> SeededTables:
        """Return the first of the seeds alone."""
        return replace(self, seeds=self.seeds[:1], group_seeds=self.group_seeds[:1])

    @property
    def are_alike(self) -> bool:
        """Return whether every flow takes the same ways under all of the seeds."""
        return len(self.seeds) == 1 or not any(_hashes(self.tables))


def _hashes(tables: ForwardingTables) -> Iterator[bool]:
    for group in tables.groups:
        yield len(set(group.members)) > 1 and group.selector in (Selector.HASH, Selector.FLOWLET)


def tables_of_seeds(
    build: Callable[[int], ForwardingTables], seeds: Sequence[int], *, batch: int
) -> Iterator[SeededTables]:
    """Yield the tables of hash seeds, some seeds at a time, in their order.

    Args:
        build: Returns the tables of a seed.
        seeds: The seeds; at least one.
        batch: How many seeds at a time, at most.
    """
    if len(seeds) == 1:
        tables = build(seeds[0])
        yield SeededTables(tables, (seeds[0],), np.array([[group.seed for group in tables.groups]], np.uint32))
        return
    first, probe = build(_PROBE_SEED), build(seeds[0])
    tiers = _find_tiers(first, _PROBE_SEED)
    if tiers is None or _reseed(first, tiers, seeds[0]) != probe:
        for seed in seeds:
            yield from tables_of_seeds(build, [seed], batch=1)
        return
    for begin in range(0, len(seeds), batch):
        some = tuple(seeds[begin : begin + batch])
        of_tiers = np.array([_tier_seeds(seed) for seed in some], np.uint32)
        group_seeds = of_tiers[:, tiers]
        yield SeededTables(first, some, group_seeds)


def _tier_seeds(seed: int) -> list[int]:
    """Return what a group's seed may be: 0, where none is used, or that of a tier."""
    return [0, *(tier_seed(seed, tier) for tier in range(_TIERS))]


def _find_tiers(tables: ForwardingTables, seed: int) -> list[int] | None:
    """Return which of `_tier_seeds` each group has; None if one has another."""
    known = _tier_seeds(seed)
    try:
        return [known.index(group.seed) for group in tables.groups]
    except ValueError:
        return None


def _reseed(tables: ForwardingTables, tiers: Sequence[int], seed: int) -> ForwardingTables:
    known = _tier_seeds(seed)
    groups = tuple(replace(group, seed=known[tier]) for group, tier in zip(tables.groups, tiers, strict=True))
    return replace(tables, groups=groups)
