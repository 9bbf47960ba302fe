"""Forwarding tables and the hash that picks their members."""

from __future__ import annotations

import binascii
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import PlanError
from testbed.routing import (
    ROUTING_SCHEMES,
    FlowKey,
    ForwardingTables,
    Group,
    HashField,
    HashFunction,
    RoutingSettings,
    Selector,
    routing_scheme,
)
from testbed.routing.hashing import hash_flow, hash_flows, select_member, select_members
from testbed.routing.tables import NO_GROUP, TablesBuilder, single_member
from testbed.topology import LinkSpec, NodeKind, Topology, build_clos, build_star

LINK = LinkSpec(400_000_000_000, 600)
UINT32 = st.integers(0, 2**32 - 1)


def clos(*hosts_per_leaf: int, spines: int) -> Topology:
    return build_clos(hosts_per_leaf=hosts_per_leaf, spines=spines, host_link=LINK, uplink=LINK)


def build_tables(name: str, topology: Topology, seed: int) -> ForwardingTables:
    return routing_scheme(name).build_tables(topology, hash_seed=seed, settings=RoutingSettings(flowlet_gap_ns=1000))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    racks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    return clos(*racks, spines=draw(st.integers(0 if len(racks) == 1 else 1, 5)))


# --- tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ROUTING_SCHEMES))
@settings(max_examples=30)
@given(topology=topologies(), seed=UINT32)
def test_every_switch_routes_every_nic_through_its_own_ports(name: str, topology: Topology, seed: int) -> None:
    tables = build_tables(name, topology, seed)
    assert tables.fib.dtype == np.int32
    assert tables.fib.shape == (len(topology.nodes), topology.slots)
    for node in topology.nodes:
        for slot in range(topology.slots):
            group = tables.group_at(node.index, slot)
            if node.kind is NodeKind.HOST or topology.slot_port(slot) is None:
                assert group is None
                continue
            assert group is not None
            assert set(group.members) <= set(node.ports)
            leaf = topology.slot_leaf(slot)
            if node is leaf:
                nic = topology.slot_port(slot)
                assert nic is not None
                assert group.members == (nic.peer,)
            elif node.kind is NodeKind.SPINE:
                assert [topology.peer_node(port) for port in group.members] == [leaf]
            else:
                assert all(topology.peer_node(port).kind is NodeKind.SPINE for port in group.members)


@pytest.mark.parametrize("name", sorted(ROUTING_SCHEMES))
def test_equal_arguments_give_equal_tables_without_repeated_groups(name: str) -> None:
    topology = clos(4, 3, 4, spines=4)
    tables = build_tables(name, topology, 7)
    assert tables == build_tables(name, topology, 7)
    assert len(set(tables.groups)) == len(tables.groups)
    assert set(np.unique(tables.fib)) == {NO_GROUP, *range(len(tables.groups))}


def test_ecmp_hashes_the_five_tuple_over_all_uplinks_with_one_seed_per_tier() -> None:
    topology = clos(2, 2, 2, spines=3)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=11)
    for leaf in topology.leaves:
        uplinks = tuple(port.id for port in topology.uplinks(leaf))
        remote = {
            tables.group_at(leaf.index, slot) for slot in range(topology.slots) if topology.slot_leaf(slot) is not leaf
        }
        assert remote == {Group(Selector.HASH, HashField.FIVE_TUPLE, 11, uplinks)}


def test_pinning_numbers_the_uplink_like_the_destinations_place_in_its_rack() -> None:
    topology = clos(3, 3, spines=2)  # a stride of 4, so that the slot and the rank differ
    tables = routing_scheme("pinning").build_tables(topology, hash_seed=0)
    leaf = topology.leaves[0]
    uplinks = [port.id for port in topology.uplinks(leaf)]
    chosen = []
    for rank in (3, 4, 5):
        group = tables.group_at(leaf.index, topology.slot_of_port(topology.host_port(rank).id))
        assert group is not None
        chosen.append(group.members)
    assert chosen == [(uplinks[0],), (uplinks[1],), (uplinks[0],)]


def test_pinning_ignores_the_seed_and_ecmp_does_not() -> None:
    topology = clos(2, 2, spines=2)
    for name, same in (("pinning", True), ("ecmp", False)):
        scheme = routing_scheme(name)
        one, two = (scheme.build_tables(topology, hash_seed=seed) for seed in (1, 2))
        assert (one == two) is same


@pytest.mark.parametrize("name", sorted(ROUTING_SCHEMES))
def test_star_needs_one_group_per_host(name: str) -> None:
    tables = build_tables(name, build_star(hosts=5, host_link=LINK), 1)
    assert [len(group.members) for group in tables.groups] == [1] * 5


def test_tables_cannot_be_written() -> None:
    tables = routing_scheme("ecmp").build_tables(clos(1, 1, spines=1), hash_seed=1)
    with pytest.raises(ValueError, match="read-only"):
        tables.fib[0, 0] = 0


def test_builder_refuses_a_port_of_another_node() -> None:
    topology = clos(1, 1, spines=1)
    builder = TablesBuilder(topology)
    foreign = topology.uplinks(topology.leaves[1])[0].id
    for _ in range(2):
        with pytest.raises(ValueError, match="leaf1/up0 is not a port of leaf0"):
            builder.route(topology.leaves[0].index, 0, single_member(foreign))


@pytest.mark.parametrize(("seed", "members"), [(0, ()), (-1, (1,)), (2**32, (1,))])
def test_group_without_members_or_with_a_wide_seed_is_refused(seed: int, members: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"member|seed"):
        Group(Selector.HASH, HashField.FIVE_TUPLE, seed, members)


def test_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(PlanError, match='"ecpm"') as caught:
        routing_scheme("ecpm")
    assert caught.value.hint == f"use one of {', '.join(sorted(ROUTING_SCHEMES))}"


@pytest.mark.parametrize("name", sorted(ROUTING_SCHEMES))
def test_scheme_stands_under_its_own_name(name: str) -> None:
    assert routing_scheme(name).name == name


# --- hash -------------------------------------------------------------------------------------------


def random_flows(count: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    high = np.array([2**32, 2**32, 2**16, 2**16, 2**8, 2**24])
    return np.random.default_rng(seed).integers(0, high, size=(count, 6)).astype(np.uint32)


@pytest.mark.parametrize("hash_fields", [HashField.FIVE_TUPLE, HashField(63), HashField.DST_QP, HashField(0)])
def test_scalar_and_vectorised_hash_agree_on_25_000_headers_each(hash_fields: HashField) -> None:
    flows = random_flows(25_000, int(hash_fields))
    group = Group(Selector.HASH, hash_fields, 0xFFFF_FFFF - int(hash_fields), tuple(range(1, 8)))
    keys = [FlowKey(*row) for row in flows.tolist()]
    expected = [hash_flow(key, hash_fields=hash_fields, seed=group.seed) for key in keys]
    hashes = hash_flows(flows, hash_fields=hash_fields, seed=group.seed)
    assert hashes.dtype == np.uint32
    assert hashes.tolist() == expected
    members = [group.members[h * 7 // 2**32] for h in expected]
    assert select_members(group, flows).tolist() == members
    assert [select_member(group, key) for key in keys[:1000]] == members[:1000]


@settings(max_examples=50)
@given(
    st.builds(
        FlowKey, UINT32, UINT32, *[st.integers(0, 2**16 - 1)] * 2, st.integers(0, 255), st.integers(0, 2**24 - 1)
    ),
    UINT32,
)
def test_scalar_and_vectorised_hash_agree_at_the_edges(flow: FlowKey, seed: int) -> None:
    row = np.array([flow], dtype=np.uint32)
    for bits in (0, 1, 2, 4, 8, 16, 31, 32, 63):
        fields = HashField(bits)
        for function in HashFunction:
            scalar = hash_flow(flow, hash_fields=fields, seed=seed, function=function)
            assert 0 <= scalar < 2**32
            assert hash_flows(row, hash_fields=fields, seed=seed, function=function).tolist() == [scalar]


def test_hash_equals_the_formula_written_out() -> None:
    # Straight from docs/architecture.md, in wider arithmetic than the code's.
    def mix(h: int) -> int:
        h ^= h >> 16
        h = (h * 0x85EBCA6B) % 2**32
        h ^= h >> 13
        h = (h * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    flow = FlowKey(0x0A000001, 0x0A000009, 0xC123, 4791, 17, 0x11)
    h = mix((3 + 0x9E3779B9) % 2**32)
    for word in (flow.src_address, flow.dst_address, (0xC123 << 16) + 4791, 17, 0):
        h = mix(h ^ word)
    assert hash_flow(flow, hash_fields=HashField.FIVE_TUPLE, seed=3) == h
    assert mix(1) == 0x514E28B7  # MurmurHash3's fmix32(1)


def test_crcs_equal_those_of_other_libraries() -> None:
    flow = FlowKey(0x0A000001, 0x0A000009, 0xC123, 4791, 17, 0x000011)
    header = bytes.fromhex("0a000001 0a000009 c123 12b7 11 000011")
    everything, ones = HashField(63), 0xFFFF_FFFF
    crc32 = hash_flow(flow, hash_fields=everything, seed=ones, function=HashFunction.CRC32)
    assert crc32 ^ ones == zlib.crc32(header)
    crc16 = hash_flow(flow, hash_fields=everything, seed=0x1234, function=HashFunction.CRC16)
    assert crc16 == binascii.crc_hqx(header, 0x1234) << 16


@pytest.mark.parametrize("function", HashFunction)
@pytest.mark.parametrize("field", [*HashField.FIVE_TUPLE, HashField.DST_QP])
def test_hash_reads_a_field_if_and_only_if_it_is_selected(field: HashField, function: HashFunction) -> None:
    position = ("SRC_ADDRESS", "DST_ADDRESS", "SRC_PORT", "DST_PORT", "PROTOCOL", "DST_QP").index(field.name or "")
    flow = FlowKey(1, 2, 3, 4, 5, 6)
    other = FlowKey(*(value + 1 if i == position else value for i, value in enumerate(flow)))
    everything = HashField(63)

    def differ(fields: HashField) -> bool:
        hashes = {hash_flow(one, hash_fields=fields, seed=1, function=function) for one in (flow, other)}
        return len(hashes) == 2

    assert differ(everything)
    assert not differ(everything & ~field)


def chi_square(counts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2).sum() / expected)


@pytest.mark.parametrize("function", HashFunction)
@pytest.mark.parametrize("members", [3, 4, 8])
@pytest.mark.parametrize("entropy", ["addresses", "source ports", "seeds"])
def test_hash_spreads_realistic_flows_evenly(members: int, entropy: str, function: HashFunction) -> None:
    nics = 0x0A000001 + 2 * np.arange(128, dtype=np.int64)
    if entropy == "addresses":  # all pairs of 128 NICs, one source port
        src, dst = (grid.ravel() for grid in np.meshgrid(nics, nics))
        rows = np.column_stack([src, dst, *(np.full(len(src), v) for v in (0xC000, 4791, 17, 0))])
        groups = [(1, rows)]
    elif entropy == "source ports":  # one pair, the 16384 source ports that Linux and NICs use
        ports = np.arange(0xC000, 0x10000)
        rows = np.column_stack(
            [np.full(len(ports), nics[0]), np.full(len(ports), nics[5]), ports]
            + [np.full(len(ports), v) for v in (4791, 17, 0)]
        )
        groups = [(1, rows)]
    else:  # one flow under many seeds: what an experiment over seeds relies on
        row = np.array([[nics[0], nics[5], 0xC000, 4791, 17, 0]])
        groups = [(seed, row) for seed in range(2000)]
    counts = np.zeros(members, dtype=np.int64)
    for seed, flows in groups:
        group = Group(Selector.HASH, HashField.FIVE_TUPLE, seed, tuple(range(members)), hash_function=function)
        counts += np.bincount(select_members(group, flows.astype(np.uint32)), minlength=members)
    # Mean k and deviation sqrt(2 k) for k degrees of freedom; five deviations lie beyond the 0.1 % quantile.
    freedom = members - 1
    assert chi_square(counts) < freedom + 5 * math.sqrt(2 * freedom)


def test_a_constant_hash_fails_the_evenness_test() -> None:
    flows = random_flows(1000, 1)
    group = Group(Selector.HASH, HashField(0), 1, (0, 1, 2, 3))
    counts = np.bincount(select_members(group, flows), minlength=4)
    assert chi_square(counts) > 1000


def test_weight_two_doubles_a_members_share() -> None:
    flows = random_flows(30_000, 2)
    counts = np.bincount(select_members(Group(Selector.HASH, HashField.FIVE_TUPLE, 1, (0, 1, 1)), flows))
    assert counts[1] / counts[0] == pytest.approx(2, rel=0.05)
