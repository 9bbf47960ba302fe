"""Topologies: numbering, names, addresses, and the kernel's own routes."""

from __future__ import annotations

import ipaddress

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import PlanError
from testbed.topology import KernelRoute, LinkSpec, NodeKind, Topology, build_clos, build_star

HOST_LINK = LinkSpec(400_000_000_000, 600)
UPLINK = LinkSpec(800_000_000_000, 700)


def clos(*hosts_per_leaf: int, spines: int) -> Topology:
    return build_clos(hosts_per_leaf=hosts_per_leaf, spines=spines, host_link=HOST_LINK, uplink=UPLINK)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    racks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    spines = draw(st.integers(0 if len(racks) == 1 else 1, 5))
    return clos(*racks, spines=spines)


@settings(max_examples=40)
@given(topologies())
def test_ids_and_indices_are_dense_and_peers_agree(topology: Topology) -> None:
    assert [port.id for port in topology.ports] == list(range(1, len(topology.ports) + 1))
    assert [node.index for node in topology.nodes] == list(range(len(topology.nodes)))
    assert [link.index for link in topology.links] == list(range(len(topology.links)))
    for link in topology.links:
        assert (link.a, link.b) == (2 * link.index + 1, 2 * link.index + 2)
        a, b = topology.port(link.a), topology.port(link.b)
        assert (a.peer, b.peer, a.link, b.link) == (b.id, a.id, link.index, link.index)
        assert a.address ^ b.address == 1  # the two addresses of one /31
        assert link.name == f"{topology.nodes[a.node].name}:{topology.nodes[b.node].name}"
        assert topology.link(link.name) is link
        assert a.rate_bits_per_s == b.rate_bits_per_s == link.rate_bits_per_s
        assert a.delay_ns == b.delay_ns == link.delay_ns
    for node in topology.nodes:
        assert all(topology.port(port).node == node.index for port in node.ports)
        assert topology.node(node.name) is node
    assert sum(len(node.ports) for node in topology.nodes) == len(topology.ports)


@settings(max_examples=40)
@given(topologies())
def test_names_and_addresses_are_unique(topology: Topology) -> None:
    ports = topology.ports
    assert len({port.address for port in ports}) == len(ports)
    assert len({port.mac for port in ports}) == len(ports)
    assert len({(port.node, port.ifname) for port in ports}) == len(ports)
    assert len({node.name for node in topology.nodes}) == len(topology.nodes)
    assert len({link.name for link in topology.links}) == len(topology.links)


@settings(max_examples=40)
@given(topologies())
def test_every_leaf_has_one_uplink_to_every_spine_in_order(topology: Topology) -> None:
    for leaf in topology.leaves:
        uplinks = topology.uplinks(leaf)
        assert [topology.peer_node(port.id) for port in uplinks] == list(topology.spines)
        assert [port.ifname for port in uplinks] == [f"up{k}" for k in range(len(topology.spines))]
        assert leaf.ports == tuple(port.id for port in (*topology.down_ports(leaf), *uplinks))
    for spine in topology.spines:
        assert [topology.peer_node(port.id) for port in topology.down_ports(spine)] == list(topology.leaves)
        assert topology.uplinks(spine) == ()


@settings(max_examples=40)
@given(topologies())
def test_slots_lead_to_nics_and_back(topology: Topology) -> None:
    filled = set()
    for rank, host in enumerate(topology.hosts):
        port = topology.host_port(rank)
        assert (host.name, host.index, port.node, port.ifname) == (f"host{rank}", rank, rank, "eth0")
        slot = topology.slot_of_port(port.id)
        assert topology.slot_of_port(port.peer) == slot
        assert topology.slot_port(slot) is port
        assert topology.slot_leaf(slot) is topology.peer_node(port.id)
        assert slot in topology.slots_of_leaf(topology.slot_leaf(slot))
        filled.add(slot)
    assert len(filled) == len(topology.hosts)
    assert all(topology.slot_port(slot) is None for slot in set(range(topology.slots)) - filled)
    assert topology.slot_stride & (topology.slot_stride - 1) == 0


@pytest.mark.parametrize(
    ("racks", "spines"), [((2,), 0), ((1, 1), 1), ((3, 1, 2), 3), ((5, 4), 2), ((2, 2, 2, 2, 2), 1)]
)
def test_kernel_routes_lead_every_host_to_every_other(racks: tuple[int, ...], spines: int) -> None:
    topology = clos(*racks, spines=spines)
    routes = {node.index: topology.kernel_routes(node) for node in topology.nodes}
    for source in range(len(topology.hosts)):
        for destination in range(len(topology.hosts)):
            target = topology.host_port(destination)
            frontier = {topology.host_port(source).node}
            for _ in range(4):
                frontier = {n for node in frontier for n in _kernel_next_nodes(topology, routes, node, target.address)}
            assert frontier == {target.node}


def _kernel_next_nodes(topology: Topology, routes: dict[int, list[KernelRoute]], node: int, address: int) -> set[int]:
    own = [topology.port(port) for port in topology.nodes[node].ports]
    if any(port.address == address for port in own):
        return {node}
    for port in own:
        if port.address ^ address == 1:  # connected: the other end of a /31
            return {topology.port(port.peer).node}
    best: KernelRoute | None = None
    for route in routes[node]:
        network = ipaddress.IPv4Network((route.prefix, route.prefix_length))  # strict: must be aligned
        longer = best is None or route.prefix_length > best.prefix_length
        if ipaddress.IPv4Address(address) in network and longer:
            best = route
    assert best is not None
    for hop in best.next_hops:
        port = topology.port(hop.port)
        assert port.node == node
        assert topology.port(port.peer).address == hop.address
    return {topology.port(topology.port(hop.port).peer).node for hop in best.next_hops}


def test_uneven_racks_leave_slots_empty() -> None:
    topology = clos(3, 1, spines=2)
    assert topology.slot_stride == 4
    assert topology.slots == 8
    assert [topology.slot_of_port(topology.host_port(rank).id) for rank in range(4)] == [0, 1, 2, 4]
    assert topology.slot_port(3) is None
    assert topology.subnet_of_leaf(topology.leaves[1]) == (0x0A000008, 29)


def test_addresses_and_macs_follow_the_documented_plan() -> None:
    topology = clos(2, 2, spines=2)
    nic, down = topology.host_port(3), topology.port(topology.host_port(3).peer)
    assert (nic.address, down.address) == (0x0A000007, 0x0A000006)
    assert (nic.mac, down.mac) == ("02:00:00:07:00:00", "02:00:00:08:ff:ff")
    uplink = topology.port(topology.link("leaf1:spine0").a)
    assert (uplink.address, topology.port(uplink.peer).address) == (0x0A800004, 0x0A800005)
    assert topology.port_name(uplink.id) == "leaf1/up0"
    assert (uplink.rate_bits_per_s, uplink.delay_ns) == (UPLINK.rate_bits_per_s, UPLINK.delay_ns)
    assert (nic.rate_bits_per_s, nic.delay_ns) == (HOST_LINK.rate_bits_per_s, HOST_LINK.delay_ns)


def test_port_ids_beyond_a_byte_stand_in_two_bytes_of_the_mac() -> None:
    assert build_star(hosts=200, host_link=HOST_LINK).port(0x123).mac == "02:00:01:23:00:00"


def test_star_is_one_leaf_named_switch0() -> None:
    topology = build_star(hosts=3, host_link=HOST_LINK)
    (switch,) = topology.leaves
    assert (switch.name, switch.kind, len(switch.ports)) == ("switch0", NodeKind.LEAF, 3)
    assert topology.spines == ()
    assert topology.kernel_routes(switch) == []
    assert topology.slots == 4


def test_clos_survives_the_loss_of_all_spines_but_one() -> None:
    topology = clos(2, 3, 1, spines=3)
    graph: nx.MultiGraph[int] = nx.MultiGraph()
    graph.add_edges_from((topology.port(k.a).node, topology.port(k.b).node) for k in topology.links)
    graph.remove_nodes_from(spine.index for spine in topology.spines[1:])
    assert nx.is_connected(graph)


def test_building_twice_gives_equal_topologies() -> None:
    assert clos(3, 2, spines=3) == clos(3, 2, spines=3)
    assert clos(3, 2, spines=3) != clos(2, 3, spines=3)


@pytest.mark.parametrize(
    ("hosts_per_leaf", "spines", "message"),
    [
        ([], 1, "at least one leaf"),
        ([2, 0], 1, "leaf1 has no hosts"),
        ([2, 2], 0, "cannot reach each other"),
        ([2], -1, "at least 0"),
        ([16_384, *[1] * 600], 1, "NIC slots"),
    ],
)
def test_impossible_fabric_is_a_plan_error(hosts_per_leaf: list[int], spines: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        clos(*hosts_per_leaf, spines=spines)


def test_star_without_hosts_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match="at least one host"):
        build_star(hosts=0, host_link=HOST_LINK)


@pytest.mark.parametrize(("rate_bits_per_s", "delay_ns"), [(0, 0), (1, -1)])
def test_link_without_rate_or_with_negative_delay_is_refused(rate_bits_per_s: int, delay_ns: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        LinkSpec(rate_bits_per_s, delay_ns)


def test_looking_up_what_does_not_exist_raises() -> None:
    topology = clos(2, 2, spines=1)
    for port_id in (0, -1, len(topology.ports) + 1):
        with pytest.raises(KeyError):
            topology.port(port_id)
    with pytest.raises(KeyError):
        topology.host_port(-1)
    with pytest.raises(KeyError):
        topology.node("leaf9")
    with pytest.raises(KeyError):
        topology.slot_leaf(4)
    with pytest.raises(ValueError, match="not on a host link"):
        topology.slot_of_port(topology.uplinks(topology.leaves[0])[0].id)
