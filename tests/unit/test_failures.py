"""Rerouting: what every scheme's tables become when links are down, and who notices when."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import LabError, PlanError
from testbed.fabric.tables import TableWriter, count_rows
from testbed.kernel import layout
from testbed.plan.compile import compile_plan
from testbed.routing import (
    ALL_UP,
    ROUTING_SCHEMES,
    UNREACHABLE,
    Demand,
    FlowKey,
    ForwardingTables,
    Knowledge,
    LinkState,
    RoutingSettings,
    build_tables,
    dead_ports_of,
    routing_scheme,
    trace_path,
    trace_routes,
)
from testbed.routing.resilient import MAX_BUCKETS, replace_dead
from testbed.scenario import load_scenario
from testbed.topology import LinkSpec, Topology, build_clos

LINK = LinkSpec(400_000_000_000, 600)
CLOS = build_clos(hosts_per_leaf=(4,) * 4, spines=4, host_link=LINK, uplink=LINK)
PERMUTATION = [(host, (host + 4) % 16) for host in range(16)]


def demand(topology: Topology, src: int, dst: int, dst_qp: int = 7) -> Demand:
    source, target = topology.host_port(src), topology.host_port(dst)
    return Demand(source.id, FlowKey(source.address, target.address, 0xC000 + src, 4791, 17, dst_qp), 1000)


TRAFFIC = tuple(demand(CLOS, src, dst, 100 + src) for src, dst in PERMUTATION)


def tables_of(scheme: str, *names: str, knowledge: Knowledge | None = None) -> ForwardingTables:
    links = LinkState(dead_ports_of(CLOS, names))
    routing = RoutingSettings(flowlet_gap_ns=1000, traffic=(TRAFFIC,), links=links)
    return build_tables(CLOS, routing_scheme(scheme), hash_seed=3, settings=routing, knowledge=knowledge)


def ports_used(tables: ForwardingTables) -> set[int]:
    return {
        port
        for one in TRAFFIC
        for route in trace_routes(CLOS, tables, one.src_port, one.flow, over_time=True)
        for port in route.path.ports
    }


@pytest.mark.parametrize("scheme", sorted(ROUTING_SCHEMES))
@pytest.mark.parametrize("dead", ["leaf0:spine1", "spine2", "leaf3:spine0"])
def test_no_scheme_uses_a_dead_link_and_all_flows_arrive(scheme: str, dead: str) -> None:
    healthy, left = tables_of(scheme), tables_of(scheme, dead)
    gone = dead_ports_of(CLOS, [dead])
    assert ports_used(healthy) & gone, "the link must matter, or the test shows nothing"
    assert not ports_used(left) & gone


@pytest.mark.parametrize("scheme", sorted(ROUTING_SCHEMES))
def test_without_a_failure_the_tables_are_the_schemes_own(scheme: str) -> None:
    own = routing_scheme(scheme).build_tables(
        CLOS, hash_seed=3, settings=RoutingSettings(flowlet_gap_ns=1000, traffic=(TRAFFIC,))
    )
    assert tables_of(scheme) == own


def test_other_leaves_avoid_the_spine_that_lost_its_way_down() -> None:
    tables = tables_of("ecmp", "leaf0:spine1")
    into, elsewhere = CLOS.slot_of_port(CLOS.host_port(0).id), CLOS.slot_of_port(CLOS.host_port(8).id)
    leaf1 = CLOS.leaves[1]
    names = {CLOS.peer_node(port).name for port in tables.group_at(leaf1.index, into).members}  # type: ignore[union-attr]
    assert names == {"spine0", "spine2", "spine3"}
    assert len(tables.group_at(leaf1.index, elsewhere).members) == 4  # type: ignore[union-attr]


def test_before_the_news_is_out_only_the_switches_at_the_link_have_reacted() -> None:
    dead = LinkState(dead_ports_of(CLOS, ["leaf0:spine1"]))
    tables = tables_of("ecmp", "leaf0:spine1", knowledge=Knowledge(adjacent=dead))
    into = CLOS.slot_of_port(CLOS.host_port(0).id)
    away = CLOS.slot_of_port(CLOS.host_port(8).id)
    assert len(tables.group_at(CLOS.leaves[1].index, into).members) == 4  # type: ignore[union-attr]
    assert len(tables.group_at(CLOS.leaves[0].index, away).members) == 3  # type: ignore[union-attr]
    assert tables.fib[CLOS.spines[1].index, into] == UNREACHABLE
    one = demand(CLOS, 8, 0)
    flows = [one.flow._replace(src_port=port) for port in range(0xC000, 0xC010)]
    healthy = tables_of("ecmp")
    through = [trace_path(CLOS, healthy, one.src_port, flow).nodes[2] for flow in flows]
    assert len(set(through)) > 1
    for flow, spine in zip(flows, through, strict=True):
        if CLOS.nodes[spine].name == "spine1":
            with pytest.raises(PlanError, match="spine1 has no route"):
                trace_path(CLOS, tables, one.src_port, flow)
        else:
            assert trace_path(CLOS, tables, one.src_port, flow).nodes[2] == spine


def test_pinned_flows_are_hashed_over_the_survivors() -> None:
    healthy, left = tables_of("pinning"), tables_of("pinning", "leaf0:spine1")
    leaf0 = CLOS.leaves[0].index
    for slot in range(4, 16):
        before, after = healthy.group_at(leaf0, slot), left.group_at(leaf0, slot)
        assert before
        assert after
        if CLOS.peer_node(before.members[0]).name == "spine1":
            assert len(after.members) == 3
        else:
            assert after == before


def test_stale_entries_fall_back_until_the_controller_reacts() -> None:
    dead = LinkState(dead_ports_of(CLOS, ["leaf0:spine1"]))
    healthy = tables_of("te")
    stale = tables_of("te", "leaf0:spine1", knowledge=Knowledge(dead, dead, ALL_UP))
    fresh = tables_of("te", "leaf0:spine1")
    gone = {key for key, port in healthy.overrides.items() if not dead.is_up(CLOS.port(port))}
    assert gone
    assert gone <= healthy.overrides.keys() - stale.overrides.keys()
    assert {key: healthy.overrides[key] for key in stale.overrides} == dict(stale.overrides)
    assert fresh.overrides.keys() == healthy.overrides.keys()
    assert all(dead.is_up(CLOS.port(port)) for port in fresh.overrides.values())


def test_the_controller_and_capacity_aware_switches_see_a_degraded_link() -> None:
    slow = CLOS.link("leaf0:spine1")
    links = LinkState(rates_bits_per_s=((slow.a, 100_000_000_000), (slow.b, 100_000_000_000)))
    te = build_tables(
        CLOS, routing_scheme("te"), hash_seed=3, settings=RoutingSettings(traffic=(TRAFFIC,), links=links)
    )
    assert slow.a not in te.overrides.values(), "three uplinks carry four flows in half the time of the slow one"
    adaptive = build_tables(
        CLOS,
        routing_scheme("adaptive"),
        hash_seed=3,
        settings=RoutingSettings(adaptive_scope="capacity", links=links),
    )
    group = adaptive.group_at(CLOS.leaves[0].index, 8)
    assert group
    assert [group.members.count(port.id) for port in CLOS.uplinks(CLOS.leaves[0])] == [4, 1, 4, 4]


def test_a_rack_without_uplinks_is_unreachable() -> None:
    tables = tables_of("e-ecmp", *(f"leaf0:spine{spine}" for spine in range(4)))
    slots = CLOS.slots_of_leaf(CLOS.leaves[0])
    assert (tables.fib[CLOS.leaves[1].index, slots.start : slots.stop] == UNREACHABLE).all()
    one = demand(CLOS, 4, 8)
    assert trace_path(CLOS, tables, one.src_port, one.flow).ports
    with pytest.raises(PlanError, match="no route"):
        trace_path(CLOS, tables, one.src_port, demand(CLOS, 4, 0).flow)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9), st.sampled_from(["ecmp", "pinning"]))
def test_a_way_is_found_exactly_where_there_is_one(dead: set[tuple[int, int]], scheme: str) -> None:
    names = [f"leaf{leaf}:spine{spine}" for leaf, spine in dead]
    tables = tables_of(scheme, *names)
    gone = dead_ports_of(CLOS, names)
    for src, dst in [(0, 4), (5, 0), (9, 15)]:
        one = demand(CLOS, src, dst)
        leaves = src // 4, dst // 4
        exists = any(all((leaf, spine) not in dead for leaf in leaves) for spine in range(4))
        if exists:
            assert not gone & set(trace_path(CLOS, tables, one.src_port, one.flow).ports)
        else:
            with pytest.raises(PlanError, match="no route"):
                trace_path(CLOS, tables, one.src_port, one.flow)


def test_names_of_links_and_nodes() -> None:
    link = CLOS.link("leaf0:spine1")
    assert dead_ports_of(CLOS, ["leaf0:spine1"]) == {link.a, link.b}
    assert len(dead_ports_of(CLOS, ["spine0"])) == 8
    with pytest.raises(KeyError):
        dead_ports_of(CLOS, ["leaf9"])
    assert np.all([LinkState(frozenset({link.a})).is_up(CLOS.port(link.b)) is False])


# --- resilient hashing ------------------------------------------------------------------------------------


@given(
    members=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    dead=st.sets(st.integers(1, 6)),
    words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50),
)
def test_only_flows_of_dead_members_move(members: list[int], dead: set[int], words: list[int]) -> None:
    alive = [member not in dead for member in members]
    if not any(alive):
        return
    replaced = replace_dead(members, alive)
    for word in words:
        before, after = members[word * len(members) >> 32], replaced[word * len(replaced) >> 32]
        assert after not in dead
        assert before in dead or after == before


def test_the_flows_of_a_dead_member_are_shared_evenly() -> None:
    assert replace_dead((1, 2, 3), (True, False, True)) == (1, 1, 1, 3, 3, 3)
    assert Counter(replace_dead((1, 2, 3, 4), (True, False, True, True))) == {1: 4, 3: 4, 4: 4}


def ports_of_many_flows(tables: ForwardingTables) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return by which port each of many flows between racks leaves its leaf."""
    pairs = [(src, dst) for src in range(4) for dst in range(4, 16)]
    flows = [demand(CLOS, src, dst, qp) for src, dst in pairs for qp in range(100, 140)]
    return np.array([trace_path(CLOS, tables, one.src_port, one.flow).ports[1] for one in flows])


@pytest.mark.parametrize("names", [("leaf0:spine1",), ("leaf0:spine0", "leaf0:spine1"), ("spine3",)])
def test_a_fabric_moves_only_the_flows_of_the_dead_links_if_told_to(names: tuple[str, ...]) -> None:
    links = LinkState(dead_ports_of(CLOS, names))

    def moved(resilient: bool) -> tuple[int, int]:
        """Return how many flows took another port that need not have, and how many were on a dead link."""
        settings = RoutingSettings(links=links, resilient_hashing=resilient)
        tables = build_tables(CLOS, routing_scheme("e-ecmp"), hash_seed=3, settings=settings)
        before = ports_of_many_flows(tables_of("e-ecmp"))
        lived = ~np.isin(before, sorted(links.dead_ports))
        return int(np.count_nonzero((before != ports_of_many_flows(tables)) & lived)), int(np.count_nonzero(~lived))

    needless, victims = moved(resilient=True)
    assert needless == 0
    assert victims > 200
    assert moved(resilient=False)[0] > 100  # the negative control: without, a twelfth of all 1920 and more move too


def test_what_some_know_and_what_all_know_is_replaced_once() -> None:
    """A second replacement on top of the first multiplies: 32 members became 952,320 buckets."""
    spines = 32
    wide = build_clos(hosts_per_leaf=(1,) * 3, spines=spines, host_link=LINK, uplink=LINK)
    told = LinkState(dead_ports_of(wide, ["leaf0:spine1"]))
    noticed = LinkState(dead_ports_of(wide, ["leaf0:spine1", "leaf0:spine2", "leaf1:spine3"]))
    settings = RoutingSettings(links=noticed, resilient_hashing=True)

    def tables_with(knowledge: Knowledge) -> ForwardingTables:
        return build_tables(wide, routing_scheme("ecmp"), hash_seed=3, settings=settings, knowledge=knowledge)

    before, after = tables_with(Knowledge()), tables_with(Knowledge(adjacent=noticed, fabric=told))
    buckets = {len(group.members) for group in after.groups if len(group.members) > 1}
    assert buckets == {spines, spines * (spines - 1), spines * (spines - 2)}
    assert max(buckets) <= MAX_BUCKETS
    for leaf in wide.leaves:
        for slot in np.flatnonzero(before.fib[leaf.index] >= 0).tolist():
            old, new = before.group_at(leaf.index, slot), after.group_at(leaf.index, slot)
            assert old is not None
            assert new is not None
            dead = noticed.dead_ports if leaf in wide.leaves[:2] else frozenset[int]()
            assert not dead & set(new.members)
            times = len(new.members) // len(old.members)
            kept = [port for port in old.members if port in new.members]
            for place, port in enumerate(old.members):
                if port in kept:
                    assert set(new.members[place * times : (place + 1) * times]) == {port}
            assert max(new.weights().values()) - min(new.weights().values()) <= 1


@pytest.mark.parametrize("count", [33, 40, 700])
def test_buckets_are_bounded_and_shared_to_a_bucket(count: int) -> None:
    members = tuple(range(1, count + 1))
    replaced = replace_dead(members, [member % 9 != 0 for member in members])
    assert count <= len(replaced) <= MAX_BUCKETS
    weights = Counter(replaced).values()
    assert max(weights) - min(weights) <= 1


@pytest.mark.parametrize("resilient", [False, True])
def test_maps_have_room_for_every_step_of_scheduled_faults(resilient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compile_plan(
        load_scenario(f"""
name: room
fabric: {{kind: clos, leaves: 3, spines: 12, hosts_per_leaf: 2, host_link: {{rate: 100 Gbit/s, delay: 600 ns}}}}
workload: [{{collective: all_reduce, size: 1 MiB}}]
routing: {{scheme: e-ecmp, resilient_hashing: {str(resilient).lower()}, detection_time: 10 us, convergence_time: 15 us}}
faults:
  - {{at: 0 ns, link_down: "leaf2:spine7"}}
  - {{at: 10 us, link_down: "leaf0:spine1", for: 100 us}}
  - {{at: 20 us, link_down: "leaf1:spine2", for: 100 us}}
  - {{at: 27 us, switch_down: spine5, for: 100 us}}
time_dilation: 20000
"""),
        capacity_packets_per_s=None,
    )
    steps = [step.tables for step in plan.faults.steps]
    assert len(steps) > 8  # precondition
    groups, members, _ = count_rows(plan.topology, steps, any_failure=False)
    monkeypatch.setattr(layout, "read_overrides", lambda _: {})
    for name in ("write_overrides", "delete_overrides"):
        monkeypatch.setattr(layout, name, lambda *_: None)

    def write(order: list[ForwardingTables], members: int) -> None:
        arrays = SimpleNamespace(
            fib=np.full(steps[0].fib.size, -1, np.int32),
            groups=np.zeros(groups, layout.GROUP),
            members=np.zeros(members, np.uint32),
        )
        writer = TableWriter(plan.topology, arrays, -1, time_dilation=1.0)  # type: ignore[arg-type]
        for tables in order:
            writer.write(tables)

    for order in (steps, steps[::-1], steps[::2] + steps[::3], [one for step in steps for one in (step, steps[0])]):
        write(order, members)
    largest = max(sum(len(one.groups[index].members) for index in np.unique(one.fib) if index >= 0) for one in steps)
    with pytest.raises(LabError, match="no room"):  # the negative control: what the largest alone needs is too little
        write(steps, largest)


def test_maps_have_room_when_a_leaf_loses_its_last_entries() -> None:
    # A row says whether its switch has entries: without them the same groups are other rows.
    scheme, one_flow = routing_scheme("te"), RoutingSettings(traffic=(TRAFFIC[:1],))
    whole = build_tables(CLOS, scheme, hash_seed=3, settings=one_flow)
    (entry,) = whole.overrides.values()
    broken = LinkState(frozenset({entry, CLOS.port(entry).peer}))
    stale = build_tables(CLOS, scheme, hash_seed=3, settings=one_flow, knowledge=Knowledge(broken, broken))
    assert not stale.overrides  # precondition
    writer = TableWriter(CLOS, None, -1, time_dilation=1.0)  # type: ignore[arg-type]  # it packs, and writes nothing
    rows = {writer._packed(one)[index] for one in (whole, stale) for index in np.unique(one.fib).tolist() if index >= 0}
    groups = {one.groups[index] for one in (whole, stale) for index in np.unique(one.fib).tolist() if index >= 0}
    assert len(rows) > len(groups)
    room, members, entries = count_rows(CLOS, [whole, stale], any_failure=False)
    assert room >= len(rows)
    assert members >= sum(len(row[0]) for row in rows)
    assert entries == 1
