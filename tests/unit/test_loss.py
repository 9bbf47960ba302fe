"""Random loss on links, from the scenario to the plan."""

from __future__ import annotations

from fractions import Fraction

import pytest

from testbed.errors import PlanError
from testbed.plan.compile import compile_plan
from testbed.plan.loss import lost_priorities
from testbed.plan.model import Plan
from testbed.scenario import load_scenario

SCENARIO = """
name: loss
fabric: {kind: clos, leaves: 2, spines: 2, hosts_per_leaf: 2, host_link: {rate: 400 Gbit/s}}
workload: [{collective: all_reduce, size: 1 MiB}]
"""


def plan_of(*overrides: str) -> Plan:
    return compile_plan(load_scenario(SCENARIO, overrides), capacity_packets_per_s=None)


def lossy(plan: Plan) -> dict[str, Fraction]:
    return {plan.topology.port_name(port): fraction for port, fraction in plan.losses.items()}


def test_links_lose_nothing_unless_told() -> None:
    plan = plan_of()
    assert plan.losses == {}
    assert not any("lose" in warning for warning in plan.warnings)


def test_a_kind_of_link_loses_in_both_directions_and_the_other_kind_does_not() -> None:
    plan = plan_of("fabric.host_link.loss=1/100")
    names = {f"{node}" for i in range(4) for node in (f"host{i}/eth0", f"leaf{i // 2}/down{i % 2}")}
    assert lossy(plan) == dict.fromkeys(names, Fraction(1, 100))
    assert any("host0:leaf0 0.01" in warning and "2 more" not in warning for warning in plan.warnings)


def test_a_named_link_goes_before_its_kind() -> None:
    plan = plan_of("fabric.uplink.loss=1 %", "fabric.lossy_links=[{link: 'leaf0:spine1', fraction: 0}]")
    assert set(lossy(plan)) == {f"leaf{i}/up{j}" for i, j in ((0, 0), (1, 0), (1, 1))} | {
        f"spine{j}/down{i}" for i, j in ((0, 0), (1, 0), (1, 1))
    }


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ("[{link: 'leaf0:spine7', fraction: 1/2}]", "leaf0:spine7"),
        ("[{link: 'spine1:leaf0', fraction: 0}]", "spine1:leaf0"),
    ],
)
def test_unknown_link_is_an_error_that_names_the_key(links: str, words: str) -> None:
    with pytest.raises(PlanError, match=rf'fabric.lossy_links\[0\].link: must be a link of the fabric, got "{words}"'):
        plan_of(f"fabric.lossy_links={links}")


def test_a_link_is_named_once() -> None:
    twice = "{link: 'leaf0:spine1', fraction: 1/2}"
    with pytest.raises(PlanError, match=r"fabric.lossy_links\[1\].link: must name a link once"):
        plan_of(f"fabric.lossy_links=[{twice}, {twice}]")


def test_data_alone_is_the_data_priority() -> None:
    assert lost_priorities(plan_of().scenario) == tuple(range(8))
    data = plan_of("fabric.lost_frames=data", "qos.lossless_priority=4")
    assert lost_priorities(data.scenario) == (4,)
