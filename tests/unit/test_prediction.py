"""`testbed predict`: the model over many hash seeds, against the plan's own prediction and the published figures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from testbed.cli.main import app
from testbed.errors import PlanError
from testbed.plan import prediction
from testbed.plan.compile import compile_plan
from testbed.plan.prediction import RatioSpread, predict
from testbed.routing import (
    ROUTING_SCHEMES,
    FlowKey,
    ForwardingTables,
    Group,
    HashField,
    LinkState,
    RoutingSettings,
    Selector,
    build_tables,
    dead_ports_of,
    fair_share,
    max_min_rates,
    routing_scheme,
    trace_routes,
)
from testbed.routing.seeds import tables_of_seeds
from testbed.routing.spread import Flows, Tracer
from testbed.routing.tables import TablesBuilder, route_downwards, route_upwards
from testbed.scenario import Scenario, load_scenario
from testbed.topology import LinkSpec, Topology, build_clos

ROOT = Path(__file__).parents[2]

TEXT = """
name: prediction
fabric: {kind: clos, leaves: 4, spines: 4, hosts_per_leaf: 4, host_link: {rate: 400 Gbit/s, delay: 600 ns}}
workload: [{collective: all_reduce, size: 4 MiB}]
routing: {scheme: e-ecmp}
time_dilation: 20000
"""
QPS = "transport.qps_per_connection={}".format
SETTINGS = RoutingSettings(flowlet_gap_ns=1000)


def scenario_of(*overrides: str) -> Scenario:
    return load_scenario(TEXT, list(overrides))


def predicted(*overrides: str, seeds: int = 200, links_down: tuple[str, ...] = ()) -> RatioSpread:
    return predict(scenario_of(*overrides), seeds=seeds, links_down=links_down).ratios


def clos(leaves: int, hosts: int, spines: int) -> Topology:
    link = LinkSpec(400_000_000_000, 600)
    return build_clos(hosts_per_leaf=[hosts] * leaves, spines=spines, host_link=link, uplink=link)


def random_flows(topology: Topology, count: int, rng: np.random.Generator) -> Flows:
    hosts = len(topology.hosts)
    src = rng.integers(hosts, size=count)
    dst = (src + rng.integers(1, hosts, size=count)) % hosts
    address = np.array([nic.address for nic in topology.nics])
    port = np.array([nic.id for nic in topology.nics])
    keys = np.column_stack(
        [address[src], address[dst], rng.integers(2**16, size=count), np.full(count, 4791), np.full(count, 17)]
    )
    return Flows(port[src], np.column_stack([keys, rng.integers(2**24, size=count)]).astype(np.uint32))


# --- the published figures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spines", "means"),
    [(4, (2.66, 2.18, 1.83, 1.57, 1.40, 1.28)), (8, (2.19, 1.65, 1.28, 1.07, 1.00, 1.00))],
    ids=["1:1", "1:2"],
)
def test_means_are_those_of_the_published_model(spines: int, means: tuple[float, ...]) -> None:
    # 4 racks x 4 NICs, a ring whose every hop crosses the spines, split over queue pairs: facts.md section 3.
    for qps, mean in zip((1, 2, 4, 8, 16, 32), means, strict=True):
        ratios = predicted(f"fabric.spines={spines}", QPS(qps), seeds=2000)
        assert ratios.cct_ratio_mean == pytest.approx(mean, abs=0.05), qps
        assert ratios.cct_ratio_min <= ratios.cct_ratio_p5 <= ratios.cct_ratio_p95 <= ratios.cct_ratio_max


def test_queue_pairs_without_entropy_of_their_own_gain_nothing() -> None:
    one = predicted("routing.scheme=ecmp", QPS(1), seeds=1000)
    control = predicted("routing.scheme=ecmp", QPS(16), "transport.udp_source_port=per_pair", seeds=1000)
    assert 0.9 <= control.cct_ratio_mean / one.cct_ratio_mean <= 1.1
    # The same queue pairs do gain where the hash reads them.
    by_qp = predicted(QPS(16), "transport.udp_source_port=per_pair", seeds=1000)
    assert by_qp.cct_ratio_mean < 0.6 * one.cct_ratio_mean


def test_one_lost_uplink_costs_pinning_more_than_many_queue_pairs_and_less_than_one() -> None:
    lost = ("leaf0:spine1",)
    spray, many, pinning, one = (
        predicted(f"routing.scheme={scheme}", QPS(qps), links_down=lost).cct_ratio_mean
        for scheme, qps in (("spray", 1), ("e-ecmp", 16), ("pinning", 1), ("ecmp", 1))
    )
    assert spray < many < pinning < one
    assert spray == pytest.approx(4 / 3)  # four NICs' traffic over three uplinks
    assert pinning == pytest.approx(2.0)  # the displaced flow joins another


def test_pinning_suits_full_racks_and_not_destinations_of_one_slice() -> None:
    assert predicted("routing.scheme=pinning").cct_ratio_max <= 1.03
    # Rack 0's hosts belong to two jobs, whose next hops are the first halves of racks 1 and 2.
    flows = ", ".join(f"{{src: {src}, dst: {dst}, size: 1 MiB}}" for src, dst in ((0, 4), (1, 5), (2, 8), (3, 9)))
    assert predicted("routing.scheme=pinning", f"workload=[{{pattern: flows, flows: [{flows}]}}]").cct_ratio_min == 2.0


# --- the same model as the plan's ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (QPS(1),),
        (QPS(4), "workload[0].size=100 kB"),
        (QPS(3), "transport.qp_strategy=round_robin"),
        (QPS(4), "transport.qp_strategy=dynamic"),
        ("workload[0]={collective: all_to_all, size: 1 MiB, algorithm: pairwise}",),
        ("workload[0]={collective: broadcast, size: 1 MiB}",),
        ("workload[0]={collective: all_reduce, size: 1 MiB, algorithm: double_binary_tree}", QPS(2)),
        ("workload[0]={pattern: permutation, size: 1 MiB}", "fabric.uplink.rate=100 Gbit/s"),
        ("workload[0]={pattern: incast, size: 1 MiB, fan_in: 7}",),
        ("routing.scheme=te", "workload[0].order=random"),
        ("routing.scheme=adaptive", "workload[0].order=packed"),
        ("routing.scheme=flowlet", "routing.flowlet_gap=10 us"),
        ("fabric.gpus_per_host=4", "fabric.nics_per_host=2", "workload[0].algorithm=hierarchical"),
        ("fabric.gpus_per_host=2", "fabric.nvlink.rate=10 Gbit/s", "workload[0].order=packed"),
    ],
    ids=" ".join,
)
def test_every_seed_is_what_the_plan_predicts_for_it(overrides: tuple[str, ...]) -> None:
    found = predict(scenario_of("fabric.hosts_per_leaf=2", *overrides), seeds=3, per_seed=True)
    plans = [
        compile_plan(
            scenario_of("fabric.hosts_per_leaf=2", *overrides, f"routing.hash_seed={seed}"), capacity_packets_per_s=None
        )
        for seed in (1, 2, 3)
    ]
    np.testing.assert_allclose(
        found.ratios.cct_ratios, [plan.workloads[0].predicted_cct_ratio for plan in plans], rtol=1e-9
    )


@pytest.mark.parametrize("name", sorted(ROUTING_SCHEMES))
@pytest.mark.parametrize("down", [(), ("leaf0:spine1",), ("spine2", "leaf1:spine0")], ids=str)
def test_ways_of_many_flows_and_seeds_are_those_of_each(name: str, down: tuple[str, ...]) -> None:
    topology = clos(3, 3, 4)
    flows = random_flows(topology, 60, np.random.default_rng(5))
    links = LinkState(dead_ports=dead_ports_of(topology, down))
    given_settings = RoutingSettings(flowlet_gap_ns=1000, links=links)

    def build(seed: int) -> ForwardingTables:
        return build_tables(topology, routing_scheme(name), hash_seed=seed, settings=given_settings)

    seeds = [0, 1, 7, 2**32 - 1]
    tracer, checked = Tracer(topology, flows), 0
    for seeded in tables_of_seeds(build, seeds, batch=3):
        traced = tracer.trace(seeded)
        for index, seed in enumerate(seeded.seeds):
            tables = build(seed)
            assert seeded.one(index) == tables
            for flow in range(len(flows)):
                rows = np.flatnonzero((traced.seed == index) & (traced.flow == flow))
                ways = [
                    (tuple(traced.ports[traced.ports[:, row] > 0, row].tolist()), traced.share[row]) for row in rows
                ]
                routes = trace_routes(topology, tables, int(flows.src_port[flow]), flows.key(flow))
                assert ways == [(route.path.ports, pytest.approx(route.share)) for route in routes]
                checked += 1
    assert checked == len(seeds) * len(flows)


class Whimsical:
    """Uses its seed in a way that no other scheme does: to choose the uplinks, not to hash."""

    name = "whimsical"
    summary = "uses the uplink that its seed names"

    def __init__(self) -> None:
        self.built = 0

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = SETTINGS
    ) -> ForwardingTables:
        self.built += 1
        builder = TablesBuilder(topology)
        route_downwards(builder, topology)

        def group(leaf: object, other: object) -> Group:
            ports = topology.uplinks(leaf)  # type: ignore[arg-type]
            return Group(Selector.HASH, HashField.FIVE_TUPLE, 5, (ports[hash_seed % len(ports)].id,))

        route_upwards(builder, topology, group)
        return builder.build()


def test_a_scheme_is_asked_twice_unless_it_uses_its_seed_for_more_than_hashing() -> None:
    topology = clos(2, 1, 4)
    flows = random_flows(topology, 3, np.random.default_rng(1))
    for scheme, built in ((Whimsical(), 12), (routing_scheme("ecmp"), 2)):
        calls: list[int] = []

        def build(seed: int, scheme=scheme, calls=calls) -> ForwardingTables:  # type: ignore[no-untyped-def]
            calls.append(seed)
            return scheme.build_tables(topology, hash_seed=seed)

        found = list(tables_of_seeds(build, range(10), batch=4))
        assert [seed for seeded in found for seed in seeded.seeds] == list(range(10))
        assert len(calls) == built
        for seeded in found:
            for index, seed in enumerate(seeded.seeds):
                want = scheme.build_tables(topology, hash_seed=seed)
                (route,) = trace_routes(topology, want, int(flows.src_port[0]), flows.key(0))
                traced = Tracer(topology, flows).trace(seeded)
                assert tuple(traced.ports[:, (traced.seed == index) & (traced.flow == 0)][:, 0]) == route.path.ports


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_fair_shares_of_several_seeds_are_those_of_each(data: st.DataObject) -> None:
    nports, seeds = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    capacity = np.array([np.inf, *(data.draw(st.sampled_from([1.0, 3.0, 0.7, np.inf])) for _ in range(nports))])
    one_way = st.lists(st.integers(1, nports), min_size=1, max_size=3, unique=True)
    ways = [(seed, data.draw(one_way)) for seed in range(seeds) for _ in range(data.draw(st.integers(1, 6)))]
    weights = np.array([data.draw(st.sampled_from([1.0, 2.0, 0.5])) for _ in ways])
    ports = np.zeros((3, len(ways)), np.int64)
    for way, (_, crossed) in enumerate(ways):
        ports[: len(crossed), way] = crossed
    seed_of = np.array([seed for seed, _ in ways])
    rates = fair_share.max_min_rates(ports, seed_of, weights, capacity)
    for seed in range(seeds):
        mine = np.flatnonzero(seed_of == seed)
        want = max_min_rates([ways[way][1] for way in mine], capacity, weights[mine].tolist())
        np.testing.assert_allclose(rates[mine], want, rtol=1e-9)


# --- what it refuses, and what it prints ---------------------------------------------------------------


def test_what_is_cut_off_and_what_does_not_exist_are_named() -> None:
    with pytest.raises(PlanError, match="no link or node 'leaf0:spine9'"):
        predicted(links_down=("leaf0:spine9",))
    with pytest.raises(PlanError, match="leaf0 has no route from host0 to host4"):
        predicted(links_down=tuple(f"leaf0:spine{spine}" for spine in range(4)))
    with pytest.raises(PlanError, match="at least 1 hash seed"):
        predicted(seeds=0)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem)
        for path in sorted((ROOT / "scenarios").rglob("*.yaml"))
        if path.stem != "dc-24k" and path.parent.name != "applications"  # takes its time; cannot be predicted
    ],
)
def test_every_scenario_that_comes_with_the_project_has_a_prediction(path: Path) -> None:
    found = predict(load_scenario(path), seeds=2)
    assert found.items
    assert found.ratios.cct_ratio_min > 0.999
    for phase in found.phases:
        assert (phase.ratios is None) == bool(phase.cut_off)


def test_a_loop_in_the_tables_is_named() -> None:
    topology = clos(2, 1, 1)
    (leaf0, leaf1), (spine,) = topology.leaves, topology.spines
    builder = TablesBuilder(topology)
    route_downwards(builder, topology)
    slot = topology.slot_of_port(topology.host_port(1).id)
    builder.route(leaf0.index, slot, Group(Selector.HASH, HashField(0), 0, (topology.uplinks(leaf0)[0].id,)))
    builder.route(leaf1.index, slot, Group(Selector.HASH, HashField(0), 0, (topology.uplinks(leaf1)[0].id,)))
    assert spine
    source, target = topology.host_port(0), topology.host_port(1)
    key = FlowKey(source.address, target.address, 1, 4791, 17, 2)
    flows = Flows(np.array([source.id]), np.array([key], np.uint32))
    (seeded,) = tables_of_seeds(lambda _: builder.build(), [1], batch=1)
    with pytest.raises(PlanError, match="loop from host0 to host1"):
        Tracer(topology, flows).trace(seeded)


def test_the_worst_item_counts_and_the_first_seed_is_the_scenarios_own() -> None:
    two = predict(
        scenario_of(
            "workload=[{collective: all_reduce, size: 1 MiB}, {collective: all_reduce, size: 1 MiB, order: packed}]"
        ),
        seeds=20,
        per_seed=True,
    )
    assert two.ratios.cct_ratios == tuple(
        max(pair) for pair in zip(*(item.ratios.cct_ratios or () for item in two.items), strict=True)
    )
    later = predict(scenario_of("routing.hash_seed=2"), seeds=2, per_seed=True)
    assert later.ratios.cct_ratios == predict(scenario_of(), seeds=3, per_seed=True).ratios.cct_ratios[1:]  # type: ignore[index]


def test_json_has_the_figures_at_the_top_and_seeds_on_request(tmp_path: Path) -> None:

    file = tmp_path / "one.yaml"
    file.write_text(TEXT)
    done = CliRunner().invoke(app, ["predict", str(file), "--seeds", "5", "--format", "json"])
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert {"cct_ratio_mean", "cct_ratio_p5", "cct_ratio_p95", "hash_seed", "seeds", "items"} <= report.keys()
    assert "cct_ratios" not in report
    assert report["items"][0]["cct_ratio_mean"] == report["cct_ratio_mean"]
    done = CliRunner().invoke(app, ["predict", str(file), "--seeds", "5", "--format", "json", "--per-seed"])
    assert len(json.loads(done.stdout)["cct_ratios"]) == 5
    shown = CliRunner().invoke(app, ["predict", str(file), "--seeds", "2", "--per-seed"]).stdout
    assert "hash seeds 1 to 2" in shown
    assert "mean" in shown


# --- traffic without a schedule ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "tolerance"),
    [
        ("{collective: all_reduce, size: 1 MiB}", 1e-9),
        ("{collective: all_gather, size: 1 MiB, order: random}", 1e-9),
        ("{collective: reduce_scatter, size: 1 MiB}", 1e-9),
        ("{collective: send_recv, size: 1 MiB}", 1e-9),
        # Its pipeline fills and drains, which steady traffic leaves out of both times.
        ("{collective: all_reduce, algorithm: hierarchical, size: 1 MiB}", 0.02),
    ],
)
@pytest.mark.parametrize("strategy", ["split", "dynamic"])
def test_steady_traffic_stands_for_the_schedule(
    item: str, tolerance: float, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = scenario_of(
        "fabric.gpus_per_host=2",
        "fabric.nics_per_host=2",
        QPS(4),
        f"transport.qp_strategy={strategy}",
        f"workload=[{item}]",
    )
    followed = predict(scenario, seeds=5, per_seed=True)
    monkeypatch.setattr(prediction, "MAX_SCHEDULE_RANKS", 0)
    steady = predict(scenario, seeds=5, per_seed=True)
    np.testing.assert_allclose(steady.ratios.cct_ratios, followed.ratios.cct_ratios, rtol=tolerance)  # type: ignore[arg-type]
    assert steady.items[0].flows == followed.items[0].flows
    assert steady.items[0].connections == followed.items[0].connections


# --- jobs ------------------------------------------------------------------------------------------------


JOBS = ROOT / "scenarios" / "jobs"


@pytest.mark.parametrize("file", ["fragmented", "fragmented-doubled", "full-racks"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("routing.scheme=e-ecmp", QPS(3), "transport.udp_source_port=per_pair"),
        ("routing.scheme=te", QPS(2)),
        ("routing.scheme=ecmp", QPS(2), "jobs[1].start=100 us"),
    ],
    ids=" ".join,
)
def test_jobs_are_what_the_plan_predicts_for_them(file: str, overrides: tuple[str, ...]) -> None:
    def load(seed: int) -> Scenario:
        return load_scenario(JOBS / f"{file}.yaml", [*overrides, f"routing.hash_seed={seed}"])

    found = predict(load(7), seeds=2, per_seed=True)
    for number, seed in enumerate((7, 8)):
        together = compile_plan(load(seed), capacity_packets_per_s=None).workloads[-1]
        for item, job in zip(found.items, together.jobs, strict=True):
            assert item.job == job.name
            assert item.ratios.cct_ratios is not None
            assert item.ratios.cct_ratios[number] == pytest.approx(job.predicted_cct_ratio, rel=1e-9)


def test_half_racks_cost_pinning_what_twice_the_uplinks_give_back() -> None:
    full, fragmented, doubled = (
        predict(load_scenario(JOBS / f"{file}.yaml"), seeds=2).ratios.cct_ratio_mean
        for file in ("full-racks", "fragmented", "fragmented-doubled")
    )
    assert full <= 1.03
    assert fragmented > 1.3 * full
    assert doubled <= 1.03


# --- faults ----------------------------------------------------------------------------------------------


def test_faults_that_stand_are_in_the_figures_and_those_that_come_have_phases() -> None:
    lost = "{at: 0 us, link_down: 'leaf0:spine1'}"
    standing = predict(scenario_of(f"faults=[{lost}]"), seeds=3, per_seed=True)
    assert standing.ratios == predict(scenario_of(), seeds=3, per_seed=True, links_down=("leaf0:spine1",)).ratios
    assert not standing.phases

    coming = "{at: 20 us, link_down: 'leaf0:spine1', for: 10 ms}"
    timed = predict(
        scenario_of("routing.scheme=pinning", f"faults=[{coming}]", "routing.detection_time=10 us"), seeds=2
    )
    assert timed.ratios.cct_ratio_mean == pytest.approx(1.0)
    states = [
        (phase.at_ns, bool(phase.broken), phase.ratios and round(phase.ratios.cct_ratio_mean)) for phase in timed.phases
    ]
    assert states[0] == (0, False, 1)
    assert states[1] == (20_000, True, None)  # nobody knows yet: a flow is cut off
    assert "leaf0/up1, whose link is down" in timed.phases[1].cut_off
    # The leaf knows, the others send into the spine that has no way down, until they are told.
    assert (30_000, True) in [state[:2] for state in states]
    assert (True, 2) in [state[1:] for state in states]
    assert states[-1][1:] == (False, 1)


def test_what_stands_from_the_beginning_is_broken_in_the_first_phase_and_what_passes_is_not() -> None:
    standing = "{at: 0 us, link_down: 'leaf0:spine1'}"
    passing = "{at: 0 us, link_down: 'leaf1:spine2', for: 20 us}"
    phases = predict(scenario_of(f"faults=[{standing}, {passing}]", "routing.detection_time=10 us"), seeds=2).phases
    assert [(phase.at_ns, phase.broken) for phase in phases[:2]] == [
        (0, ("link_down leaf0:spine1",)),
        (0, ("link_down leaf0:spine1", "link_down leaf1:spine2")),
    ]


def test_a_fabric_whose_one_switch_dies_has_a_phase_without_a_way() -> None:
    star = load_scenario(ROOT / "scenarios/faults/star-dies.yaml")
    last = predict(star, seeds=2).phases[-1]
    assert last.ratios is None
    assert last.cut_off == "switch0 has no route from host0 to host1"
    for scheme in sorted(ROUTING_SCHEMES):
        gap = ["routing.flowlet_gap=10 us"] if scheme == "flowlet" else []
        other = load_scenario(ROOT / "scenarios/star.yaml", [f"routing.scheme={scheme}", "expect=[]", *gap])
        with pytest.raises(PlanError, match="switch0 has no route"):
            predict(other, seeds=2, links_down=("switch0",))


def test_a_slow_link_counts_with_what_it_has_left() -> None:
    slow = "{at: 0 us, rate: {link: 'leaf0:spine1', rate: 100 Gbit/s}}"
    scenario = scenario_of("routing.scheme=pinning", f"faults=[{slow}]")
    assert predict(scenario, seeds=2).ratios.cct_ratio_mean == pytest.approx(4.0)
    plan = compile_plan(scenario, capacity_packets_per_s=None)
    assert plan.workloads[0].predicted_cct_ratio == pytest.approx(4.0)


# --- size ------------------------------------------------------------------------------------------------


def test_what_is_too_large_to_emulate_is_predicted_and_not_planned() -> None:
    large = scenario_of(
        "fabric.leaves=300", "fabric.hosts_per_leaf=4", "workload[0].size=1 GiB", "routing.scheme=pinning"
    )
    assert predict(large, seeds=2).ratios.cct_ratio_mean == pytest.approx(1.0)
    with pytest.raises(
        PlanError, match=r"fabric\.hosts_per_leaf: 1200 hosts are too many to emulate: at most 1024"
    ) as caught:
        compile_plan(large, capacity_packets_per_s=None)
    assert "testbed predict" in str(caught.value.hint)
    leaves = scenario_of("fabric.leaves=300", "fabric.hosts_per_leaf=1", "workload[0].size=1 GiB")
    with pytest.raises(PlanError, match=r"fabric\.leaves: 300 leaves are too many to emulate: at most 256"):
        compile_plan(leaves, capacity_packets_per_s=None)


def test_a_schedule_that_cannot_be_followed_is_refused() -> None:
    large = scenario_of(
        "fabric.leaves=300", "fabric.hosts_per_leaf=4", "workload[0]={collective: broadcast, size: 1 GiB}"
    )
    with pytest.raises(PlanError, match=r"broadcast .ring. among 1200 ranks cannot be predicted"):
        predict(large, seeds=1)


@pytest.mark.slow
def test_24_576_gpus_are_predicted_within_a_minute() -> None:
    start = time.process_time()
    found = predict(load_scenario(ROOT / "scenarios" / "predict" / "dc-24k.yaml"), seeds=20)
    assert time.process_time() - start < 60
    assert found.items[0].flows == 24_576 * 16
    assert found.ratios.cct_ratio_mean > 1


INCAST = "{pattern: incast, fan_in: 4, size: 2 MiB}"
SAME_AS_FLOWS = f"{{pattern: flows, flows: [{', '.join(f'{{src: {src}, dst: 9, size: 2 MiB}}' for src in range(4))}]}}"


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        (("transport.admission.scheme=cts",), "transport.admission: cts"),
        (("qos.priorities=[{priority: 4, weight: 3}]",), "qos.priorities"),
        (("qos.pfc.enabled=true",), "qos.pfc: pauses"),
        (("transport.congestion_control=timely",), "transport.congestion_control: timely"),
        ((f"workload=[{INCAST}]", "fabric.switch.buffer=5 MiB"), "drops: without PFC, senders can pile up 6 MiB"),
        ((f"workload=[{INCAST}]", "fabric.switch.port_buffer=5 MiB"), "drops: without PFC"),
        (
            (f"workload=[{SAME_AS_FLOWS}]", "fabric.switch.buffer=5 MiB"),
            "drops: without PFC, senders can pile up 6 MiB",
        ),
        ((f"workload=[{INCAST}]", "fabric.switch.buffer=5 MiB", "qos.pfc.enabled=true"), "qos.pfc: pauses"),
        (("fabric.host_link.loss=1/1000",), "lost frames"),
        (("fabric.uplink={loss: 1/1000}",), "lost frames"),
        (('fabric.lossy_links=[{link: "leaf0:spine1", fraction: 1/100}]',), "lost frames"),
        (('faults=[{at: 1 us, loss: {link: "leaf0:spine1", fraction: 1/100}}]',), "lost frames"),
        (("faults=[{at: 1 us, slow_receiver: {host: host1, rate: 100 Gbit/s}}]",), "slow receivers"),
        (("routing.scheme=spray",), "routing.scheme: spray"),
        (("workload=[{pattern: flows, flows: [{src: 0, dst: 4, size: 1 MiB, start: 1 us}]}]",), "start times"),
    ],
)
def test_a_prediction_says_what_of_the_scenario_it_leaves_out(overrides: tuple[str, ...], left_out: str) -> None:
    (line,) = predict(scenario_of(*overrides), seeds=1).left_out
    assert line.startswith(left_out)


def test_a_prediction_that_leaves_nothing_out_says_nothing(tmp_path: Path) -> None:
    assert predict(scenario_of("routing.scheme=spray", "transport.loss_recovery=selective"), seeds=1).left_out == ()
    assert predict(scenario_of(f"workload=[{INCAST}]", "fabric.switch.buffer=6 MiB"), seeds=1).left_out == ()
    file = tmp_path / "scenario.yaml"
    file.write_text(TEXT)
    assert "left out" not in CliRunner().invoke(app, ["predict", str(file), "--seeds", "1"]).stdout
    shown = (
        CliRunner()
        .invoke(app, ["predict", str(file), "--seeds", "1", "--set", "transport.admission.scheme=cts"])
        .stdout
    )
    assert "# left out: transport.admission: cts" in shown
