"""Which of the kernel's means a fabric uses, on kernels made up for the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest

from testbed.errors import LabError, ScenarioError
from testbed.fabric import back_ends
from testbed.fabric.back_ends import choose_back_ends
from testbed.fabric.fabric import require_same_fabric
from testbed.kernel.registry import LabState
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.scenario import load_scenario

SCENARIO = """
name: back-ends
fabric: {kind: star, hosts_per_leaf: 2, host_link: {rate: 8 Gbit/s, delay: DELAY}}
workload: [{collective: all_reduce, size: 64 KiB}]
time_dilation: 1000
"""


def plan_of(delay: str, carrier: str) -> Plan:
    scenario = load_scenario(SCENARIO.replace("DELAY", delay), [f"transport.carrier={carrier}"])
    return compile_plan(scenario, capacity_packets_per_s=None)


@pytest.fixture(params=[True, False], ids=["every-qdisc", "no-qdisc"])
def has_qdiscs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    answer: Callable[[str], bool] = lambda _: bool(request.param)  # noqa: E731
    monkeypatch.setattr(back_ends, "probe_qdisc", answer)
    return bool(request.param)


@pytest.mark.parametrize("carrier", ["engine", "rxe", "tcp"])
@pytest.mark.parametrize("delay", ["600 ns", "0 ns"])
def test_netem_is_for_the_kernels_protocols_where_links_have_a_delay(
    carrier: str, delay: str, has_qdiscs: bool
) -> None:
    chosen = choose_back_ends(plan_of(delay, carrier)).link_delay
    assert chosen == ("netem" if has_qdiscs and carrier != "engine" and delay != "0 ns" else "carrier")


@pytest.mark.parametrize("delay", ["600 ns", "0 ns"])
def test_engine_runs_on_a_lab_of_another_carrier_unless_that_delays_on_the_wire(delay: str, has_qdiscs: bool) -> None:
    plan = plan_of(delay, "tcp")
    details = {"time_dilation": plan.dilation.value, "back_ends": asdict(choose_back_ends(plan))}
    state = LabState("lab", "", {}, False, ready=True, scenario=plan.scenario.resolved(), details=details)
    if has_qdiscs and delay != "0 ns":
        with pytest.raises(LabError, match="delays on the wire"):
            require_same_fabric(plan_of(delay, "engine"), state)
    else:
        require_same_fabric(plan_of(delay, "engine"), state)


STRICT, MIXED = (
    "qos.priorities=[{priority: 3, weight: strict}, {priority: 4, weight: strict}]",
    "qos.priorities=[{priority: 4}]",
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((STRICT,), "prio"),
        ((STRICT, "qos.pfc.enabled=true"), "htb"),
        ((STRICT, "qos.scheduler=htb"), "htb"),
        ((STRICT, "qos.pfc.enabled=true", "qos.scheduler=prio"), "prio"),
        ((MIXED,), "htb"),
        ((MIXED, "qos.scheduler=ets"), "ets"),
        (("qos.priorities=[{priority: 3, weight: strict}]",), "htb"),  # one priority has no scheduler
    ],
)
def test_prio_is_taken_where_all_are_strict_and_nothing_is_paused(
    settings: tuple[str, ...], expected: str, has_qdiscs: bool
) -> None:
    plan = compile_plan(load_scenario(SCENARIO.replace("DELAY", "0 ns"), settings), capacity_packets_per_s=None)
    forced = any(one.startswith("qos.scheduler") for one in settings)
    assert choose_back_ends(plan).scheduler == (expected if has_qdiscs or forced else "htb")


@pytest.mark.parametrize(
    ("priorities", "is_refused"),
    [
        ("[{priority: 4}]", True),
        ("[{priority: 4, weight: strict}]", False),
        ("[{priority: 3, weight: strict}, {priority: 4, weight: strict}]", False),
        ("[{priority: 4, weight: strict}, {priority: 0, lossless: false}]", True),
        ("[{priority: 3, weight: strict}, {priority: 1, lossless: false}, {priority: 0, lossless: false}]", False),
    ],
)
def test_ets_is_refused_where_a_pause_would_stop_others(priorities: str, is_refused: bool) -> None:
    settings = [f"qos.priorities={priorities}", "qos.scheduler=ets", "qos.pfc.enabled=true"]
    if is_refused:
        with pytest.raises(ScenarioError, match="a paused band of an ETS stops the others"):
            load_scenario(SCENARIO.replace("DELAY", "0 ns"), settings)
    else:
        load_scenario(SCENARIO.replace("DELAY", "0 ns"), settings)
