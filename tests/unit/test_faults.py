"""Faults as a timeline, what routing makes of them, what is seen of their victims, and rules of the file."""

from __future__ import annotations

import numpy as np
import pytest

from testbed.engine.faults import Faults, Watch, recovery_ns
from testbed.errors import PlanError, ScenarioError
from testbed.plan.compile import compile_plan
from testbed.plan.faults import broken_at
from testbed.plan.model import Plan
from testbed.plan.report import describe_plan
from testbed.plan.victims import find_victims
from testbed.routing import dead_ports_of
from testbed.scenario import load_scenario

TEXT = """
name: faults
fabric: {kind: clos, leaves: 4, spines: 4, hosts_per_leaf: 4, host_link: {rate: 400 Gbit/s, delay: 600 ns}}
routing: {scheme: pinning, detection_time: 1 us, convergence_time: 3 us, te_loop_time: 10 us}
workload: [{collective: all_reduce, size: 1 MiB}]
time_dilation: 20000
"""


def plan_of(*faults: str, scheme: str = "pinning") -> Plan:
    overrides = [f"faults=[{', '.join(faults)}]", f"routing.scheme={scheme}"]
    return compile_plan(load_scenario(TEXT, overrides), capacity_packets_per_s=None)


def dead_names(plan: Plan, step: int) -> set[str]:
    dead = plan.faults.steps[step].state.dead_ports
    return {link.name for link in plan.topology.links if {link.a, link.b} <= dead}


def test_routing_follows_in_three_steps() -> None:
    plan = plan_of('{at: 20 us, link_down: "leaf0:spine1"}', scheme="te")
    assert [step.at_ns for step in plan.faults.steps] == [0, 20_000, 21_000, 23_000, 30_000]
    dead = dead_ports_of(plan.topology, ["leaf0:spine1"])
    entries = [set(step.tables.overrides.values()) & dead for step in plan.faults.steps]
    assert entries[0]
    assert entries[1] == entries[0]
    assert not entries[4]
    assert len(plan.faults.steps[4].tables.overrides) == len(plan.faults.steps[0].tables.overrides)
    assert plan.tables is plan.faults.steps[0].tables


def test_what_heals_comes_back_as_late_as_it_went() -> None:
    plan = plan_of('{at: 20 us, for: 50 us, link_down: "leaf0:spine1"}')
    steps = plan.faults.steps
    assert [(step.at_ns, bool(step.state.dead_ports)) for step in steps] == [
        (0, False),
        (20_000, True),
        (21_000, True),
        (23_000, True),
        (70_000, False),
        (73_000, False),
    ]
    # What the routing protocol still says keeps the leaf from it too, which is no step at 71 us: all go back at once.
    leaf0 = plan.topology.leaves[0].index
    assert steps[-1].tables is steps[0].tables
    groups = [[step.tables.group_at(leaf0, slot) for slot in range(4, 16)] for step in steps]
    assert groups[-2] == groups[-3] == groups[2] != groups[0]


def test_faults_overlap_and_heal_ends_those_of_its_target() -> None:
    plan = plan_of(
        '{at: 10 us, for: 100 us, link_down: "leaf0:spine1"}',
        "{at: 20 us, switch_down: spine1}",
        "{at: 40 us, heal: spine1}",
        '{at: 50 us, rate: {link: "leaf0:spine1", rate: 100 Gbit/s}}',
        '{at: 50 us, rate: {link: "leaf0:spine1", rate: 50 Gbit/s}}',
        '{at: 60 us, loss: {link: "leaf2:spine1", fraction: 1/2}}',
        '{at: 60 us, loss: {link: "leaf2:spine1", fraction: 1/2}}',
    )
    by_time = {step.at_ns: index for index, step in enumerate(plan.faults.steps)}
    assert dead_names(plan, by_time[10_000]) == {"leaf0:spine1"}
    assert len(dead_names(plan, by_time[20_000])) == 4
    assert dead_names(plan, by_time[40_000]) == {"leaf0:spine1"}
    assert dead_names(plan, by_time[110_000]) == set()
    last = plan.faults.steps[-1].state
    assert {rate for _, rate in last.rates_bits_per_s} == {50_000_000_000}
    assert {float(loss) for _, loss in last.losses} == {0.75}
    assert broken_at(plan.faults.incidents, 30_000) == [
        "link_down leaf0:spine1 since 10 us",
        "switch_down spine1 since 20 us",
    ]


def test_a_flapping_link_goes_down_again_and_again_until_it_is_healed() -> None:
    flap = '{at: 10 us, for: 100 us, flap: {link: "leaf0:spine1", down: 5 us, up: 15 us}}'
    plan = plan_of(flap)
    downs = [one.begin_ns for one in plan.faults.incidents]
    assert downs == [10_000, 30_000, 50_000, 70_000, 90_000]
    healed = plan_of(flap, '{at: 32 us, heal: "leaf0:spine1"}')
    windows = [(one.begin_ns, one.end_ns) for one in healed.faults.incidents if not one.mends]
    assert windows == [(10_000, 15_000), (30_000, 32_000)]


def test_what_is_broken_from_the_beginning_is_in_the_plan() -> None:
    healthy, broken = plan_of(), plan_of('{at: 0 ns, link_down: "leaf0:spine1"}')
    assert not broken.faults.is_eventful
    assert not dead_ports_of(broken.topology, ["leaf0:spine1"]) & {
        port for path in broken.workloads[0].paths for port in path.ports
    }
    assert healthy.workloads[0].predicted_cct_ratio == pytest.approx(1.0)
    assert broken.workloads[0].predicted_cct_ratio == pytest.approx(2.0)
    assert broken.workloads[0].ideal_cct_ns == healthy.workloads[0].ideal_cct_ns
    slow = plan_of('{at: 0 ns, rate: {link: "leaf0:spine1", rate: 100 Gbit/s}}')
    assert slow.workloads[0].predicted_cct_ratio == pytest.approx(4.0)
    assert plan_of('{at: 0 ns, for: 1 s, link_down: "leaf0:spine1"}').faults.is_eventful


def test_a_slow_receiver_slows_the_leafs_port_before_it() -> None:
    plan = plan_of("{at: 0 ns, slow_receiver: {host: host5, rate: 100 Gbit/s}}")
    topology = plan.topology
    assert plan.faults.steps[0].state.rates_bits_per_s == ((topology.host_port(5).peer, 100_000_000_000),)
    assert plan.workloads[0].predicted_cct_ratio == pytest.approx(4.0)
    assert plan.tables == plan_of().tables
    with pytest.raises(PlanError, match=r"faults\[0\].slow_receiver.host: must be a host of the fabric"):
        plan_of("{at: 0 ns, slow_receiver: {host: leaf0, rate: 100 Gbit/s}}")


def test_a_rack_cut_off_from_the_beginning_cannot_be_planned() -> None:
    with pytest.raises(PlanError, match="leaves no way between ranks"):
        plan_of("{at: 0 ns, switch_down: leaf1}")
    plan_of("{at: 1 us, switch_down: leaf1}")


def test_victims_are_those_whose_data_or_answers_cross_it() -> None:
    plan = plan_of('{at: 20 us, link_down: "leaf0:spine1"}', '{at: 30 us, heal: "leaf0:spine1"}')
    (found,) = find_victims(plan, 0)
    dead = dead_ports_of(plan.topology, ["leaf0:spine1"])
    data = [bool(dead & set(path.ports)) for path in plan.workloads[0].paths]
    assert (found.victims | ~np.array(data)).all()
    assert found.victims.sum() > sum(data)  # answers of others
    assert found.moved >= sum(data) > 0
    assert len(found.detours) == found.moved


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("{at: 1 us}", "must say one thing that happens, not none"),
        ("{at: 1 us, switch_down: spine0, heal: spine0}", "not switch_down and heal"),
        ("{at: 1 us, for: 1 us, heal: spine0}", "does not go with"),
        ('{at: 1 us, flap: {link: "leaf0:spine0", down: 1 us, up: 1 us}}', "is required by"),
        ('{at: 1 us, for: 1 s, flap: {link: "leaf0:spine0", down: 1 us, up: 1 us}}', "at most 1000 times"),
        ("{at: 1 us, for: 0 ns, switch_down: spine0}", "for"),
    ],
)
def test_mistakes_in_the_file(fault: str, rule: str) -> None:
    with pytest.raises(ScenarioError, match=rule):
        load_scenario(TEXT, [f"faults=[{fault}]"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            '{at: 1 us, link_down: "leaf9:spine0"}',
            r'faults\[0\].link_down: must be a link of the fabric, got "leaf9:spine0"',
        ),
        ("{at: 1 us, switch_down: host0}", r'faults\[0\].switch_down: must be a switch of the fabric, got "host0"'),
        ('{at: 1 us, rate: {link: "spine0", rate: 1 Gbit/s}}', r"faults\[0\].rate.link: must be a link"),
        ("{at: 1 us, heal: leaf7}", r"faults\[0\].heal: must be a link or node"),
    ],
)
def test_names_that_the_fabric_lacks(fault: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(fault)


def test_recovery_is_from_the_fault_to_the_first_window_at_half_the_rate() -> None:
    seen = np.arange(0, 100_001, 1000)
    rate = np.where(seen < 20_000, 2.0, np.where(seen < 50_000, 0.0, 1.5))
    nbytes = np.concatenate(([0], np.cumsum(rate[:-1] * 1000))).astype(np.int64)
    found = recovery_ns(seen, nbytes, fault_ns=20_000, window_ns=6000)
    # Two thirds of a window at 1.5 are half of one at 2: it begins a third of a window before they go again.
    assert found is not None
    assert abs(found - 28_000) <= 1000
    # What is delivered at first, out of buffers, is no recovery.
    assert recovery_ns(seen, nbytes, fault_ns=15_000, window_ns=6000) == found + 5000
    assert recovery_ns(seen, 2 * seen, fault_ns=10_000, window_ns=6000) == 0
    assert recovery_ns(seen[:40], nbytes[:40], fault_ns=20_000, window_ns=6000) is None
    assert recovery_ns(seen, np.zeros_like(seen), fault_ns=20_000, window_ns=6000) is None


class Effects:
    def __init__(self) -> None:
        self.applied: list[tuple[int, int]] = []

    def apply(self, step: int, now_ns: int) -> None:
        self.applied.append((step, now_ns))


def test_steps_happen_at_their_time_and_are_undone_at_the_end() -> None:
    effects, payload = Effects(), np.zeros(2, np.int64)
    lost = np.zeros((5, 8), np.uint64)
    watch = Watch(200, np.array([True, False]), np.array([3]))
    rates = [np.full(5, float(number)) for number in range(3)]
    faults = Faults([0, 200, 300], rates, effects, watches=[watch], lost_packets=lost, wall_window_ns=100)
    for _ in range(2):
        effects.applied.clear()
        faults.begin(1000)
        changes = []
        for now in range(1000, 1500, 50):
            payload += 10
            lost[3, 3] += 1
            changes.append(faults.tick(now, payload))
        assert effects.applied == [(1, 1200), (2, 1300)]
        assert [None if one is None else float(one[0]) for one in changes] == [None] * 4 + [1.0, None, 2.0] + [None] * 3
        back = faults.end(1500)
        assert back is not None
        assert float(back[0]) == 0.0
        assert effects.applied[-1] == (0, 1500)
        (sighting,) = faults.sightings()
        assert sighting.happened
        assert sighting.wall_recovery_ns == 0
        assert sighting.lost_packets == 5
    faults.begin(5000)
    faults.tick(5100, payload)
    assert faults.end(5100) is None
    assert not faults.sightings()[0].happened


def test_one_uplink_down_orders_the_schemes() -> None:
    ways = {"spray": ("spray", 1), "e-ecmp": ("e-ecmp", 16), "pinning": ("pinning", 1), "ecmp": ("ecmp", 1)}

    def mean(scheme: str, qps: int) -> float:
        seeds = range(1, {"e-ecmp": 4, "ecmp": 8}.get(scheme, 2))
        overrides = [
            'faults=[{at: 0 ns, link_down: "leaf0:spine1"}]',
            f"routing.scheme={scheme}",
            f"transport.qps_per_connection={qps}",
        ]
        plans = [
            compile_plan(load_scenario(TEXT, [*overrides, f"seed={seed}"]), capacity_packets_per_s=None)
            for seed in seeds
        ]
        return float(np.mean([plan.workloads[0].predicted_cct_ratio for plan in plans]))

    found = {name: mean(*way) for name, way in ways.items()}
    assert found["spray"] == pytest.approx(4 / 3)
    assert found["pinning"] == pytest.approx(2.0)
    assert list(found.values()) == sorted(found.values())
    assert len(set(found.values())) == 4


def test_the_plan_tells_what_breaks_and_when_and_warns_of_a_slow_protocol() -> None:
    overrides = ['faults=[{at: 20 us, link_down: "leaf0:spine1"}]', "transport.retransmit_timeout=6 us"]
    plan = compile_plan(load_scenario(TEXT, overrides), capacity_packets_per_s=None)
    report = describe_plan(plan)
    assert report["faults"] == [{"text": "link_down leaf0:spine1", "at_ns": 20_000, "until_ns": None}]
    assert report["table_changes_ns"] == [21_000, 23_000]
    assert not any("queue pairs may give up" in one for one in plan.warnings)
    slow = compile_plan(
        load_scenario(TEXT, [*overrides, "routing.convergence_time=43 us"]), capacity_packets_per_s=None
    )
    assert any("queue pairs may give up" in one for one in slow.warnings)
    assert "faults" not in describe_plan(plan_of())
