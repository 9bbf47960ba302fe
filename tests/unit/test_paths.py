"""Paths, loads and predictions, all read from the forwarding tables."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import PlanError
from testbed.routing import (
    FlowKey,
    Group,
    HashField,
    Path,
    Selector,
    completion_time,
    find_collisions,
    link_loads,
    max_min_rates,
    nic_port_rates,
    port_rates,
    predicted_cct_ratio,
    routing_scheme,
    trace_path,
)
from testbed.routing.tables import ForwardingTables, TablesBuilder, route_downwards, single_member
from testbed.topology import LinkSpec, Topology, build_clos, build_star

HOST_LINK = LinkSpec(400_000_000_000, 600)
UPLINK = LinkSpec(400_000_000_000, 1000)


def clos(*hosts_per_leaf: int, spines: int, host_link: LinkSpec = HOST_LINK, uplink: LinkSpec = UPLINK) -> Topology:
    return build_clos(hosts_per_leaf=hosts_per_leaf, spines=spines, host_link=host_link, uplink=uplink)


def flow_key(topology: Topology, src: int, dst: int, *, src_port: int = 0xC000, dst_qp: int = 0) -> FlowKey:
    src_address, dst_address = topology.host_port(src).address, topology.host_port(dst).address
    return FlowKey(src_address, dst_address, src_port, 4791, 17, dst_qp)


def trace(topology: Topology, tables: ForwardingTables, src: int, dst: int, *, src_port: int = 0xC000) -> Path:
    key = flow_key(topology, src, dst, src_port=src_port)
    return trace_path(topology, tables, topology.host_port(src).id, key)


def rails_ring(racks: int, hosts: int) -> list[tuple[int, int]]:
    """Return the (src, dst) ranks of a ring that visits racks in turn, so that every hop crosses a spine."""
    order = [rack * hosts + host for host in range(hosts) for rack in range(racks)]
    return list(zip(order, order[1:] + order[:1], strict=True))


# --- trace_path -------------------------------------------------------------------------------------


def test_path_lists_the_egress_port_of_every_hop_and_sums_the_delays() -> None:
    topology = clos(2, 2, spines=2)
    tables = routing_scheme("pinning").build_tables(topology, hash_seed=0)
    path = trace(topology, tables, 0, 3)
    assert [topology.port_name(port) for port in path.ports] == [
        "host0/eth0",
        "leaf0/up1",
        "spine1/down1",
        "leaf1/down1",
    ]
    assert path.describe(topology) == "host0 > leaf0 > spine1 > leaf1 > host3"
    assert path.delay_ns == 600 + 1000 + 1000 + 600


def test_path_within_a_rack_stays_below_its_leaf() -> None:
    topology = clos(2, 2, spines=2)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    path = trace(topology, tables, 3, 2)
    assert path.describe(topology) == "host3 > leaf1 > host2"
    assert path.delay_ns == 1200


@pytest.mark.parametrize("scheme", ["ecmp", "pinning"])
@settings(max_examples=15)
@given(
    racks=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    spines=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_pair_of_hosts_has_a_connected_path(scheme: str, racks: list[int], spines: int, seed: int) -> None:
    topology = clos(*racks, spines=spines)
    tables = routing_scheme(scheme).build_tables(topology, hash_seed=seed)
    for src, dst in itertools.permutations(range(len(topology.hosts)), 2):
        path = trace(topology, tables, src, dst)
        assert path.nodes[0] == src
        assert path.nodes[-1] == dst
        assert len(path.ports) == len(path.nodes) - 1
        for port_id, node, following in zip(path.ports, path.nodes, path.nodes[1:], strict=False):
            assert topology.port(port_id).node == node
            assert topology.peer_node(port_id).index == following


def test_destination_that_is_no_nic_is_refused() -> None:
    topology = clos(3, 3, spines=1)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    nic = topology.host_port(0)
    leaf_side = topology.port(topology.host_port(4).peer).address
    empty_slot = 0x0A000001 + 2 * 3
    for address in (leaf_side, empty_slot, 0x0A800001, 0x0A0000FF, 0x08080809, 0xC0A80001):
        key = flow_key(topology, 0, 4)._replace(dst_address=address)
        with pytest.raises(PlanError, match="no NIC has that address"):
            trace_path(topology, tables, nic.id, key)
    with pytest.raises(PlanError, match="the sending host itself"):
        trace(topology, tables, 0, 0)
    with pytest.raises(ValueError, match="leaf0/down0 is not a host's port"):
        trace_path(topology, tables, nic.peer, flow_key(topology, 0, 4))


def test_loops_missing_routes_and_wrong_deliveries_are_named() -> None:
    topology = clos(2, 2, spines=2)
    slot = topology.slot_of_port(topology.host_port(3).id)
    leaf0, leaf1 = topology.leaves

    builder = TablesBuilder(topology)
    route_downwards(builder, topology)
    with pytest.raises(PlanError, match="leaf0 has no route from host0 to host3"):
        trace(topology, builder.build(), 0, 3)

    builder.route(leaf0.index, slot, single_member(topology.host_port(1).peer))
    with pytest.raises(PlanError, match="deliver packets from host0 to host3 to host1"):
        trace(topology, builder.build(), 0, 3)

    for leaf in (leaf0, leaf1):
        builder.route(leaf.index, slot, single_member(topology.uplinks(leaf)[1].id))
    with pytest.raises(PlanError, match="loop from host0 to host3: host0 > leaf0 > spine1 > leaf1 > spine1"):
        trace(topology, builder.build(), 0, 3)


def test_source_ports_spread_ecmp_flows_and_the_queue_pair_does_not() -> None:
    topology = clos(1, 1, spines=4)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=1)
    nic = topology.host_port(0).id
    by_port = {trace(topology, tables, 0, 1, src_port=0xC000 + i).ports for i in range(64)}
    by_qp = {trace_path(topology, tables, nic, flow_key(topology, 0, 1, dst_qp=i)).ports for i in range(64)}
    assert (len(by_port), len(by_qp)) == (4, 1)


# --- loads and collisions ---------------------------------------------------------------------------


def test_link_loads_count_flows_or_sum_weights() -> None:
    topology = clos(2, 2, spines=1)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    paths = [trace(topology, tables, 0, 2), trace(topology, tables, 1, 2)]
    counts = link_loads(topology, paths)
    sums = link_loads(topology, paths, [1.5, 2])
    assert counts.dtype == np.int64
    assert counts.shape == sums.shape == (len(topology.ports) + 1,)
    uplink = topology.link("leaf0:spine0")
    assert (counts[uplink.a], counts[uplink.b], sums[uplink.a]) == (2, 0, 3.5)
    assert counts.sum() == 8
    assert not link_loads(topology, []).any()
    with pytest.raises(ValueError, match="1 weights for 2 paths"):
        link_loads(topology, paths, [1.0])


def test_collisions_name_ports_and_flows() -> None:
    topology = clos(2, 2, spines=1)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    paths = {f"{src}->{dst}": trace(topology, tables, src, dst) for src, dst in ((0, 2), (1, 3))}
    found = find_collisions(topology, paths)
    assert [(collision.port_name, collision.flows) for collision in found] == [
        ("leaf0/up0", ("0->2", "1->3")),
        ("spine0/down1", ("0->2", "1->3")),
    ]
    assert found[0].port == topology.link("leaf0:spine0").a


def test_pinned_ring_over_full_racks_has_no_collision() -> None:
    topology = clos(4, 4, 4, 4, spines=4)
    tables = routing_scheme("pinning").build_tables(topology, hash_seed=0)
    paths = {f"{s}->{d}": trace(topology, tables, s, d) for s, d in rails_ring(4, 4)}
    assert find_collisions(topology, paths) == []


# --- max-min rates ----------------------------------------------------------------------------------


def slow_max_min(paths: list[list[int]], capacity: dict[int, float], weights: list[float]) -> list[float]:
    """Progressive filling as the textbook has it: one port at a time, everything recomputed."""
    rates: dict[int, float] = {}
    while len(rates) < len(paths):
        shares = {}
        for port, rate in capacity.items():
            rising = [f for f, path in enumerate(paths) if port in path and f not in rates]
            if rising:
                used = sum(rates[f] for f, path in enumerate(paths) if port in path and f in rates)
                shares[port] = (rate - used) / sum(weights[f] for f in rising)
        port = min(shares, key=shares.__getitem__)
        for f, path in enumerate(paths):
            if port in path and f not in rates:
                rates[f] = shares[port] * weights[f]
    return [rates[f] for f in range(len(paths))]


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[list[int]], dict[int, float], list[float]]:
    ports = draw(st.integers(1, 7))
    capacity = {port: draw(st.sampled_from([1.0, 2.0, 3.0, 10.0, 0.7])) for port in range(1, ports + 1)}
    path = st.lists(st.integers(1, ports), min_size=1, max_size=4, unique=True)
    paths = draw(st.lists(path, min_size=1, max_size=10))
    weights = [draw(st.sampled_from([1.0, 1.0, 2.0, 0.5])) for _ in paths]
    return paths, capacity, weights


@settings(max_examples=60)
@given(networks())
def test_rates_equal_the_textbooks(network: tuple[list[list[int]], dict[int, float], list[float]]) -> None:
    paths, capacity, weights = network
    rates = max_min_rates(paths, capacity, weights)
    np.testing.assert_allclose(rates, slow_max_min(paths, capacity, weights), rtol=1e-9)


@settings(max_examples=60)
@given(networks())
def test_rates_fit_and_every_flow_has_a_full_port_where_it_is_among_the_fastest(
    network: tuple[list[list[int]], dict[int, float], list[float]],
) -> None:
    # The definition of max-min fairness, which knows nothing of how the rates were found.
    paths, capacity, weights = network
    levels = max_min_rates(paths, capacity, weights) / np.array(weights)
    for port, rate in capacity.items():
        assert sum(levels[f] * weights[f] for f, path in enumerate(paths) if port in path) <= rate * (1 + 1e-9)
    for f, path in enumerate(paths):
        assert any(
            sum(levels[g] * weights[g] for g, other in enumerate(paths) if port in other) >= capacity[port] * (1 - 1e-9)
            and levels[f] >= max(levels[g] for g, other in enumerate(paths) if port in other) * (1 - 1e-9)
            for port in path
        )


def test_unlimited_flows_and_unlisted_ports() -> None:
    assert max_min_rates([], {}).shape == (0,)
    assert max_min_rates([[], [5], [1, 5]], {1: 8.0}).tolist() == [np.inf, np.inf, 8.0]
    assert max_min_rates([[1], [2]], np.array([0.0, np.inf, 3.0])).tolist() == [np.inf, 3.0]
    assert max_min_rates([[1]], {1: 0.0}).tolist() == [0.0]


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="1 weights for 2 paths"):
        max_min_rates([[1], [1]], {1: 1.0}, [1.0])
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            max_min_rates([[1]], {1: 1.0}, [weight])


def test_pfc_unfairness_example_has_equal_max_min_shares() -> None:
    # Three senders through one uplink and one next to the receiver: PFC gives 1/6 and 1/2, max-min 1/4 each.
    topology = clos(3, 2, spines=1)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    paths = [trace(topology, tables, src, 4).ports for src in (0, 1, 2, 3)]
    np.testing.assert_allclose(max_min_rates(paths, port_rates(topology)), 100e9)


def test_24_000_flows_take_seconds() -> None:
    # 24,000 random flows over 48 racks of 32 NICs and 32 spines, the worst case for the number of levels.
    rng = np.random.default_rng(1)
    nics, flows, leaves, spines = 1536, 24_000, 48, 32
    src, dst, spine = rng.integers(0, nics, flows), rng.integers(0, nics, flows), rng.integers(0, spines, flows)
    up = 2 * nics + src // 32 * spines + spine
    down = 2 * nics + leaves * spines + spine * leaves + dst // 32
    paths = np.column_stack([src, up, down, nics + dst]).tolist()
    capacity = np.full(2 * nics + 2 * leaves * spines, 400e9)
    start = time.process_time()
    rates = max_min_rates(paths, capacity)
    assert time.process_time() - start < 5
    loads = np.bincount(np.concatenate(paths), weights=np.repeat(rates, 4), minlength=len(capacity))
    assert loads.max() <= 400e9 * (1 + 1e-6)


# --- predicted_cct_ratio ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_ecmp_ring_at_one_qp_slows_by_the_worst_links_flow_count(seed: int) -> None:
    topology = clos(4, 4, 4, 4, spines=4)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=seed)
    paths = [trace(topology, tables, s, d) for s, d in rails_ring(4, 4)]
    worst = max(Counter(port for path in paths for port in path.ports).values())
    assert predicted_cct_ratio(topology, [[path] for path in paths]) == pytest.approx(worst)


def test_pinned_ring_is_not_slowed() -> None:
    topology = clos(4, 4, 4, 4, spines=4)
    tables = routing_scheme("pinning").build_tables(topology, hash_seed=0)
    connections = [[trace(topology, tables, s, d)] for s, d in rails_ring(4, 4)]
    assert predicted_cct_ratio(topology, connections) == pytest.approx(1.0)


def test_more_queue_pairs_smooth_ecmp_as_the_published_model_says() -> None:
    # Mean slowdown of 4 racks x 4 NICs, 1:1, random hash, split: 2.66 at 1 QP, 1.83 at 4, 1.57 at 8.
    topology = clos(4, 4, 4, 4, spines=4)
    for qps, expected in ((1, 2.66), (4, 1.83), (8, 1.57)):
        ratios = []
        for seed in range(40):
            tables = routing_scheme("ecmp").build_tables(topology, hash_seed=seed)
            connections = [
                [trace(topology, tables, s, d, src_port=0xC000 + 37 * qp) for qp in range(qps)]
                for s, d in rails_ring(4, 4)
            ]
            ratios.append(predicted_cct_ratio(topology, connections))
        # 40 seeds of a quantity with a deviation of about 0.5 (1 QP): a standard error of 0.08.
        assert np.mean(ratios) == pytest.approx(expected, abs=0.2)


def test_queue_pairs_on_one_path_gain_nothing() -> None:
    topology = clos(2, 2, spines=1)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    for qps in (1, 16):
        connections = [[trace(topology, tables, s, d)] * qps for s, d in ((0, 2), (1, 3))]
        assert predicted_cct_ratio(topology, connections) == pytest.approx(2.0)


def test_incast_is_limited_by_the_nic_and_not_by_the_core() -> None:
    topology = build_star(hosts=5, host_link=HOST_LINK)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    paths = [[trace(topology, tables, src, 4)] for src in range(4)]
    assert predicted_cct_ratio(topology, paths) == pytest.approx(1.0)
    rates = max_min_rates([path.ports for (path,) in paths], nic_port_rates(topology))
    np.testing.assert_allclose(rates, 100e9)


def test_incast_through_a_narrow_core_is_slowed_by_the_core() -> None:
    # Three senders under one leaf, one uplink at half the rate of the receiver's NIC.
    topology = clos(3, 1, spines=1, uplink=LinkSpec(200_000_000_000, 1000))
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    paths = [[trace(topology, tables, src, 3)] for src in range(3)]
    assert predicted_cct_ratio(topology, paths) == pytest.approx(2.0)


def test_small_flow_beside_a_large_one_hardly_slows_it() -> None:
    topology = clos(2, 2, spines=1)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    connections = [[trace(topology, tables, s, d)] for s, d in ((0, 2), (1, 3))]
    assert predicted_cct_ratio(topology, connections, [100, 1]) == pytest.approx(1.01)
    assert predicted_cct_ratio(topology, connections, [7, 7]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="shorter"):
        predicted_cct_ratio(topology, connections, [1])


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_completion_time_is_what_the_busiest_port_has_to_carry(data: st.DataObject) -> None:
    ports = data.draw(st.integers(1, 6))
    path = st.lists(st.integers(0, ports - 1), min_size=1, max_size=4, unique=True)
    paths = data.draw(st.lists(path, min_size=1, max_size=10))
    nbytes = [data.draw(st.integers(1, 1000)) for _ in paths]
    capacity = np.array([float(data.draw(st.integers(1, 50))) for _ in range(ports)])
    load = [sum(n for n, path in zip(nbytes, paths, strict=True) if port in path) for port in range(ports)]
    assert completion_time(paths, nbytes, capacity) == pytest.approx((np.array(load) / capacity).max())


def test_fast_uplinks_absorb_a_collision() -> None:
    topology = clos(2, 2, spines=1, uplink=LinkSpec(600_000_000_000, 1000))
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=0)
    connections = [[trace(topology, tables, s, d)] for s, d in ((0, 2), (1, 3))]
    assert predicted_cct_ratio(topology, connections) == pytest.approx(4 / 3)


def test_prediction_needs_flows() -> None:
    topology = clos(1, 1, spines=1)
    empty: list[list[list[Path]]] = [[], [[]]]
    for connections in empty:
        with pytest.raises(ValueError, match="at least one connection"):
            predicted_cct_ratio(topology, connections)


def test_paths_read_the_very_tables_they_are_given() -> None:
    # Moving one entry of the tables moves the path, the load and the prediction with it.
    topology = clos(2, 2, spines=2)
    builder = TablesBuilder(topology)
    route_downwards(builder, topology)
    up0, up1 = (port.id for port in topology.uplinks(topology.leaves[0]))
    slots = [topology.slot_of_port(topology.host_port(rank).id) for rank in (2, 3)]
    ratios = []
    for second in (up0, up1):
        for slot, port in zip(slots, (up0, second), strict=True):
            group = Group(Selector.HASH, HashField.FIVE_TUPLE, 0, (port,))
            builder.route(topology.leaves[0].index, slot, group)
        paths = [trace(topology, builder.build(), s, d) for s, d in ((0, 2), (1, 3))]
        assert link_loads(topology, paths)[second] == (2 if second == up0 else 1)
        ratios.append(predicted_cct_ratio(topology, [[path] for path in paths]))
    assert ratios == pytest.approx([2.0, 1.0])
