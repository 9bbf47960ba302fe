"""Three tiers: zones joined by superspines; their names, routes, hashes and orders."""

from __future__ import annotations

import ipaddress
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from testbed.collectives import ring_order
from testbed.errors import PlanError
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.roce.wire import IP_PROTOCOL_UDP, ROCE_UDP_PORT
from testbed.routing import (
    ROUTING_SCHEMES,
    Demand,
    FlowKey,
    RoutingSettings,
    build_tables,
    link_loads,
    routing_scheme,
    trace_path,
    trace_routes,
)
from testbed.routing.links import LinkState, dead_ports_of
from testbed.scenario import load_scenario
from testbed.topology import LinkSpec, NodeKind, Topology, build_zones, check_port_numbers

SCENARIOS = Path(__file__).parents[2] / "scenarios" / "zones"
HOST_LINK = LinkSpec(400 * 10**9, 600)
CROSS = LinkSpec(400 * 10**9, 5000)
SCENARIO = """
name: zones
fabric:
  kind: zones
  zones: 2
  leaves: 2
  spines: 2
  superspines: 2
  hosts_per_leaf: 2
  host_link: {rate: 400 Gbit/s, delay: 600 ns}
  superspine_link: {rate: 100 Gbit/s, delay: 5 us}
workload: [{collective: all_reduce, order: min_cut, size: 1 MiB}]
time_dilation: 20000
"""


def zones(number: int = 2, leaves: int = 2, spines: int = 2, superspines: int = 2, hosts: int = 2) -> Topology:
    return build_zones(
        zones=number,
        hosts_per_leaf=[hosts] * (number * leaves),
        spines=spines,
        superspines=superspines,
        host_link=HOST_LINK,
        uplink=HOST_LINK,
        superspine_link=CROSS,
    )


def plan_of(*overrides: str) -> Plan:
    return compile_plan(load_scenario(SCENARIO, overrides), capacity_packets_per_s=None)


def flow(topology: Topology, src: int, dst: int, port: int = 50_000, qp: int = 0x101) -> FlowKey:
    return FlowKey(
        topology.host_port(src).address, topology.host_port(dst).address, port, ROCE_UDP_PORT, IP_PROTOCOL_UDP, qp
    )


def test_nodes_and_links_are_numbered_zone_by_zone() -> None:
    topology = zones(2, leaves=2, spines=1, superspines=2)
    assert [node.name for node in topology.nodes[8:]] == [
        *("leaf0", "leaf1", "leaf2", "leaf3", "spine0", "spine1", "superspine0", "superspine1"),
    ]
    assert [node.zone for node in topology.nodes] == [*[0] * 4, *[1] * 4, 0, 0, 1, 1, 0, 1, None, None]
    assert [link.name for link in topology.links[8:]] == [
        *("leaf0:spine0", "leaf1:spine0", "leaf2:spine1", "leaf3:spine1"),
        *("spine0:superspine0", "spine0:superspine1", "spine1:superspine0", "spine1:superspine1"),
    ]
    spine = topology.node("spine1")
    assert [topology.port(port).ifname for port in spine.ports] == ["down0", "down1", "up0", "up1"]
    assert [topology.peer_node(port.id).name for port in topology.uplinks(spine)] == ["superspine0", "superspine1"]
    assert [topology.peer_node(port.id).name for port in topology.down_ports(topology.superspines[0])] == [
        *("spine0", "spine1"),
    ]
    assert topology.link("spine0:superspine1").delay_ns == 5000
    assert len({port.address for port in topology.ports}) == len({port.mac for port in topology.ports}) == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zones": 0}, "at least one zone"),
        ({"spines": 0}, "at least one spine"),
        ({"superspines": 0}, "at least one superspine"),
        ({"hosts_per_leaf": [1, 1, 1]}, "3 leaves do not divide evenly among 2 zones"),
        ({"hosts_per_leaf": [1, 0]}, "leaf1 has no hosts"),
    ],
)
def test_impossible_zones_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "zones": 2,
        "hosts_per_leaf": [1, 1],
        "spines": 1,
        "superspines": 1,
        "host_link": HOST_LINK,
        "uplink": HOST_LINK,
        "superspine_link": CROSS,
    }
    with pytest.raises(PlanError, match=message):
        build_zones(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(ROUTING_SCHEMES))
def test_every_scheme_leads_every_flow_to_its_host_over_the_tiers_that_it_needs(name: str) -> None:
    topology = zones(3, leaves=2, spines=2, superspines=3)
    nhosts = len(topology.hosts)
    pairs = [(src, dst) for src in range(nhosts) for dst in range(nhosts) if src != dst]
    traffic = tuple(Demand(topology.host_port(src).id, flow(topology, src, dst), 1000) for src, dst in pairs[::7])
    settings = RoutingSettings(flowlet_gap_ns=1000, traffic=(traffic,))
    tables = routing_scheme(name).build_tables(topology, hash_seed=5, settings=settings)
    for src, dst in pairs:
        key = flow(topology, src, dst)
        path = trace_path(topology, tables, topology.host_port(src).id, key)
        one_leaf, one_zone = src // 2 == dst // 2, src // 4 == dst // 4
        assert len(path.ports) == (2 if one_leaf else 4 if one_zone else 6)
        kinds = [topology.nodes[node].kind for node in path.nodes]
        assert (NodeKind.SUPERSPINE in kinds) is not one_zone
        assert path.delay_ns == (1200 if one_leaf else 2400 if one_zone else 12_400)
        routes = trace_routes(topology, tables, topology.host_port(src).id, key)
        assert sum(route.share for route in routes) == pytest.approx(1)
        assert {route.path.nodes[-1] for route in routes} == {topology.hosts[dst].index}
        if name in ("spray", "adaptive") and not one_zone:
            assert len(routes) == 2 * 3 * 2


def cross_loads(topology: Topology, *, per_tier: bool) -> npt.NDArray[np.int64]:
    """Return the flows on each spine's uplinks, shape ``(spines, superspines)``, of many between hosts of all zones."""
    settings = RoutingSettings(hash_seed_per_tier=per_tier)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=1, settings=settings)
    nhosts = len(topology.hosts)
    paths = [
        trace_path(topology, tables, topology.host_port(src).id, flow(topology, src, dst, port))
        for src in range(nhosts // 2)
        for dst in range(nhosts // 2, nhosts)
        for port in range(49_152, 49_152 + 40)
    ]
    loads = link_loads(topology, paths)
    used = [spine for spine in topology.spines if spine.zone == 0]
    return np.array([[loads[port.id] for port in topology.uplinks(spine)] for spine in used])


def test_one_seed_for_all_tiers_polarises_and_a_seed_per_tier_cures_it() -> None:
    topology = zones(2, leaves=2, spines=4, superspines=4)
    polarised = cross_loads(topology, per_tier=False)
    # What a spine gets has hashes of one quarter of the range, and they all choose the superspine of that quarter.
    assert np.count_nonzero(polarised) == 4
    assert np.diag(polarised).sum() == polarised.sum() == 640
    cured = cross_loads(topology, per_tier=True)
    assert cured.sum() == 640
    assert cured.min() > 20  # 40 flows each, six deviations are 37
    assert cured.max() < 60


def test_superspines_choose_the_spine_of_a_zone_by_a_seed_of_their_own() -> None:
    topology = zones(2, leaves=2, spines=4, superspines=4)
    tables = routing_scheme("ecmp").build_tables(topology, hash_seed=1)
    seeds = {
        topology.nodes[node].kind: {tables.group_at(node, slot).seed for slot in (0, 1)}  # type: ignore[union-attr]
        for node in (topology.leaves[2].index, topology.spines[4].index, topology.superspines[0].index)
        for slot in (0,)
    }
    assert len(set.union(*seeds.values())) == 3


def test_pinning_gives_destinations_paths_of_their_own_between_zones_too() -> None:
    topology = zones(2, leaves=2, spines=2, superspines=2)
    tables = routing_scheme("pinning").build_tables(topology, hash_seed=0)
    paths = [
        trace_path(topology, tables, topology.host_port(host).id, flow(topology, host, (host + 4) % 8))
        for host in range(8)
    ]
    loads = Counter(port for path in paths for port in path.ports)
    assert set(loads.values()) == {1}


def test_te_gives_flows_between_zones_paths_of_their_own() -> None:
    topology = zones(2, leaves=2, spines=2, superspines=2)
    demands = [Demand(topology.host_port(src).id, flow(topology, src, 7 - src), 1000) for src in range(8)]
    settings = RoutingSettings(traffic=(tuple(demands),))
    tables = routing_scheme("te").build_tables(topology, hash_seed=1, settings=settings)
    paths = [trace_path(topology, tables, demand.src_port, demand.flow) for demand in demands]
    assert max(Counter(port for path in paths for port in path.ports).values()) == 1
    assert len(tables.overrides) == 3 * 8


def test_the_kernels_own_routes_lead_everywhere() -> None:
    topology = zones(2, leaves=2, spines=2, superspines=2)

    def next_nodes(node: int, address: int) -> set[int]:
        found = [
            route
            for route in topology.kernel_routes(topology.nodes[node])
            if route.source is None
            and ipaddress.ip_address(address) in ipaddress.ip_network((route.prefix, route.prefix_length), strict=False)
        ]
        longest = max(found, key=lambda route: route.prefix_length)
        return {topology.peer_node(hop.port).index for hop in longest.next_hops}

    for dst in (0, 7):
        address = topology.host_port(dst).address
        target = topology.slot_leaf(topology.slot_of_port(topology.host_port(dst).id))
        for src in (0, 3, 4, 7):
            if src == dst:
                continue
            at, hops = {topology.hosts[src].index}, 0
            while at != {target.index}:
                at = set.union(*(next_nodes(node, address) for node in at))
                hops += 1
            assert hops <= 5


def test_min_cut_crosses_between_zones_once_each_way_and_random_more() -> None:
    assert ring_order("min_cut", [2, 2, 2, 2], zones=2) == (0, 2, 1, 3, 4, 6, 5, 7)
    assert ring_order("min_cut", [2, 2]) == ring_order("rails", [2, 2])

    def crossings(order: tuple[int, ...]) -> int:
        return sum(a // 4 != b // 4 for a, b in zip(order, (*order[1:], order[0]), strict=True))

    assert crossings(ring_order("min_cut", [2, 2, 2, 2], zones=2)) == 2
    assert crossings(ring_order("rails", [2, 2, 2, 2], zones=2)) == 4
    drawn = [ring_order("random", [2, 2, 2, 2], np.random.default_rng(seed), zones=2) for seed in range(50)]
    assert np.mean([crossings(order) for order in drawn]) == pytest.approx(8 * 4 / 7, rel=0.15)


def test_links_between_zones_have_their_own_rate_and_delay_and_headroom() -> None:
    plan = plan_of("qos.pfc.enabled=true", "fabric.superspine_switch.buffer=64MiB")
    topology = plan.topology
    (planned,) = plan.workloads
    assert topology.link("spine0:superspine0").rate_bits_per_s == 100 * 10**9
    longest = max(range(8), key=lambda flow: len(planned.paths[flow].ports))
    # Two host links and two uplinks of 600 ns, two links of 5 us between the zones, a frame time on each.
    assert planned.paths[longest].delay_ns == 4 * 600 + 2 * 5000
    down, cross = topology.link("leaf0:spine0").b, topology.link("spine0:superspine0").b
    assert plan.pausing[cross].delay_ns > plan.pausing[down].delay_ns + 2 * 4000
    assert plan.buffer_bytes(topology.superspines[0].index) == 64 << 20
    assert plan.buffer_bytes(topology.spines[0].index) != 64 << 20
    assert planned.predicted_cct_ratio >= 4 - 1e-9  # one flow of 400 Gbit/s over a link of 100


def test_superspines_are_as_spines_and_their_links_as_uplinks_unless_given() -> None:
    scenario = load_scenario(
        SCENARIO.replace("  superspine_link: {rate: 100 Gbit/s, delay: 5 us}\n", ""),
        ["fabric.spine_switch.buffer=48MiB", "fabric.uplink.delay=2us"],
    )
    fabric = scenario.fabric
    assert fabric.superspine_switch.buffer_bytes == 48 << 20  # type: ignore[union-attr]
    assert fabric.superspine_link.delay_ns == 2000  # type: ignore[union-attr]
    assert fabric.superspine_link.rate_bits_per_s == 400 * 10**9  # type: ignore[union-attr]
    assert load_scenario_again(scenario.resolved()) == scenario.resolved()


def load_scenario_again(resolved: dict[str, object]) -> dict[str, object]:
    from testbed.scenario import Scenario

    return Scenario.model_validate(resolved).resolved()


@pytest.mark.parametrize("file", sorted(SCENARIOS.glob("*.yaml")), ids=lambda file: file.stem)
def test_scenarios_expect_what_is_predicted(file: Path) -> None:
    plan = compile_plan(load_scenario(file), capacity_packets_per_s=None)
    (planned,) = plan.workloads
    for line in plan.scenario.expect:
        if line.metric == "cct_ratio":
            holds = planned.predicted_cct_ratio <= line.value
            assert holds is (line.operator == "<=")


def test_a_fabric_of_24_thousand_gpus_is_a_topology_but_cannot_be_emulated() -> None:
    topology = build_zones(
        zones=8,
        hosts_per_leaf=[2] * (8 * 192),
        spines=16,
        superspines=16,
        host_link=HOST_LINK,
        uplink=HOST_LINK,
        superspine_link=CROSS,
        nics_per_host=8,
    )
    assert len(topology.nics) == 24_576
    assert len({port.mac for port in topology.ports}) == len(topology.ports) == 102_400
    with pytest.raises(PlanError, match="102400 ports"):
        check_port_numbers(topology)


@pytest.mark.parametrize("name", sorted(ROUTING_SCHEMES))
def test_dead_links_between_zones_are_avoided_by_every_scheme(name: str) -> None:
    topology = zones(2, leaves=2, spines=2, superspines=2)
    dead = dead_ports_of(topology, ["spine0:superspine0", "spine3:superspine1", "leaf1:spine1"])
    pairs = [(src, dst) for src in range(8) for dst in range(8) if src // 2 != dst // 2]
    traffic = tuple(Demand(topology.host_port(src).id, flow(topology, src, dst), 1000) for src, dst in pairs)
    settings = RoutingSettings(flowlet_gap_ns=1000, traffic=(traffic,), links=LinkState(dead))
    tables = build_tables(topology, routing_scheme(name), hash_seed=3, settings=settings)
    for demand in traffic:
        for route in trace_routes(topology, tables, demand.src_port, demand.flow):
            assert not dead & {port for end in route.path.ports for port in (end, topology.port(end).peer)}
