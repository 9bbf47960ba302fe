"""Schemes that spread packets, follow pauses or know the traffic: what their tables say and what follows from it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import PlanError, ScenarioError
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.plan.report import describe_paths
from testbed.routing import (
    Demand,
    FlowKey,
    ForwardingTables,
    Group,
    HashField,
    HashFunction,
    RoutingSettings,
    Selector,
    routing_scheme,
    trace_path,
    trace_routes,
)
from testbed.routing.hashing import hash_flow, override_key, select_member, tier_seed
from testbed.routing.selectors import SelectorState, select_port
from testbed.routing.tables import MAX_CHOICES, OverrideKey, TablesBuilder, small_weights
from testbed.scenario import load_scenario
from testbed.topology import LinkSpec, Topology, build_clos

LINK = LinkSpec(400_000_000_000, 600)


def clos(leaves: int, hosts: int, spines: int) -> Topology:
    return build_clos(hosts_per_leaf=(hosts,) * leaves, spines=spines, host_link=LINK, uplink=LINK)


def with_slow_link(topology: Topology, name: str, rate_bits_per_s: int) -> Topology:
    """Return the fabric with one link at another rate."""
    link = topology.link(name)
    ports = tuple(
        dataclasses.replace(port, rate_bits_per_s=rate_bits_per_s) if port.id in (link.a, link.b) else port
        for port in topology.ports
    )
    return dataclasses.replace(topology, ports=ports)


def demand(topology: Topology, src: int, dst: int, nbytes: int = 1000, dst_qp: int = 1) -> Demand:
    source, target = topology.host_port(src), topology.host_port(dst)
    return Demand(source.id, FlowKey(source.address, target.address, 0xC000, 4791, 17, dst_qp), nbytes)


def leaf0_group(topology: Topology, tables: ForwardingTables, dst: int) -> Group:
    group = tables.group_at(topology.leaves[0].index, topology.slot_of_port(topology.host_port(dst).id))
    assert group is not None
    return group


def plan_of(*overrides: str) -> Plan:
    text = """
name: schemes
fabric: {kind: clos, leaves: 4, spines: 4, hosts_per_leaf: 4, host_link: {rate: 400 Gbit/s, delay: 600 ns}}
workload: [{collective: all_reduce, size: 1 MiB}]
time_dilation: 20000
"""
    return compile_plan(load_scenario(text, list(overrides)), capacity_packets_per_s=None)


# --- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacities", "weights"),
    [
        ([400, 400], [1, 1]),
        ([400, 100], [4, 1]),
        ([300, 200], [3, 2]),
        ([1000, 999], [64, 64]),
        ([10**6, 1], [64, 1]),
        ([], []),
    ],
)
def test_weights_are_capacities_in_small_numbers(capacities: list[int], weights: list[int]) -> None:
    assert small_weights(capacities) == weights


@pytest.mark.parametrize("slow", ["leaf0:spine1", "leaf1:spine1"])
def test_narrow_path_gets_less_where_its_capacity_is_known(slow: str) -> None:
    topology = with_slow_link(clos(2, 2, 2), slow, 100_000_000_000)
    first, second = (port.id for port in topology.uplinks(topology.leaves[0]))
    weights = {}
    for name, given_settings in (
        ("ecmp", RoutingSettings()),
        ("spray", RoutingSettings()),
        ("local", RoutingSettings(adaptive_scope="local")),
        ("capacity", RoutingSettings(adaptive_scope="capacity")),
    ):
        scheme = routing_scheme("adaptive" if name in ("local", "capacity") else name)
        tables = scheme.build_tables(topology, hash_seed=1, settings=given_settings)
        weights[name] = leaf0_group(topology, tables, 2).weights()
    assert weights["ecmp"] == weights["spray"] == weights["capacity"] == {first: 4, second: 1}
    assert weights["local"] == {first: 1, second: 1}


def test_adaptive_refuses_more_uplinks_than_a_switch_compares() -> None:
    with pytest.raises(PlanError, match="leaf0 has 65 uplinks, adaptive routing compares at most 64"):
        routing_scheme("adaptive").build_tables(clos(2, 1, 65), hash_seed=1)


# --- routes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "spread", "may_change"),
    [
        (("routing.scheme=spray",), 4, False),
        (("routing.scheme=spray", "routing.spray_order=random"), 4, False),
        (("routing.scheme=adaptive",), 4, False),
        (("routing.scheme=flowlet", "routing.flowlet_gap=20 us"), 1, True),
        (("routing.scheme=te",), 1, False),
        (("routing.scheme=e-ecmp",), 1, False),
    ],
)
def test_paths_say_what_each_scheme_does_with_a_flow(overrides: tuple[str, ...], spread: int, may_change: bool) -> None:
    report = describe_paths(plan_of(*overrides))
    assert {(flow.spread, flow.may_change) for flow in report.flows} == {(spread, may_change)}
    (first, *_) = report.flows
    if spread > 1:
        assert first.path == ("host0", "leaf0", "spine0|spine1|spine2|spine3", "leaf1", "host4")
        assert first.ports[1] == "leaf0/up0|leaf0/up1|leaf0/up2|leaf0/up3"
        assert report.predicted_cct_ratio == pytest.approx(1.0)
        assert not report.collisions
    else:
        assert "|" not in "".join(first.path)
    # Four NICs of a rack fill four uplinks, however they are spread.
    core = [load.load_fraction for load in report.links if "/up" in load.name.split(">")[0]]
    assert sum(core) == pytest.approx(16.0)


def test_shares_of_routes_follow_the_weights() -> None:
    topology = with_slow_link(clos(2, 2, 2), "leaf0:spine1", 100_000_000_000)
    tables = routing_scheme("spray").build_tables(topology, hash_seed=1)
    source, flow, _ = demand(topology, 0, 2)
    shares = {route.path.nodes[2]: route.share for route in trace_routes(topology, tables, source, flow)}
    assert list(shares.values()) == pytest.approx([0.8, 0.2])
    paths = [route.path for route in trace_routes(topology, tables, source, flow)]
    assert trace_path(topology, tables, source, flow) in paths


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_routes_of_a_hashed_flow_are_its_path(seed: int) -> None:
    topology = clos(3, 2, 3)
    for name in ("ecmp", "e-ecmp", "pinning"):
        tables = routing_scheme(name).build_tables(topology, hash_seed=seed)
        source, flow, _ = demand(topology, 1, 4)
        (route,) = trace_routes(topology, tables, source, flow)
        assert route == (trace_path(topology, tables, source, flow), 1.0)


def test_collisions_of_a_flowlet_scheme_are_those_of_its_hash() -> None:
    plans = [plan_of(f"routing.scheme={scheme}", "routing.flowlet_gap=20 us") for scheme in ("flowlet", "e-ecmp")]
    assert plans[0].workloads[0].paths == plans[1].workloads[0].paths
    assert plans[0].workloads[0].predicted_cct_ratio == plans[1].workloads[0].predicted_cct_ratio > 1
    # What may be used some day counts for what must be shaped exactly.
    uplinks = {port.id for leaf in plans[0].topology.leaves for port in plans[0].topology.uplinks(leaf)}
    assert not uplinks & plans[0].unshared_ports


@pytest.mark.parametrize("gap", ["", "0 s"])
def test_flowlet_scheme_needs_a_gap(gap: str) -> None:
    with pytest.raises(ScenarioError, match=r"routing\.flowlet_gap: (is required by scheme flowlet|must be above 0)"):
        plan_of("routing.scheme=flowlet", *([f"routing.flowlet_gap={gap}"] if gap else []))


def test_short_flowlet_gap_sets_the_dilation() -> None:
    plan = plan_of("routing.scheme=flowlet", "routing.flowlet_gap=100 ns", "time_dilation=auto")
    assert plan.dilation.smallest_time_name == "flowlet gap"
    assert plan.dilation.value >= 4 * plan.dilation.wall_tick_ns / 100


# --- selectors, as a model --------------------------------------------------------------------------


def test_flowlet_keeps_its_port_until_a_pause_longer_than_the_gap() -> None:
    group = Group(Selector.FLOWLET, HashField(63), 7, tuple(range(1, 65)), gap_ns=100)
    flow, state = FlowKey(1, 2, 3, 4791, 17, 5), SelectorState()
    ports, now = [], 1
    for pause in (0, 100, 100, 101, 50, 1000):
        now += pause
        ports.append(select_port(group, flow, state, now_ns=now))
    assert ports[0] == ports[1] == ports[2] == select_member(group, flow)
    assert ports[3] == ports[4]
    assert len({ports[2], ports[3], ports[5]}) == 3


def test_least_depth_takes_turns_among_equals_and_passes_over_what_is_down() -> None:
    group = Group(Selector.LEAST_DEPTH, HashField(0), 0, (1, 2, 3))
    flow, state = FlowKey(1, 2, 3, 4, 5, 6), SelectorState()
    assert [select_port(group, flow, state) for _ in range(4)] == [1, 2, 3, 1]
    depths = {1: 10, 2: 5, 3: 20}
    assert {select_port(group, flow, state, depth_bytes=depths.__getitem__) for _ in range(5)} == {2}
    live = {
        select_port(group, flow, state, depth_bytes=depths.__getitem__, is_live=lambda port: port != 2)
        for _ in range(5)
    }
    assert live == {1}
    weighted = Group(Selector.LEAST_DEPTH, HashField(0), 0, (1, 1, 1, 2, 3))
    assert select_port(weighted, flow, state, depth_bytes=depths.__getitem__) == 1
    empty = [select_port(weighted, flow, state) for _ in range(500)]
    assert [empty.count(port) for port in (1, 2, 3)] == [300, 100, 100]
    too_many = Group(Selector.LEAST_DEPTH, HashField(0), 0, (1,) * MAX_CHOICES + (2,))
    assert Counter(too_many.choices()) == {(1, MAX_CHOICES): MAX_CHOICES - 1, (2, 1): 1}
    # Of equals, as empty queues are, the heavy ones get more, though 3 x 40 + 20 do not fit.
    heavy = Group(Selector.LEAST_DEPTH, HashField(0), 0, (1,) * 40 + (2,) * 40 + (3,) * 40 + (4,) * 20)
    assert len(heavy.choices()) <= MAX_CHOICES
    empty = [select_port(heavy, flow, SelectorState(turn)) for turn in range(len(heavy.choices()))]
    assert [empty.count(port) for port in (1, 2, 3, 4)] == [18, 18, 18, 9]
    many = Group(Selector.LEAST_DEPTH, HashField(0), 0, (1,) * 64 + tuple(range(2, 65)))
    assert Counter(port for port, _ in many.choices()) == dict.fromkeys(range(1, 65), 1)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("scheme=spray", "resilient_hashing=true"), "routing.resilient_hashing true"),
        (("scheme=spray", "hash_function=crc16"), "routing.hash_function crc16"),
        (("scheme=pinning", "hash_function=crc32"), "routing.hash_function crc32"),
        (("scheme=ecmp", "spine_hash_function=crc32"), "routing.spine_hash_function crc32"),
        (("scheme=ecmp", "superspine_hash_function=crc32"), "routing.superspine_hash_function crc32"),
        (("scheme=ecmp", "resilient_hashing=true"), None),
        (("scheme=e-ecmp", "hash_function=crc16"), None),
        (("scheme=pinning",), None),
    ],
)
def test_a_key_about_hashing_that_changes_nothing_is_named(overrides: tuple[str, ...], key: str | None) -> None:
    settings = [f"routing.{one}" for one in overrides]
    plan = compile_plan(
        load_scenario(
            """
name: inert
fabric: {kind: clos, leaves: 3, spines: 3, hosts_per_leaf: 2, host_link: {rate: 100 Gbit/s, delay: 600 ns}}
workload: [{collective: all_reduce, size: 1 MiB}]
time_dilation: 20000
""",
            settings,
        ),
        capacity_packets_per_s=None,
    )
    found = [line for line in plan.warnings if "has no effect" in line]
    assert [line.split(" has no effect")[0] for line in found] == ([key] if key else [])


def test_a_pinned_fabric_hashes_where_an_uplink_fails_and_spines_do_between_zones() -> None:
    fault = "faults=[{at: 1 ms, link_down: 'leaf0:spine1'}]"
    root = Path(__file__).parents[2] / "scenarios"
    for file, overrides in (
        ("ai-zone.yaml", ["routing.hash_function=crc32", "routing.resilient_hashing=true", fault]),
        ("zones/function-per-tier.yaml", []),
    ):
        plan = compile_plan(load_scenario(root / file, ["expect=[]", *overrides]), capacity_packets_per_s=None)
        assert not [line for line in plan.warnings if "has no effect" in line]


def test_one_seed_for_two_tiers_polarises_and_a_seed_per_tier_cures_it() -> None:
    flows = [FlowKey(src, 2, 3, 4791, 17, 5) for src in range(4000)]
    for per_tier, used in ((False, 1), (True, 4)):
        seed = tier_seed(9, 1) if per_tier else 9
        first = [flow for flow in flows if hash_flow(flow, hash_fields=HashField.FIVE_TUPLE, seed=9) >> 30 == 2]
        second = {hash_flow(flow, hash_fields=HashField.FIVE_TUPLE, seed=seed) >> 30 for flow in first}
        assert len(second) == used
    assert tier_seed(9, 0) == 9


# What a leaf sends to its third spine, by what the spine does with it: the superspines that it uses of four.
@pytest.mark.parametrize(
    ("leaf", "spine", "per_tier", "used"),
    [
        (HashFunction.MURMUR3, HashFunction.MURMUR3, True, 4),
        (HashFunction.MURMUR3, HashFunction.MURMUR3, False, 1),
        (HashFunction.CRC32, HashFunction.CRC32, True, 1),  # linear: another seed renames the superspines, no more
        (HashFunction.CRC16, HashFunction.CRC16, True, 1),
        (HashFunction.CRC32, HashFunction.CRC16, True, 4),
        (HashFunction.CRC32, HashFunction.CRC16, False, 4),
        (HashFunction.CRC16, HashFunction.MURMUR3, False, 4),
    ],
)
def test_another_function_per_tier_cures_the_polarisation_that_another_seed_of_a_crc_does_not(
    leaf: HashFunction, spine: HashFunction, per_tier: bool, used: int
) -> None:
    fields = HashField.FIVE_TUPLE
    flows = [FlowKey(0x0A000001 + 2 * src, 0x0A000101, sport, 4791, 17, 0) for src in range(40) for sport in range(100)]
    first = [flow for flow in flows if hash_flow(flow, hash_fields=fields, seed=9, function=leaf) >> 30 == 2]
    seed = tier_seed(9, 1) if per_tier else 9
    counts = Counter(hash_flow(flow, hash_fields=fields, seed=seed, function=spine) >> 30 for flow in first)
    assert len(first) > 800
    assert len(counts) == used
    assert min(counts.values()) > 0.8 * len(first) / used


# --- traffic engineering ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_te_gives_every_flow_of_a_permutation_a_link_of_its_own(data: st.DataObject) -> None:
    # As many uplinks as hosts: König's theorem says it can be done, whatever the permutation.
    leaves, hosts = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 8))
    topology = clos(leaves, hosts, hosts)
    targets = data.draw(st.permutations(range(leaves * hosts)))
    traffic = tuple(demand(topology, src, dst) for src, dst in enumerate(targets) if src != dst)
    tables = routing_scheme("te").build_tables(topology, hash_seed=1, settings=RoutingSettings(traffic=(traffic,)))
    used = [port for one in traffic for port in trace_path(topology, tables, one.src_port, one.flow).ports]
    assert len(used) == len(set(used))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_te_is_never_far_from_the_best_for_flows_of_all_sizes(data: st.DataObject) -> None:
    topology = clos(3, 3, 3)
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 50)), min_size=1, max_size=30)
    )
    traffic = tuple(
        demand(topology, src, dst, nbytes, dst_qp=number + 1)
        for number, (src, dst, nbytes) in enumerate(pairs)
        if src // 3 != dst // 3
    )
    tables = routing_scheme("te").build_tables(topology, hash_seed=1, settings=RoutingSettings(traffic=(traffic,)))
    load = np.zeros(len(topology.ports) + 1)
    total = np.zeros((2, 3))
    for one in traffic:
        path = trace_path(topology, tables, one.src_port, one.flow)
        load[list(path.ports[1:3])] += one.nbytes
        total[0, path.nodes[1] - 9] += one.nbytes
        total[1, path.nodes[3] - 9] += one.nbytes
    if traffic:
        # No placement is below the mean of a leaf's uplinks; list scheduling is within the largest flow of it at each end.
        assert load.max() <= total.max() / 3 + 2 * max(one.nbytes for one in traffic)


def test_te_uses_narrow_links_less() -> None:
    topology = with_slow_link(clos(2, 5, 2), "leaf0:spine1", 100_000_000_000)
    traffic = tuple(demand(topology, src, src + 5) for src in range(5))
    tables = routing_scheme("te").build_tables(topology, hash_seed=1, settings=RoutingSettings(traffic=(traffic,)))
    spines = [trace_path(topology, tables, one.src_port, one.flow).nodes[2] for one in traffic]
    assert sorted(spines.count(spine.index) for spine in topology.spines) == [1, 4]


def test_te_falls_back_on_ecmp_for_what_the_matrix_does_not_name() -> None:
    topology = clos(2, 4, 4)
    named, unnamed = demand(topology, 0, 4), demand(topology, 0, 4, dst_qp=2)
    te = routing_scheme("te").build_tables(topology, hash_seed=5, settings=RoutingSettings(traffic=((named,),)))
    ecmp = routing_scheme("ecmp").build_tables(topology, hash_seed=5)
    assert te.overrides.keys() == {override_key(topology.leaves[0].index, named.flow)}
    assert te.groups == ecmp.groups
    for seed in range(20):
        other = unnamed.flow._replace(src_port=seed)
        assert trace_path(topology, te, unnamed.src_port, other) == trace_path(topology, ecmp, unnamed.src_port, other)


def test_te_makes_a_ring_ideal_in_the_prediction() -> None:
    assert plan_of("routing.scheme=te").workloads[0].predicted_cct_ratio == pytest.approx(1.0)
    assert plan_of("routing.scheme=ecmp").workloads[0].predicted_cct_ratio > 1.5


def test_exact_match_entry_must_name_a_port_of_its_switch() -> None:
    topology = clos(2, 1, 1)
    builder = TablesBuilder(topology)
    with pytest.raises(ValueError, match="leaf1/up0 is not a port of leaf0"):
        builder.override(OverrideKey(topology.leaves[0].index, 1, 2, 3), topology.uplinks(topology.leaves[1])[0].id)


@pytest.mark.parametrize(("selector", "gap_ns"), [(Selector.FLOWLET, 0), (Selector.HASH, 1)])
def test_gap_belongs_to_flowlets(selector: Selector, gap_ns: int) -> None:
    with pytest.raises(ValueError, match="a gap belongs to the selector flowlet"):
        Group(selector, HashField(0), 0, (1, 2), gap_ns)
