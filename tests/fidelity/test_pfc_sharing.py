"""What PFC alone does to flows that share a fabric: shares follow ingress ports, and an incast takes bystanders with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from testbed.carriers.engine import engine_carrier
from testbed.carriers.protocol import WorkloadSamples
from testbed.fabric import Fabric
from testbed.plan.model import Plan
from tests.fidelity.runs import judged, plan_of
from tests.netns.labs import Quiet, lab_name

pytestmark = [pytest.mark.root, pytest.mark.fidelity]

CONGESTION = Path("scenarios/congestion")
# Of a share of a link: what a pause cycle and the first burst shift on runs as short as these. The shares that are told apart
# (1/2, 1/3, 1/6) are further from each other.
TOLERANCE = 0.04
# What the machine's share may be, of runs that are judged.
MACHINE = 0.02


def shorter(name: str, size: str) -> str:
    """Return a scenario with flows of another size."""
    return re.sub(r"size: \d+ MiB", f"size: {size}", (CONGESTION / f"{name}.yaml").read_text())


def rates_of(plan: Plan) -> list[float]:
    """Return what each flow got until the first of them ended, in the scenario's order, bytes per second; nothing was lost."""

    def run() -> tuple[list[float], list[WorkloadSamples]]:
        with Fabric.build(plan, lab_name("sharing")) as fabric, engine_carrier(fabric) as (carrier, _):
            samples = carrier.run(0, Quiet())
            dropped = int(fabric.arrays.queues["drop_packets"].sum())
        rates = samples.together_bytes_per_s
        order = plan.workloads[0].flow_order
        return [-1.0] if dropped else [float(rates[index]) for index in order], [samples]

    rates = judged(plan, run, MACHINE)
    print([f"{rate / 1e9:.2f} GB/s" for rate in rates])
    assert rates != [-1.0], "a lossless priority lost frames"
    return rates


def shares_of(name: str, *settings: str) -> list[float]:
    rates = rates_of(plan_of(shorter(name, "3 MiB"), *settings, "expect=[]"))
    return [rate / sum(rates) for rate in rates]


def test_shares_follow_ingress_ports() -> None:
    """The flow beside the receiver has a port for itself, three share the uplink's."""
    first, *others = shares_of("unfairness-pfc")
    assert abs(first - 1 / 2) <= TOLERANCE
    assert all(abs(one - 1 / 6) <= TOLERANCE for one in others)


def test_another_uplink_takes_its_share() -> None:
    """Negative control: with two uplinks the same flow gets a third; the port decides, not the flow."""
    first, *others = shares_of("unfairness-two-uplinks")
    assert abs(first - 1 / 3) <= TOLERANCE
    alone, *together = sorted(others, reverse=True)
    assert abs(alone - 1 / 3) <= TOLERANCE
    assert all(abs(one - 1 / 6) <= TOLERANCE for one in together)


def victim_rate(senders: int) -> float:
    """Return the victim's share of its NIC's rate beside an incast of so many senders."""
    flows = ["{src: 0, dst: 5, size: 1536 KiB}", *(f"{{src: {1 + k}, dst: 4, size: 1536 KiB}}" for k in range(senders))]
    workload = f"workload=[{{pattern: flows, iters: 1, warmup_iters: 0, flows: [{', '.join(flows)}]}}]"
    plan = plan_of((CONGESTION / "victim-pfc.yaml").read_text(), workload, "expect=[]")
    return rates_of(plan)[0] / (100e9 / 8 * 4096 / plan.frame_wire_bytes)


def test_victim_falls_with_each_unrelated_sender() -> None:
    """One sender fills its receiver's link and harms nobody: the control. Each further one slows the uplink for all."""
    alone, two, three = (victim_rate(senders) for senders in (1, 2, 3))
    assert alone > 1 - TOLERANCE
    assert abs(two - 1 / 2) <= 2 * TOLERANCE
    assert abs(three - 1 / 3) <= 2 * TOLERANCE


@pytest.mark.parametrize(("spine", "harmed"), [("spine-deep", False), ("spine-shallow", True)])
def test_a_spine_that_holds_the_incast_keeps_it_from_bystanders(spine: str, harmed: bool) -> None:
    text = (CONGESTION / f"{spine}.yaml").read_text()
    plan = plan_of(text, "expect=[]")
    share = rates_of(plan)[0] / (400e9 / 8 * 4096 / plan.frame_wire_bytes)
    assert (share < 0.6) if harmed else (share > 0.9)
