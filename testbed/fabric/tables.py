"""Forwarding tables in the kernel: written while traffic runs.

The maps have room for more groups than are in use. New groups are written where no entry of the fib points, then the fib is
switched over entry by entry: a frame meets the old tables or the new ones, never a half-written group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.errors import LabError
from testbed.kernel import layout
from testbed.routing import ForwardingTables, Group, HashFunction, Selector
from testbed.routing.resilient import MAX_BUCKETS
from testbed.topology import Topology

# enum tb_selector in bpf/fabric.h
SELECTOR_NUMBERS = {
    Selector.HASH: 0,
    Selector.ROUND_ROBIN: 1,
    Selector.RANDOM: 2,
    Selector.LEAST_DEPTH: 3,
    Selector.FLOWLET: 4,
}
# enum tb_hash_function, likewise
HASH_FUNCTION_NUMBERS = {HashFunction.MURMUR3: 0, HashFunction.CRC32: 1, HashFunction.CRC16: 2}
# What a lab that stays has room for beside its own tables: a group for each leaf's way to every other, for some dozens of leaves.
_MAX_SPARE_GROUPS = 4096
_MAX_SPARE_MEMBERS = 1 << 18

_Row = tuple[tuple[int, ...], int, int, int, int, int, int]
"""A group as the program reads it: members, hash fields, seed, selector, whether there are overrides, hash function, gap."""


def pack_members(group: Group) -> list[int]:
    """Return a group's members as the eBPF program reads them: with weights where depths are compared, else as they are."""
    if group.selector is Selector.LEAST_DEPTH:
        return [port | weight << 16 for port, weight in group.choices()]
    return list(group.members)


def count_rows(
    topology: Topology, tables: Iterable[ForwardingTables], *, any_failure: bool, resilient: bool = False
) -> tuple[int, int, int]:
    """Return how many groups, members and exact-match entries a fabric's maps must hold.

    Args:
        topology: The fabric.
        tables: All tables that it will have. Those of before and after a change stand there together; a tick may pass over some.
        any_failure: Whether links may fail that nobody has announced.
        resilient: Whether groups become buckets then, see `testbed.routing.resilient`.
    """
    sizes: list[tuple[int, int]] = []
    entries: set[Any] = set()
    for one in tables:
        used = [one.groups[index] for index in np.unique(one.fib).tolist() if index >= 0]
        sizes.append((len(used), sum(len(group.members) for group in used)))
        entries |= one.overrides.keys()
    # Two tables may have no row in common, even where they have the same groups: a row says whether its switch has entries.
    groups, members = (sum(sorted(size)[-2:]) for size in zip(*sizes, strict=True))
    overrides = len(entries)
    # Room between rows that are in use is rarely all of one piece.
    members *= 2
    if any_failure:
        most = MAX_BUCKETS if resilient else max(len(node.ports) for node in topology.nodes)
        switches = len(topology.nodes) - len(topology.hosts)
        spare = min(_MAX_SPARE_GROUPS, switches * switches)
        groups += spare
        members += min(_MAX_SPARE_MEMBERS, spare * most)
    return groups, members, overrides


@dataclass(frozen=True, eq=False)
class WrittenTables:
    """Forwarding tables as they stand in the maps."""

    fib: npt.NDArray[np.int32]
    groups: npt.NDArray[Any]
    members: npt.NDArray[np.uint32]
    overrides: dict[tuple[int, int, int, int], int]


class TableWriter:
    """Writes forwarding tables into a fabric's maps.

    Args:
        topology: The fabric.
        arrays: Its maps.
        overrides: Descriptor of the map of exact-match entries; the caller closes it.
        time_dilation: Wall time per emulated time.
    """

    def __init__(
        self, topology: Topology, arrays: layout.MappedArrays, overrides: int, *, time_dilation: float
    ) -> None:
        self._topology = topology
        self._arrays = arrays
        self._overrides = overrides
        self._dilation = time_dilation
        self._rows_of: dict[int, list[_Row]] = {}

    def prepare(self, tables: ForwardingTables) -> None:
        """Work out ahead of time what :meth:`write` will need: it is then quick enough for a tick."""
        self._packed(tables)

    def write(self, tables: ForwardingTables) -> None:
        """Let the switches forward by these tables from now on.

        Raises:
            LabError: The maps have no room for them.
        """
        arrays = self._arrays
        wanted = self._packed(tables)
        used = np.unique(tables.fib)
        places = self._place([(int(index), wanted[index]) for index in used.tolist() if index >= 0])
        lookup = np.full(len(tables.groups) + 2, -1, np.int32)
        for index, place in places.items():
            lookup[index + 2] = place
        lookup[0] = -2  # UNREACHABLE
        fib = lookup[tables.fib.reshape(-1) + 2]
        present = layout.read_overrides(self._overrides)
        entries: dict[tuple[int, int, int, int], int] = {tuple(key): port for key, port in tables.overrides.items()}  # type: ignore[misc]
        layout.write_overrides(self._overrides, [item for item in entries.items() if present.get(item[0]) != item[1]])
        arrays.fib[:] = fib
        layout.delete_overrides(self._overrides, present.keys() - entries.keys())

    def read(self) -> WrittenTables:
        """Return what the switches forward by now, to be put back with :meth:`restore`."""
        arrays = self._arrays
        overrides = layout.read_overrides(self._overrides)
        return WrittenTables(arrays.fib.copy(), arrays.groups.copy(), arrays.members.copy(), overrides)

    def restore(self, tables: WrittenTables) -> None:
        """Put back what :meth:`read` returned; what is forwarded meanwhile may take any way."""
        arrays, present = self._arrays, layout.read_overrides(self._overrides)
        arrays.members[:] = tables.members
        arrays.groups[:] = tables.groups
        arrays.fib[:] = tables.fib
        layout.delete_overrides(self._overrides, present.keys() - tables.overrides.keys())
        layout.write_overrides(self._overrides, tables.overrides.items())

    def _packed(self, tables: ForwardingTables) -> list[_Row]:
        """Return all groups of some tables as the program reads them."""
        known = self._rows_of.get(id(tables))
        if known is None:
            overridden = {key.node for key in tables.overrides}
            known = self._rows_of[id(tables)] = [
                (
                    tuple(pack_members(group)),
                    int(group.hash_fields),
                    group.seed & 0xFFFFFFFF,
                    SELECTOR_NUMBERS[group.selector],
                    int(self._topology.port(group.members[0]).node in overridden),
                    HASH_FUNCTION_NUMBERS[group.hash_function],
                    round(group.gap_ns * self._dilation),
                )
                for group in tables.groups
            ]
        return known

    def _place(self, wanted: Sequence[tuple[int, _Row]]) -> dict[int, int]:
        """Return the row of the map where each wanted group stands, writing those that are not there yet."""
        arrays = self._arrays
        live = [int(row) for row in np.unique(arrays.fib) if row >= 0]
        standing: dict[_Row, int] = {}
        spans: list[tuple[int, int]] = []
        for number in live:
            row = arrays.groups[number]
            first, count = int(row["first_member"]), int(row["members"])
            spans.append((first, first + count))
            content = (
                tuple(arrays.members[first : first + count].tolist()),
                int(row["hash_fields"]),
                int(row["seed"]),
                int(row["selector"]),
                int(row["overrides"]),
                int(row["hash_function"]),
                int(row["gap_ns"]),
            )
            standing[content] = number
        free = iter(sorted(set(range(len(arrays.groups))) - set(live)))
        space = _Space(spans, len(arrays.members))
        places: dict[int, int] = {}
        for index, content in wanted:
            if content not in standing:
                number = next(free, -1)
                first = space.take(len(content[0]))
                if number < 0 or first < 0:
                    raise LabError(
                        "the lab's maps have no room for so many groups at once",
                        hint="heal something, or deploy a scenario with these faults",
                    )
                members, *others = content
                arrays.members[first : first + len(members)] = members
                arrays.groups[number] = (first, len(members), *others)
                standing[content] = number
            places[index] = standing[content]
        return places


class _Space:
    """The stretches of an array that are free."""

    def __init__(self, taken: Sequence[tuple[int, int]], size: int) -> None:
        self._gaps: list[list[int]] = []
        at = 0
        for first, last in sorted(taken):
            if first > at:
                self._gaps.append([at, first])
            at = max(at, last)
        if size > at:
            self._gaps.append([at, size])

    def take(self, count: int) -> int:
        """Return where a stretch of that length begins, which is then taken; -1 if there is none."""
        for gap in self._gaps:
            if gap[1] - gap[0] >= count:
                first = gap[0]
                gap[0] += count
                return first
        return -1
