"""Strict priorities in the plan: the order of service, what waits behind them, what is said of it."""

from __future__ import annotations

import pytest

from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.plan.operations import BackEnds, ShapePort
from testbed.plan.prediction import predict
from testbed.plan.strict import StrictWait, find_strict_wait
from testbed.scenario import load_scenario

SCENARIO = """
name: strict
fabric: {kind: star, hosts_per_leaf: 4, host_link: {rate: 400 Gbit/s, delay: 600 ns}, switch: {buffer: 64 MiB}}
workload:
  - pattern: flows
    flows:
      - {src: 1, dst: 0, size: 4 MiB}
      - {src: 2, dst: 0, size: 8 MiB, priority: 4}
      - {src: 3, dst: 0, size: 16 MiB, priority: 5}
time_dilation: 1000
"""
WIRE_SHARE = (4096 + 58 + 24) / 4096
MIB_NS = 8 * (1 << 20) * WIRE_SHARE / 400


def plan_of(four: str, five: str, *settings: str, usual: str = "1") -> Plan:
    listed = (3, usual), (4, four), (5, five)
    priorities = ", ".join(f"{{priority: {priority}, weight: {weight}}}" for priority, weight in listed)
    scenario = load_scenario(SCENARIO, [f"qos.priorities=[{priorities}]", *settings])
    return compile_plan(scenario, capacity_packets_per_s=None)


def wait_of(plan: Plan) -> StrictWait | None:
    (planned,) = plan.workloads
    return find_strict_wait(plan.scenario, plan.topology, planned)


@pytest.mark.parametrize(
    ("weights", "served"),
    [
        (("1", "1", "1"), [5, 4, 3]),
        (("strict", "1", "2"), [3, 5, 4]),
        (("strict", "strict", "1"), [4, 3, 5]),
        (("strict", "strict", "strict"), [5, 4, 3]),
    ],
)
def test_strict_priorities_are_served_before_all_others_the_higher_number_first(
    weights: tuple[str, str, str], served: list[int]
) -> None:
    usual, four, five = weights
    assert [one.priority for one in plan_of(four, five, usual=usual).queue_classes] == served


@pytest.mark.parametrize(
    ("four", "five", "usual", "ahead", "waiting", "mib"),
    [
        ("1", "strict", "1", (5,), 4, 16),  # as long as that of 3, which is found after it
        ("strict", "1", "1", (4,), 5, 8),
        ("strict", "strict", "1", (5, 4), 3, 24),
        ("1", "1", "strict", (3,), 5, 4),
    ],
)
def test_what_waits_waits_for_all_that_goes_before_it(
    four: str, five: str, usual: str, ahead: tuple[int, ...], waiting: int, mib: int
) -> None:
    plan = plan_of(four, five, usual=usual)
    found = wait_of(plan)
    assert found is not None
    assert plan.topology.port_name(found.port) == "switch0/down0"
    assert (found.ahead, found.priority) == (ahead, waiting)
    assert found.wait_ns == pytest.approx(mib * MIB_NS, abs=1)
    # Only a loss makes a timeout run out: the automatic one is longer by the wait.
    assert plan.retransmit_timeout_ns == plan_of("1", "1").retransmit_timeout_ns + found.wait_ns
    assert any(f"priority {waiting} may wait" in one and "switch0/down0" in one for one in plan.warnings)
    assert not any("retransmit_timeout" in one for one in plan.warnings)


def test_weights_and_paths_apart_make_nobody_wait() -> None:
    assert wait_of(plan_of("7", "1")) is None
    apart = "workload=[{pattern: flows, flows: [{src: 0, dst: 1, size: 4 MiB}, {src: 2, dst: 3, size: 4 MiB, priority: 5}]}]"
    plan = plan_of("1", "strict", apart)
    assert wait_of(plan) is None
    assert not any("strict" in one for one in plan.warnings)


def test_a_timeout_shorter_than_the_wait_is_warned_of() -> None:
    plan = plan_of("strict", "strict", "transport.retransmit_timeout=200 us")
    assert any(one.startswith("transport.retransmit_timeout 200 us is shorter") for one in plan.warnings)


def test_prediction_says_that_it_knows_no_strict_priority() -> None:
    def said(four: str) -> str:
        (line,) = (
            one for one in predict(plan_of(four, "1").scenario, seeds=1).left_out if one.startswith("qos.priorities")
        )
        return line

    assert said("strict") == said("1") + ", and none to be strict"


@pytest.mark.parametrize(
    ("scheduler", "weights", "expected"),
    [
        ("ets", ("2", "strict", "1"), "ets bands 3 strict 1 quanta"),
        ("ets", ("strict", "strict", "strict"), "ets bands 3 strict 3 priomap 2 2"),
        ("prio", ("strict", "strict", "strict"), "prio bands 3 priomap 2 2"),
        ("htb", ("2", "strict", "1"), "classid 10:1 htb rate 8bit prio 0 quantum"),
        ("htb", ("2", "strict", "1"), "classid 10:3 htb rate 8bit prio 1 quantum"),
    ],
)
def test_plan_shows_the_commands_of_the_scheduler(scheduler: str, weights: tuple[str, str, str], expected: str) -> None:
    usual, four, five = weights
    plan = plan_of(four, five, usual=usual)
    found = plan.operations([""] * 5, any_workload=True, back_ends=BackEnds(scheduler=scheduler))
    shaped = [one.describe() for one in found if isinstance(one, ShapePort)]
    assert shaped
    assert all(expected in one for one in shaped)
