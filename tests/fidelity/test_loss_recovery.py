"""Loss recovery against theory: what a lossy link leaves of a link's rate, and what spraying does to each kind of receiver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from testbed.carriers.engine import engine_carrier
from testbed.carriers.protocol import WorkloadSamples
from testbed.fabric import Fabric
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.scenario import load_scenario
from tests.fidelity.runs import ATTEMPTS, judged
from tests.netns.labs import Quiet, lab_name
from tests.support.loss_model import expected_slots

pytestmark = pytest.mark.root

# One flow, one link that loses data in one direction. About 100 packets leave between a loss and the rewind.
STREAM = """
name: lossy-stream
fabric:
  kind: star
  hosts_per_leaf: 2
  host_link: {rate: 400 Gbit/s, delay: 2 us}
  lost_frames: data
transport: {loss_recovery: go_back_n}
workload: [{pattern: flows, flows: [{src: 0, dst: 1, size: 48 MiB}], iters: 1, warmup_iters: 0}]
"""
MTU_BYTES = 4096
LOOP_PACKETS = 102
TOLERANCE = 0.1
# What the machine's share in a completion time may be, of runs that are judged: a fraction of what the bars allow for.
MACHINE = 0.02


@dataclass(frozen=True)
class Streamed:
    """What one stream took and counted."""

    packets: int
    slots: float
    resent: int
    naks: int
    lost: int
    sent: int


def stream(loss: float, recovery: str, size_mib: int) -> Streamed:
    """Return what a stream took that has not lost its last packet: behind that comes nothing that could tell, but a timeout.

    A timeout is longer than what is measured, and no run in a hundred has one: it is run again then.
    """
    lossy = f"fabric.lossy_links=[{{link: 'host0:switch0', fraction: {loss:.6f}}}]"
    size = f"workload.0.flows.0.size={size_mib} MiB"
    plan = compile_plan(
        load_scenario(STREAM, [lossy, size, f"transport.loss_recovery={recovery}"]), capacity_packets_per_s=60_000
    )
    packets = size_mib * 2**20 // MTU_BYTES
    slot_ns = 8 * plan.frame_wire_bytes / 400
    latency_ns = plan.workloads[0].ideal_cct_ns - packets * slot_ns

    def run() -> tuple[tuple[Streamed, int | None], list[WorkloadSamples]]:
        with Fabric.build(plan, lab_name("stream")) as fabric, engine_carrier(fabric) as (carrier, _):
            samples = carrier.run(0, Quiet())
            queues = fabric.arrays.queues
            nic = plan.topology.host_port(0).id
            seen = Streamed(
                packets,
                (samples.cct_ns[0] - latency_ns) / slot_ns,
                samples.retransmitted_packets,
                int(fabric.arrays.qps["naks_packets"].sum()),
                int(queues["lost_packets"][nic].sum()),
                int(queues["deq_packets"][nic, 3]),
            )
        return (seen, samples.timeouts), [samples]

    for _ in range(ATTEMPTS):
        seen, timeouts = judged(plan, run, MACHINE)
        if not timeouts:
            return seen
    pytest.fail(f"timeouts in each of {ATTEMPTS} runs, where a last packet is lost in {loss:.2%} of them")


@pytest.mark.parametrize(
    ("product", "size_mib"),
    [
        pytest.param(0.05, 384, marks=pytest.mark.slow),  # 48 losses: fewer may be too few to judge
        pytest.param(0.3, 48, marks=pytest.mark.slow),
        (1.0, 48),
    ],
)
def test_efficiency_under_loss_is_the_expected_one(product: float, size_mib: int) -> None:
    loss = product / LOOP_PACKETS
    seen = stream(loss, "go_back_n", size_mib)
    packets = seen.packets
    # Preconditions: losses as asked for (five standard deviations), each repaired by a NAK.
    assert abs(seen.lost - seen.sent * loss) <= 5 * math.sqrt(seen.sent * loss)
    if not seen.naks:
        pytest.skip("not judged: nothing was lost")
    rewind = seen.resent / seen.naks
    expected = packets / expected_slots(packets, seen.lost / seen.sent, rewind, timeout_slots=0)
    efficiency = packets / seen.slots
    print(f"p W {product}: W {rewind:.0f}, efficiency {efficiency:.3f}, expected {expected:.3f}")
    assert efficiency == pytest.approx(expected, rel=TOLERANCE)
    # Few losses cost little: what they cost is judged by itself, within what chance and the machine leave open. Only losses of
    # what was in order cost a rewind; how many of those that were counted did is binomial.
    excess, expected_excess = seen.slots - packets, packets / expected - packets
    useful = packets / seen.sent
    allowed = 4 * math.sqrt(seen.lost * useful * (1 - useful)) * rewind + MACHINE * packets
    print(f"excess {excess:.0f} slots, expected {expected_excess:.0f}, allowed {allowed:.0f} off; {seen.lost} lost")
    if product >= 0.3:  # negative control: neither bar would take losses that cost nothing
        assert expected_excess > allowed
        assert pytest.approx(expected, rel=TOLERANCE) != 1.0
    elif expected_excess <= allowed:
        pytest.skip(f"not judged: {seen.lost} losses are too few to tell from none")
    assert abs(excess - expected_excess) <= allowed

    selective = stream(loss, "selective", size_mib)
    print(f"selective: efficiency {packets / selective.slots:.3f}, {selective.resent} resent of {selective.lost} lost")
    assert packets / selective.slots > efficiency
    assert selective.resent < seen.resent


@dataclass(frozen=True)
class Incast:
    """What an incast took and counted; all in packets of data but the first."""

    cct_ratio: float
    drops: int
    naks: int
    resent: int
    wasted: int


def incast(fan_in: int, *settings: str) -> Incast:
    text = Path(f"scenarios/congestion/incast-{fan_in}-lossy.yaml").read_text()
    plan = compile_plan(load_scenario(text, ["expect=[]", *settings]), capacity_packets_per_s=150_000)

    def run() -> tuple[Incast, list[WorkloadSamples]]:
        with Fabric.build(plan, lab_name("incast")) as fabric, engine_carrier(fabric) as (carrier, _):
            samples = carrier.run(0, Quiet())
            queues, qps = fabric.arrays.queues, fabric.arrays.qps
            seen = Incast(
                samples.cct_ns[0] / plan.workloads[0].ideal_cct_ns,
                int(queues["drop_packets"][:, plan.scenario.qos.lossless_priority].sum()),
                int(qps["naks_packets"].sum()),
                samples.retransmitted_packets,
                int(qps["out_of_order_packets"].sum() + qps["duplicate_packets"].sum()),
            )
        print(seen, samples.timeouts, "timeouts")
        return seen, [samples]

    return judged(plan, run, MACHINE)


@pytest.mark.parametrize("fan_in", [15, pytest.param(31, marks=pytest.mark.slow)])
def test_incast_before_a_shallow_switch_completes_by_go_back_n(fan_in: int) -> None:
    """Also the negative control of the incast with PFC in test_flow_control.py: the buffer is what pauses protect."""
    seen = incast(fan_in)
    assert seen.drops > 0
    assert seen.naks > 0
    # What was sent again made up for what was dropped, and for what came in vain behind it.
    assert seen.resent == seen.drops + seen.wasted
    assert seen.cct_ratio > 1 + TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("fan_in", [15, 31])
def test_the_same_incast_with_pfc_sends_nothing_twice(fan_in: int) -> None:
    """Negative control: the buffer is what overflows."""
    seen = incast(fan_in, "qos.pfc.enabled=true")
    assert (seen.drops, seen.naks, seen.resent, seen.wasted) == (0, 0, 0, 0)
    assert abs(seen.cct_ratio - 1) <= 0.02


@pytest.mark.slow
def test_spraying_collapses_before_go_back_n_and_not_before_selective() -> None:
    spray = Path("scenarios/routing/spray-selective.yaml").read_text()
    ratios = {}
    for recovery in ("selective", "go_back_n"):
        settings = [f"transport.loss_recovery={recovery}", "workload.0.size=4 MiB", "workload.0.iters=1", "expect=[]"]
        plan = compile_plan(load_scenario(spray, settings), capacity_packets_per_s=60_000)

        def run(plan: Plan = plan) -> tuple[WorkloadSamples, list[WorkloadSamples]]:
            with Fabric.build(plan, lab_name("spray")) as fabric, engine_carrier(fabric) as (carrier, _):
                samples = carrier.run(0, Quiet())
                assert fabric.arrays.qps["out_of_order_packets"].any()
            return samples, [samples]

        # A collapse is one whatever the machine adds.
        samples = run()[0] if recovery == "go_back_n" else judged(plan, run, MACHINE)
        ratios[recovery] = samples.cct_ns[0] / plan.workloads[0].ideal_cct_ns
        if recovery == "selective":
            assert samples.retransmitted_packets == 0
    print(ratios)
    assert ratios["selective"] <= 1.1
    assert ratios["go_back_n"] > 1.5
