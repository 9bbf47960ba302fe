"""The ways of many flows under many hash seeds at once: `testbed.routing.routes` as arrays.

Rows of a `Spread` are ways: of a flow, under a seed. A flow whose switches all hash has one row per seed; where a switch spreads
its packets there is one for every member of its group, with its share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from testbed.routing.hashing import FlowKey, hash_columns
from testbed.routing.paths import trace_path
from testbed.routing.seeds import SeededTables
from testbed.routing.tables import NO_GROUP, HashField, HashFunction, Selector
from testbed.topology import HOST_NETWORK, NodeKind, Topology

Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]

_KNOWN = -3
"""In place of a group: the row is at its last switch, which passes it on to the receiver."""

MAX_HOPS = 16
"""Links of the longest way; what goes on is a loop."""


@dataclass(frozen=True, eq=False)
class Flows:
    """Flows as arrays.

    Attributes:
        src_port: Port id of each sending NIC, shape ``(flows,)``.
        keys: Header fields, shape ``(flows, 6)``, uint32: a flow per row, the fields of `FlowKey` in its order.
    """

    src_port: Ints
    keys: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.src_port)

    def key(self, flow: int) -> FlowKey:
        """Return the header fields of one flow."""
        return FlowKey(*self.keys[flow].tolist())


@dataclass(frozen=True, eq=False)
class Spread:
    """All ways of all flows under some seeds, ordered by seed, then by flow.

    Attributes:
        seed: Which of the seeds a way belongs to, shape ``(ways,)``.
        flow: Which of the flows, shape ``(ways,)``.
        share: Part of the flow's bytes that takes it, shape ``(ways,)``.
        ports: Egress port ids, shape ``(hops, ways)``; 0 behind the end of a way.
    """

    seed: Rows
    flow: Rows
    share: npt.NDArray[np.float64]
    ports: Rows

    def of_seed(self, seed: int) -> Spread:
        """Return the ways under one of the seeds, as the only one."""
        mine = self.seed == seed
        return Spread(self.seed[mine] - seed, self.flow[mine], self.share[mine], self.ports[:, mine])


class Tracer:
    """Follows flows through forwarding tables; what does not depend on the seed is prepared once.

    Args:
        topology: The fabric.
        flows: The flows; each from a host's NIC to that of another host.
    """

    def __init__(self, topology: Topology, flows: Flows) -> None:
        self._topology = topology
        self._flows = flows
        self._peer_node = np.array([-1, *(topology.ports[port.peer - 1].node for port in topology.ports)], np.int32)
        # Behind the nodes one for rows that have arrived: port 0 leads to it, and it ends a way as hosts do.
        self._ends = np.array([*(node.kind is NodeKind.HOST for node in topology.nodes), True])
        self._slot = ((flows.keys[:, 1].astype(np.int64) - HOST_NETWORK) >> 1).astype(np.int32)
        peer = np.array([0, *(port.peer for port in topology.ports)], np.int32)
        node = np.array([-1, *(port.node for port in topology.ports)], np.int32)
        self._nics = np.array([nic.id for nic in topology.nics], np.int32)
        self._nic_slots = np.array([nic.address - HOST_NETWORK >> 1 for nic in topology.nics], np.int32)
        nic_of_slot = np.zeros(topology.slots, np.int32)
        nic_of_slot[self._nic_slots] = self._nics
        self._leaf_ports = peer[self._nics]
        self._leaves = node[self._leaf_ports]
        self._target = node[nic_of_slot[self._slot]]
        self._last_port = peer[nic_of_slot[self._slot]]
        self._last_switch = node[self._last_port]
        self._columns = [np.ascontiguousarray(column) for column in flows.keys.T]

    def trace(self, seeded: SeededTables) -> Spread:
        """Return the ways of all flows under each of the seeds.

        Raises:
            PlanError: As `testbed.routing.paths.trace_path` does.
        """
        groups = _Groups(seeded, self._sure_switches(seeded))
        entries = self._entries(seeded)
        rows = _Rows(np.arange(len(self._flows), dtype=np.int32), self._flows.src_port.astype(np.int32))
        for _ in range(MAX_HOPS):
            node = self._peer_node[rows.ports[-1]]
            arrived = self._ends[node]
            if (wrong := arrived & (node >= 0) & (node != self._target[rows.flow])).any():
                self._complain(seeded, rows, int(np.argmax(wrong)))
            if arrived.all():
                if rows.seeds == 1:
                    rows.repeat(len(seeded.seeds))
                return Spread(rows.seed, rows.flow, rows.share, np.stack(rows.ports))
            # Rows that have not arrived; a slice where these are all, which copies nothing.
            going = np.flatnonzero(~arrived) if arrived.any() else slice(None)
            group = self._groups_at(seeded, groups, node[going], rows.flow[going])
            if (group == NO_GROUP).any():
                self._complain(seeded, rows, int(np.arange(len(rows.flow))[going][np.argmax(group == NO_GROUP)]))
            following = np.where(group >= 0, groups.only_port[group], self._last_port[rows.flow[going]])
            hashing = np.flatnonzero((group >= 0) & groups.hashes[group])
            if len(hashing) and rows.seeds == 1 and len(seeded.seeds) > 1:
                before, count = len(rows.flow), len(seeded.seeds)
                hashed = self._hash_under_all(groups, group[hashing], rows.flow[going][hashing])
                table = np.tile(following, (count, 1))
                table[:, hashing] = hashed
                rows.repeat(count)
                following, group, node = table.reshape(-1), np.tile(group, count), np.tile(node, count)
                if isinstance(going, np.ndarray):
                    going = (going + before * np.arange(count)[:, None]).reshape(-1)
            elif len(hashing):
                flow, seed = rows.flow[going][hashing], rows.seed[going][hashing]
                following[hashing] = self._hash_each(groups, group[hashing], flow, seed)
            if entries is not None:
                following = entries.apply(rows.flow[going], node[going], following)
            rows.follow(going, following, group, groups)
        self._complain(seeded, rows, int(np.argmax(~self._ends[self._peer_node[rows.ports[-1]]])))
        raise AssertionError("trace_path finds the loop")

    def _sure_switches(self, seeded: SeededTables) -> npt.NDArray[np.bool_]:
        """Return the switches that pass on to each of their own NICs by the one port that leads there."""
        tables = seeded.tables
        if not tables.groups:  # as where the one switch is dead
            return np.zeros(len(self._topology.nodes) + 1, bool)
        only = np.array([group.members[0] if len(set(group.members)) == 1 else 0 for group in tables.groups], np.int32)
        sure = np.ones(len(self._topology.nodes) + 1, bool)
        found = tables.fib[self._leaves, self._nic_slots]
        sure[self._leaves[(found < 0) | (only[found] != self._leaf_ports)]] = False
        return sure

    def _groups_at(self, seeded: SeededTables, groups: _Groups, node: Rows, flow: Rows) -> Rows:
        """Return the group that each row meets; `_KNOWN` at the last switch, if it is sure to pass on to the receiver."""
        known = (node == self._last_switch[flow]) & groups.sure[node]
        if known.all():
            return np.full(len(node), _KNOWN, np.int32)
        fib = seeded.tables.fib
        group = fib[node, self._slot[flow]] if not known.any() else np.full(len(node), _KNOWN, np.int32)
        if known.any():
            others = np.flatnonzero(~known)
            group[others] = fib[node[others], self._slot[flow[others]]]
            group[others[group[others] < 0]] = NO_GROUP
        else:
            group[group < 0] = NO_GROUP
        return group

    def _hash_under_all(self, groups: _Groups, group: Rows, flow: Rows) -> Rows:
        """Return the port that each row leaves by under each seed, shape ``(seeds, rows)``."""
        port = np.empty((len(groups.seeds), len(group)), np.int32)
        for mask, function, mine in groups.by_hash(group):
            columns = [None if column is None else column[flow[mine]] for column in self._read(mask)]
            seeds = groups.seeds[:, group[mine]]
            port[:, mine] = groups.pick(group[mine], hash_columns(columns, seeds, function))
        return port

    def _hash_each(self, groups: _Groups, group: Rows, flow: Rows, seed: Rows) -> Rows:
        """Return the port that each row leaves by, under its own seed."""
        port = np.empty(len(group), np.int32)
        for mask, function, mine in groups.by_hash(group):
            columns = [None if column is None else column[flow[mine]] for column in self._read(mask)]
            seeds = groups.seeds[seed[mine], group[mine]]
            port[mine] = groups.pick(group[mine], hash_columns(columns, seeds, function))
        return port

    def _read(self, mask: int) -> list[npt.NDArray[np.uint32] | None]:
        fields = HashField(mask)
        return [column if field in fields else None for column, field in zip(self._columns, _FIELDS, strict=True)]

    def _entries(self, seeded: SeededTables) -> _Entries | None:
        overrides = seeded.tables.overrides
        if not overrides:
            return None
        named: dict[tuple[int, int, int], list[int]] = {}
        for number, (src, dst, sport, _, _, qp) in enumerate(self._flows.keys.tolist()):
            named.setdefault((src, dst, qp or sport), []).append(number)
        found = [
            (flow, key.node, port)
            for key, port in overrides.items()
            for flow in named.get((key.src_address, key.dst_address, key.flow), ())
        ]
        return _Entries(found, len(self._topology.nodes))

    def _complain(self, seeded: SeededTables, rows: _Rows, row: int) -> None:
        """Raise what `trace_path` has to say of a row."""
        number = int(rows.flow[row])
        port = int(self._flows.src_port[number])
        trace_path(self._topology, seeded.one(int(rows.seed[row])), port, self._flows.key(number))


class _Rows:
    """Ways as far as they are known, the same under all seeds until `repeat`.

    Attributes:
        flow: The flow of each row.
        seed: Its seed.
        share: Its part of the flow's bytes.
        ports: The ports of each hop; 0 for rows that had arrived before.
        seeds: Of how many seeds there are rows.
    """

    def __init__(self, flow: Rows, port: Rows) -> None:
        self.flow = flow
        self.seed = np.zeros(len(flow), np.int32)
        self.share = np.ones(len(flow))
        self.ports = [port]
        self.seeds = 1

    def repeat(self, seeds: int) -> None:
        """Give every seed rows of its own."""
        self.seed = np.repeat(np.arange(seeds, dtype=np.int32), len(self.flow))
        self.flow, self.share = np.tile(self.flow, seeds), np.tile(self.share, seeds)
        self.ports = [np.tile(port, seeds) for port in self.ports]
        self.seeds = seeds

    def follow(self, going: npt.NDArray[np.intp] | slice, following: Rows, group: Rows, groups: _Groups) -> None:
        """Go on by a hop; a row whose packets are spread becomes one for every member.

        Args:
            going: The rows that go on.
            following: The port of each; 0 where its packets are spread.
            group: The group that each met.
            groups: All groups.
        """
        port = np.zeros(len(self.flow), np.int32)
        port[going] = following
        if (following == 0).any():
            met = np.zeros(len(self.flow), np.int32)
            met[going] = group
            spread = np.zeros(len(self.flow), bool)
            spread[going] = following == 0
            copies = np.where(spread, groups.ways[met], 1)
            row = np.repeat(np.arange(len(copies)), copies)
            turn = np.arange(len(row)) - (np.cumsum(copies) - copies)[row]
            port, many = port[row], spread[row]
            at = groups.first_way[met[row[many]]] + turn[many]
            port[many] = groups.way_port[at]
            self.flow, self.seed, self.share = self.flow[row], self.seed[row], self.share[row]
            self.share[many] *= groups.way_share[at]
            self.ports = [column[row] for column in self.ports]
        self.ports.append(port)


class _Groups:
    """The groups of tables as arrays."""

    def __init__(self, seeded: SeededTables, sure: npt.NDArray[np.bool_]) -> None:
        self.sure = sure
        groups = seeded.tables.groups
        self.seeds = seeded.group_seeds
        self.size = np.array([len(group.members) for group in groups], np.int64)
        self.first = np.cumsum(self.size) - self.size
        self.members = np.array([port for group in groups for port in group.members], np.int32)
        hashes = [(int(group.hash_fields), group.hash_function) for group in groups]
        self.known_hashes = sorted(set(hashes))
        self.hash_of = np.array([self.known_hashes.index(one) for one in hashes], np.int64)
        single = np.array([len(set(group.members)) == 1 for group in groups], bool)
        per_packet = np.array([group.selector.is_per_packet for group in groups], bool)
        hashed = np.array([group.selector in (Selector.HASH, Selector.FLOWLET) for group in groups], bool)
        self.only_port = np.where(single, self.members[self.first], 0).astype(np.int32)
        self.hashes = ~single & hashed
        weights = [
            group.weights() if spread else {} for group, spread in zip(groups, ~single & per_packet, strict=True)
        ]
        self.ways = np.array([len(one) for one in weights], np.int64)
        self.first_way = np.cumsum(self.ways) - self.ways
        self.way_port = np.array([port for one in weights for port in one], np.int32)
        self.way_share = np.array([weight / sum(one.values()) for one in weights for weight in one.values()])

    def by_hash(self, group: Rows) -> Iterator[tuple[int, HashFunction, npt.NDArray[np.intp] | slice]]:
        """Yield the fields that hashes read, their function, and which of some rows have groups that hash so."""
        hash_of = self.hash_of[group]
        met = np.unique(hash_of).tolist()
        for number in met:
            yield *self.known_hashes[number], np.flatnonzero(hash_of == number) if len(met) > 1 else slice(None)

    def pick(self, group: Rows, h: npt.NDArray[np.uint32]) -> Rows:
        """Return the members that hashes choose; the last axis of ``h`` is that of the groups."""
        index = h.astype(np.uint64)
        index *= self.size[group].astype(np.uint64)
        index >>= np.uint64(32)
        chosen: Rows = self.members[self.first[group] + index.astype(np.int64)]
        return chosen


class _Entries:
    """Exact-match entries, by flow and switch."""

    def __init__(self, found: Sequence[tuple[int, int, int]], nodes: int) -> None:
        self._nodes = nodes
        rows = np.array(sorted((flow * nodes + node, port) for flow, node, port in found), np.int64).reshape(-1, 2)
        self._keys, self._ports = rows[:, 0], rows[:, 1]

    def apply(self, flow: Rows, node: Rows, port: Rows) -> Rows:
        """Return the ports that flows leave a switch by: those of their entries, else the ones given."""
        if not len(self._keys):
            return port
        wanted = flow.astype(np.int64) * self._nodes + node
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self._ports[at], port).astype(np.int32)


_FIELDS = (
    HashField.SRC_ADDRESS,
    HashField.DST_ADDRESS,
    HashField.SRC_PORT,
    HashField.DST_PORT,
    HashField.PROTOCOL,
    HashField.DST_QP,
)
