"""Two saturated data priorities share a link at its rate and by their weights; pausing one gives the other the link."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from testbed.carriers.engine import engine_carrier
from testbed.carriers.protocol import WorkloadSamples
from testbed.engine.flow_control import FlowControl
from testbed.fabric import Fabric
from tests.fidelity.runs import TWO_LEAVES, judged, plan_of, spine_pauser
from tests.netns.labs import Quiet, lab_name

pytestmark = [pytest.mark.root, pytest.mark.fidelity]

SIZE_MIB = 6
TOLERANCE = 0.02


def flows(size_mib: int, *, both: bool = True) -> str:
    """Return rank 0's flow to rank 2 at priority 3, and rank 1's to 3 at priority 4: both over leaf0's one uplink."""
    second = f", {{src: 1, dst: 3, size: {size_mib} MiB, priority: 4}}" if both else ""
    listed = f"{{src: 0, dst: 2, size: {size_mib} MiB}}{second}"
    return f"workload=[{{pattern: flows, iters: 1, warmup_iters: 0, flows: [{listed}]}}]"


@dataclass
class Pauses:
    """Pauses one priority of leaf0's uplink over and over, until the first flow has ended."""

    flow: FlowControl
    send: Callable[[int, int], None]
    priority: int
    ended: Callable[[], bool]
    ticks: int = field(default=0)
    done: bool = False

    def tick(self, now_ns: int) -> None:
        if not self.done:
            self.done = self.ended()
            if self.done or self.ticks % 10 == 0:
                self.send(self.priority, 0 if self.done else 0xFFFF)
            self.ticks += 1
        FlowControl.tick(self.flow, now_ns)


@dataclass(frozen=True)
class Shared:
    """How two flows shared the uplink: times over that of one alone, and what each had delivered when the first ended."""

    times: tuple[float, float]
    together_bytes_per_s: tuple[float, float]

    @property
    def second_share(self) -> float:
        return self.together_bytes_per_s[1] / sum(self.together_bytes_per_s)


def share(weights: tuple[int, int | str], paused: int | None = None, size_mib: int = SIZE_MIB) -> Shared:
    settings = (
        "qos.pfc.enabled=true",
        f"qos.priorities=[{{priority: 3, weight: {weights[0]}}}, {{priority: 4, weight: {weights[1]}}}, {{priority: 5}}]",
    )
    plan = plan_of(TWO_LEAVES, *settings, flows(size_mib))
    alone_ns = plan_of(TWO_LEAVES, *settings, flows(size_mib, both=False)).workloads[0].ideal_cct_ns

    def run() -> tuple[Shared, list[WorkloadSamples]]:
        with contextlib.ExitStack() as stack:
            fabric = stack.enter_context(Fabric.build(plan, lab_name("share")))
            carrier, _ = stack.enter_context(engine_carrier(fabric))
            if paused is not None:
                send = stack.enter_context(spine_pauser(fabric))
                received = fabric.arrays.qps["rx_messages"]
                last = int(plan.workloads[0].schedule.connection.tolist().count(0))
                assert isinstance(carrier.flow, FlowControl)
                pauses = Pauses(carrier.flow, send, paused, lambda: int(received[1]) >= last)
                carrier.flow.tick = pauses.tick  # type: ignore[method-assign]
            samples = carrier.run(0, Quiet())
            times = samples.end_ns / alone_ns
            rates = samples.together_bytes_per_s
        return Shared((float(times[0]), float(times[1])), (float(rates[0]), float(rates[1]))), [samples]

    return judged(plan, run, TOLERANCE)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1)])
def test_two_priorities_share_a_link_at_its_rate(weights: tuple[int, int]) -> None:
    seen = share(weights)
    assert abs(max(seen.times) / 2 - 1) <= TOLERANCE  # the link is never idle until both are done
    assert abs(seen.second_share - weights[1] / sum(weights)) <= TOLERANCE


def test_a_strict_priority_has_the_link_as_if_alone() -> None:
    """Its negative control is the test above: with weights the same flow takes up to twice as long."""
    # What buckets let go at the beginning, and a tick after the end, is a number of frames (36 of 1536 with 6 MiB), not a share.
    seen = share((64, "strict"), size_mib=4 * SIZE_MIB)
    assert abs(seen.times[1] - 1) <= TOLERANCE
    assert seen.second_share >= 1 - TOLERANCE
    assert abs(seen.times[0] / 2 - 1) <= TOLERANCE


def test_pausing_one_priority_gives_the_other_the_link() -> None:
    seen = share((1, 1), paused=4)
    # What the second had sent before its pause began is under the tolerance; the first takes as long as alone.
    assert abs(seen.times[0] - 1) <= TOLERANCE
    assert seen.second_share <= TOLERANCE
    assert abs(seen.times[1] / 2 - 1) <= TOLERANCE


def test_pausing_a_third_priority_gives_nobody_anything() -> None:
    """Negative control: without the pause of the other, neither has the link for itself."""
    seen = share((1, 1), paused=5)
    assert seen.times[0] > 1.9
    assert abs(seen.second_share - 0.5) <= TOLERANCE
