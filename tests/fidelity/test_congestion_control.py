"""The bars of DCQCN on the wire: fair shares of a full link over a bounded queue, and what constants for another rate cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from testbed.carriers.engine import engine_carrier
from testbed.engine.flow_control import FlowControl
from testbed.fabric import Fabric
from testbed.plan.compile import compile_plan
from testbed.roce.queue_pairs import RESPONDER, qp_index
from testbed.scenario import load_scenario
from tests.netns.labs import Quiet, lab_name

pytestmark = [pytest.mark.root, pytest.mark.fidelity, pytest.mark.slow]

SCENARIOS = Path("scenarios/congestion")
LINK_BYTES_PER_S = 50e9
KMAX_BYTES = 3_200_000


class _EnoughError(Exception):
    """All that is judged has been seen."""


@dataclass(frozen=True)
class Seen:
    """What was sampled every tick: emulated ms, delivered payload of each flow, depth of the shared queue, PFC frames."""

    ms: npt.NDArray[np.float64]
    delivered: npt.NDArray[np.float64]
    depth: npt.NDArray[np.float64]
    pauses: npt.NDArray[np.float64]

    def between(self, begin_ms: float, end_ms: float) -> Seen:
        part = (self.ms >= begin_ms) & (self.ms < end_ms)
        return Seen(self.ms[part], self.delivered[part], self.depth[part], self.pauses[part])

    @property
    def rates(self) -> npt.NDArray[np.float64]:
        """Bytes per second of each flow."""
        return (self.delivered[-1] - self.delivered[0]) / (self.ms[-1] - self.ms[0]) * 1e3

    @property
    def jain(self) -> float:
        return float(self.rates.sum() ** 2 / (len(self.rates) * (self.rates**2).sum()))

    @property
    def throughput(self) -> float:
        """Payload as a share of what the link can carry of it."""
        return float(self.rates.sum() / LINK_BYTES_PER_S * (4096 + 82) / 4096)


def watch(file: str, until_ms: float, *settings: str) -> Seen:
    """Run a scenario of flows and sample it every tick, for some emulated time or, of ``inf``, until the first flow has ended.

    Skips on a machine that stalls.
    """
    text = (SCENARIOS / file).read_text()
    plan = compile_plan(load_scenario(text, settings), capacity_packets_per_s=150_000.0)
    rows: list[tuple[float, ...]] = []
    with Fabric.build(plan, lab_name("dcqcn")) as fabric, engine_carrier(fabric) as (carrier, _):
        topology, arrays = fabric.plan.topology, fabric.arrays
        count = len(plan.workloads[0].connections)
        smallest = int(np.bincount(plan.workloads[0].schedule.connection, plan.workloads[0].schedule.nbytes).min())
        delivered = arrays.qps["rx_payload_bytes"][qp_index(0, RESPONDER) : 2 * count : 2]
        port = topology.port(topology.host_port(0).peer).id
        queue = arrays.queues[port, plan.scenario.qos.lossless_priority]
        flow = carrier.flow
        assert isinstance(flow, FlowControl)

        def tick(now_ns: int) -> None:
            FlowControl.tick(flow, now_ns)
            frames = float(arrays.queues["xoff_frames"].sum())
            depth = -float(queue["deq_bytes"]) + float(queue["enq_bytes"])
            rows.append((float(now_ns), depth, frames, *delivered.astype(np.float64)))
            ended = math.isinf(until_ms) and delivered.max() >= smallest
            if ended or rows[-1][0] - rows[0][0] > until_ms * 1e6 * plan.dilation.value:
                raise _EnoughError

        flow.tick = tick  # type: ignore[method-assign]
        with pytest.raises(_EnoughError):
            carrier.run(0, Quiet())
    seen = np.array(rows)
    late = np.diff(seen[:, 0]) - plan.dilation.wall_tick_ns
    # A tick must stay below a quarter of the smallest time of the control loop, the CNP interval; pauses move at ticks.
    limit_ns = plan.cnp_interval_ns * plan.dilation.value / 4 or plan.dilation.wall_tick_ns / 2
    if np.percentile(late, 99) > limit_ns:
        pytest.skip(f"not judged: ticks were up to {late.max() / 1e6:.0f} ms late")
    return Seen((seen[:, 0] - seen[0, 0]) / plan.dilation.value / 1e6, seen[:, 3:], seen[:, 1], seen[:, 2])


@pytest.mark.parametrize("file", ["dcqcn-2to1.yaml", "dcqcn-8to1.yaml"])
def test_dcqcn_shares_a_full_link_evenly_over_a_bounded_queue(file: str) -> None:
    last = watch(file, 40.0).between(30.0, 40.0)

    assert last.jain >= 0.95
    assert last.throughput >= 0.9
    assert np.median(last.depth) > 0
    assert np.percentile(last.depth, 95) <= KMAX_BYTES
    assert last.pauses[-1] == last.pauses[0]


def test_constants_for_40_gbit_s_waste_a_link_of_400() -> None:
    """All flows start at once: a newcomer at line rate would fill the link by itself (docs/congestion-control.md)."""
    together = [f"workload.0.flows.{number}.start=0 ns" for number in range(8)]
    tuned = watch("dcqcn-8to1.yaml", 20.0, *together).throughput
    untuned = watch("dcqcn-8to1.yaml", 20.0, *together, "transport.dcqcn.scale=1").throughput

    assert untuned < 0.6 * tuned


def test_without_congestion_control_the_queue_stands_at_the_pause_threshold() -> None:
    """Negative control: what bounds the queue and keeps pauses away is DCQCN."""
    never = "transport.dcqcn.cnp_interval=500 ms"
    seen = watch("dcqcn-8to1.yaml", 12.0, never).between(9.0, 12.0)

    assert np.percentile(seen.depth, 95) > KMAX_BYTES
    assert seen.pauses[-1] > seen.pauses[0]


# --- who gets what ---------------------------------------------------------------------------------------------------------


EQUAL = 0.1
CONVERGED_MS = 20.0
RUNS = 3


def of_the_mean(seen: Seen) -> npt.NDArray[np.float64]:
    """Return what each flow delivered, over the mean of all."""
    shares: npt.NDArray[np.float64] = seen.rates / seen.rates.mean()
    return shares


def test_dcqcn_gives_equal_shares_whatever_the_ingress_port() -> None:
    """Flows of twice the scenario's size: a share's own noise is 6 % over 45 ms and 4 % over 115 (docs/congestion-control.md)."""
    longer = [f"workload.0.flows.{number}.size=1600 MiB" for number in range(4)]
    shares = []
    for _ in range(RUNS):
        seen = watch("unfairness-dcqcn.yaml", math.inf, *longer)
        seen = seen.between(CONVERGED_MS, float(seen.ms[-1]))
        assert seen.throughput >= 0.9
        assert np.median(seen.depth) > 0  # the link is contended for all the while
        assert seen.pauses[-1] == seen.pauses[0]
        shares.append(of_the_mean(seen))
        print(f"from {CONVERGED_MS} to {seen.ms[-1]:.0f} ms: {shares[-1].round(3)}, Jain {seen.jain:.3f}")

    np.testing.assert_allclose(np.median(shares, axis=0), 1.0, atol=EQUAL)


def test_pauses_alone_give_shares_by_ingress_port() -> None:
    """Negative control: half for the host beside the receiver, a sixth for each behind the uplink."""
    seen = watch("unfairness-pfc.yaml", math.inf)
    seen = seen.between(0.1, float(seen.ms[-1]))

    np.testing.assert_allclose(seen.rates / seen.rates.sum(), [1 / 2, 1 / 6, 1 / 6, 1 / 6], atol=0.03)
    assert np.abs(of_the_mean(seen) - 1).min() > 2 * EQUAL


def victim_share(file: str, senders: int, begin_ms: float, end_ms: float) -> float:
    """Return the victim's share of its NIC's rate beside an incast of some senders."""
    flows = [f"{{src: {host}, dst: {4 if host else 5}, size: 400 MiB}}" for host in range(senders + 1)]
    settings = (f"workload.0.flows=[{', '.join(flows)}]", "time_dilation=1000")
    seen = watch(file, end_ms, *settings).between(begin_ms, end_ms)
    return float(seen.rates[0]) / (LINK_BYTES_PER_S / 4) * (4096 + 82) / 4096


def test_victim_falls_with_each_unrelated_sender_under_pauses_alone() -> None:
    alone, two, three = (victim_share("victim-pfc.yaml", senders, 0.5, 3.0) for senders in (1, 2, 3))

    assert alone >= 0.97
    assert two == pytest.approx(1 / 2, abs=0.05)
    assert three == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("senders", [2, 3])
def test_victim_keeps_its_rate_under_dcqcn(senders: int) -> None:
    assert victim_share("victim-dcqcn.yaml", senders, 3.0, 12.0) >= 0.9
