"""DCQCN over rxe: CNPs on the wire, a queue below the pause threshold, fair shares, and rates that the wire confirms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from testbed.carriers.capacity import known_capacity, wall_tick_ns
from testbed.carriers.choose import needs_any_workload, open_carrier
from testbed.carriers.reaction import Reaction
from testbed.engine.flow_control import FlowControl
from testbed.fabric import Fabric
from testbed.plan.compile import compile_plan
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, qp_index
from testbed.scenario import load_scenario
from tests.netns.labs import Quiet, assert_drained, lab_name
from tests.vm.test_run import run_scenario

pytestmark = pytest.mark.root

SCENARIO = Path(__file__).parents[2] / "scenarios" / "congestion" / "rxe-dcqcn.yaml"
TWO = ("fabric.hosts_per_leaf=3", "workload.0.fan_in=2", "workload.0.size=24 MiB")
KMIN_BYTES, KMAX_BYTES, LINK_BYTES_PER_S, FULL = 40_000, 160_000, 3.125e9, 0.9
# The first CNPs have come, and the rates have risen again from where those put them.
BEGUN_MS, CONVERGED_MS = 1.0, 3.0
EQUAL, RUNS = 0.1, 3
# A class makes up for 1.5 ticks in which the machine was late. Nothing makes up for a stall, which is left out on both sides.
MEASURED, STALL_TICKS, STALLED = 0.03, 4, 0.1


@dataclass(frozen=True)
class Seen:
    """What was sampled every tick, a row each; arrays of flows have shape ``(rows, flows)``.

    Attributes:
        ms: Emulated.
        depth_bytes: Of the queue to the receiver.
        pauses: XOFF frames so far.
        sent_bytes: Wire bytes of each flow that have left its NIC.
        rates: Emulated bytes per second that each flow's queue pair might send since the row before.
        cnps: That have left the receiver and reached the senders, so far.
        wrong_elements: Bytes that did not arrive as they were sent.
        tick_ms: How often the rates are decided, emulated.
    """

    ms: npt.NDArray[np.float64]
    depth_bytes: npt.NDArray[np.float64]
    pauses: npt.NDArray[np.float64]
    sent_bytes: npt.NDArray[np.float64]
    rates: npt.NDArray[np.float64]
    cnps: tuple[int, int]
    wrong_elements: int | None
    tick_ms: float

    def since(self, begin_ms: float) -> Seen:
        """Return the rows from then on until the first flow has sent all it had."""
        all_sent = self.sent_bytes >= self.sent_bytes[-1]
        part = (self.ms >= begin_ms) & ~all_sent.any(axis=1)
        rows = (self.ms, self.depth_bytes, self.pauses, self.sent_bytes, self.rates)
        ms, depth, pauses, sent, rates = (one[part] for one in rows)
        return Seen(ms, depth, pauses, sent, rates, self.cnps, self.wrong_elements, self.tick_ms)

    @property
    def measured(self) -> npt.NDArray[np.float64]:
        """Bytes per second of each flow."""
        rates: npt.NDArray[np.float64] = (self.sent_bytes[-1] - self.sent_bytes[0]) / (self.ms[-1] - self.ms[0]) * 1e3
        return rates

    def sent_of_scheduled(self, stall_ms: float) -> npt.NDArray[np.float64]:
        """Return what each flow has sent over what its rates allowed, both without the ticks that took longer than that."""
        took_ms = np.diff(self.ms)
        smooth = took_ms <= stall_ms
        assert took_ms[~smooth].sum() <= STALLED * took_ms.sum(), "not judged: the machine stalled"
        sent = np.diff(self.sent_bytes, axis=0)[smooth].sum(axis=0)
        allowed = (self.rates[1:] * took_ms[:, None] * 1e-3)[smooth].sum(axis=0)
        ratio: npt.NDArray[np.float64] = sent / allowed
        return ratio


def watch(*settings: str) -> Seen:
    """Run the scenario and sample it every tick."""
    with pytest.MonkeyPatch.context() as patch:
        return _watch(patch, *settings)


def _watch(monkeypatch: pytest.MonkeyPatch, *settings: str) -> Seen:
    plan = compile_plan(
        load_scenario(SCENARIO.read_text(), settings),
        capacity_packets_per_s=known_capacity(),
        wall_tick_ns=wall_tick_ns(),
    )
    topology, connections, dilation = plan.topology, plan.workloads[0].connections, plan.dilation.value
    priority = plan.scenario.qos.lossless_priority
    line = [topology.nics[one.requester.local.nic].rate_bits_per_s / 8 for one in connections]
    rates = [np.array(line)]
    rows: list[tuple[float, ...]] = []
    react, obey = Reaction.tick, FlowControl.tick

    def tick_reaction(self: Reaction, now_ns: int, active: npt.NDArray[np.bool_]) -> None:
        react(self, now_ns, active)
        rates[0] = self.wall_rates_bytes_per_s * dilation

    monkeypatch.setattr(Reaction, "tick", tick_reaction)
    with (
        Fabric.build(
            plan, lab_name("rxecc"), any_workload=needs_any_workload(plan.scenario.transport.carrier)
        ) as fabric,
        open_carrier(fabric) as (carrier, _),
    ):
        queues, qps = fabric.arrays.queues, fabric.arrays.qps
        hot = queues[topology.host_port(0).peer, priority]
        nics = [topology.nics[one.requester.local.nic].id for one in connections]

        def sample(flow: FlowControl, now_ns: int) -> None:
            obey(flow, now_ns)
            depth = -float(hot["deq_bytes"]) + float(hot["enq_bytes"])
            sent = queues["deq_bytes"][nics, priority] + 24.0 * queues["deq_packets"][nics, priority]
            rows.append((float(now_ns), depth, float(queues["xoff_frames"].sum()), *sent, *rates[0]))

        monkeypatch.setattr(FlowControl, "tick", sample)
        samples = carrier.run(0, Quiet())
        count = len(connections)
        sent_cnps = int(qps["sent_cnps_packets"][qp_index(0, RESPONDER) : 2 * count : 2].sum())
        received = int(qps["cnps_packets"][qp_index(0, REQUESTER) : 2 * count : 2].sum())
        assert_drained(fabric)
    assert len(rows) > 100
    seen = np.array(rows)
    ms, depth, pauses, sent, scheduled = np.split(seen, (1, 2, 3, 3 + count), axis=1)
    return Seen(
        (ms[:, 0] - ms[0, 0]) / dilation / 1e6,
        depth[:, 0],
        pauses[:, 0],
        sent,
        scheduled,
        (sent_cnps, received),
        samples.wrong_elements,
        plan.dilation.wall_tick_ns / dilation / 1e6,
    )


@pytest.fixture(scope="module")
def controlled() -> Seen:
    return watch()


@pytest.fixture(scope="module")
def uncontrolled() -> Seen:
    return watch("transport.congestion_control=none", "workload.0.size=2 MiB")


def test_every_cnp_of_the_receiver_reaches_its_sender(controlled: Seen) -> None:
    sent, received = controlled.cnps
    assert sent == received > 0
    assert controlled.wrong_elements == 0


def test_the_queue_stands_where_it_is_marked_and_not_where_it_pauses(controlled: Seen, uncontrolled: Seen) -> None:
    with_control, without = controlled.since(CONVERGED_MS), uncontrolled.since(BEGUN_MS)
    for seen in (with_control, without):
        depths = np.percentile(seen.depth_bytes, [5, 50, 95]) / 1e3
        print(
            f"depth {np.round(depths)} KB, {seen.pauses[-1] - seen.pauses[0]:.0f} XOFF in {seen.ms[-1] - seen.ms[0]:.1f} ms"
        )
    assert with_control.measured.sum() >= FULL * LINK_BYTES_PER_S
    assert KMIN_BYTES <= np.percentile(with_control.depth_bytes, 95) <= KMAX_BYTES + KMIN_BYTES
    assert with_control.pauses[-1] == with_control.pauses[0]
    # Without, what bounds the queue is what pauses.
    assert np.median(without.depth_bytes) > 2 * KMAX_BYTES
    assert without.pauses[-1] - without.pauses[0] >= 4


def test_what_is_scheduled_is_what_the_wire_carries(controlled: Seen) -> None:
    seen = controlled.since(BEGUN_MS)
    ratio = seen.sent_of_scheduled(STALL_TICKS * controlled.tick_ms)
    print(f"sent over scheduled {np.round(ratio, 3)}")
    np.testing.assert_allclose(ratio, 1.0, rtol=MEASURED)


def test_without_marks_nobody_is_told_and_pauses_come() -> None:
    """The negative control: what slows the queue pairs down is what CNPs say."""
    seen = watch("qos.ecn.enabled=false", "workload.0.size=2 MiB")
    assert seen.cnps == (0, 0)
    assert (seen.rates == seen.rates[0]).all()
    assert seen.pauses[-1] >= 4


def test_a_ring_that_nothing_marks_is_right_and_as_fast_as_without() -> None:
    """Classes at line rate cost nothing; two queue pairs of each NIC."""
    result = run_scenario(
        "rxe.yaml", "transport.congestion_control=dcqcn", "qos.ecn.enabled=true", "transport.qps_per_connection=2",
        size="1 MiB",
    )  # fmt: skip
    row = result["results"][0]
    assert row["wrong_elements"] == 0
    assert result["fabric"]["cnp_packets"] == 0
    assert row["cct_ratio"] <= 1.15


@pytest.mark.slow
@pytest.mark.parametrize("settings", [TWO, ()], ids=["2:1", "4:1"])
def test_shares_are_equal_in_the_median_of_three_runs(settings: tuple[str, ...]) -> None:
    shares = []
    for _ in range(RUNS):
        measured = watch(*settings).since(CONVERGED_MS).measured
        shares.append(measured / measured.mean())
        print(f"shares {np.round(shares[-1], 3)}")
    assert np.abs(np.median(shares, axis=0) - 1).max() <= EQUAL
