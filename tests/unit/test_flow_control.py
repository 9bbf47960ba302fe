"""PFC in the tick: refresh, expiry, watchdog, and priorities that pause each for itself. No kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from testbed.engine.data_queues import DataQueues
from testbed.engine.flow_control import MAX_QUANTA, FlowControl, PausableLink, QueueKey, WatchdogSetup
from testbed.kernel import layout

TICK_NS = 1_000_000
SENDER, RECEIVER = 1, 2
QUANTUM_NS = 1_000.0  # 65535 of them are 65 ticks
DELAY_NS = 2 * TICK_NS


class Fabric:
    """Arrays, gates and a wire without a fabric: a frame that is sent is noted at the other end at once."""

    def __init__(self, priorities: Sequence[int] = (3,), watchdog: WatchdogSetup | None = None) -> None:
        self.queues: npt.NDArray[Any] = np.zeros((3, 8), layout.QUEUE)
        self.ingress: npt.NDArray[Any] = np.zeros((3, 8), layout.INGRESS)
        self.sent: list[tuple[int, int, int, int]] = []
        self.moves: list[tuple[int, str, QueueKey]] = []
        self.now_ns = 0
        links = [PausableLink(SENDER, RECEIVER, priority, DELAY_NS, QUANTUM_NS, 0) for priority in priorities]
        self.flow = FlowControl(
            links,
            queues=self.queues,
            ingress=self.ingress,
            gates=self,
            sender=self,
            wall_tick_ns=TICK_NS,
            watchdog=watchdog,
        )

    def send(self, port: int, priority: int, quanta: int) -> None:
        self.sent.append((self.now_ns, port, priority, quanta))
        self.hear(priority, quanta)

    def hear(self, priority: int, quanta: int) -> None:
        row = self.queues[SENDER, priority : priority + 1]
        row["pause_frames"] += 1
        row["pause_quanta"], row["pause_received_ns"] = quanta, self.now_ns

    def move(self, close: Sequence[QueueKey], open: Sequence[QueueKey]) -> None:
        self.moves += [(self.now_ns, "close", key) for key in close] + [(self.now_ns, "open", key) for key in open]

    def cross(self, priority: int, *, xoff: bool) -> None:
        row = self.ingress[RECEIVER, priority : priority + 1]
        row["xoff"], row["changed_ns"] = xoff, self.now_ns
        row["changes"] += 1

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            self.now_ns += TICK_NS
            self.flow.tick(self.now_ns)


def test_pause_is_refreshed_before_it_expires_and_the_gate_stays_closed() -> None:
    fabric = Fabric()
    fabric.run(1)
    fabric.cross(3, xoff=True)
    fabric.run(300)
    times = [now for now, _, _, quanta in fabric.sent if quanta == MAX_QUANTA]
    assert len(times) > 5
    assert max(np.diff(times)) < MAX_QUANTA * QUANTUM_NS
    assert [word for _, word, _ in fabric.moves] == ["close"]
    assert fabric.flow.closed[SENDER, 3]
    assert fabric.flow.expired_pauses == 0
    fabric.cross(3, xoff=False)
    fabric.run(5)
    assert fabric.sent[-1][1:] == (RECEIVER, 3, 0)
    assert fabric.moves[-1][1:] == ("open", (SENDER, 3))


def test_pause_without_refresh_ends_when_its_quanta_have() -> None:
    fabric = Fabric()
    fabric.run(1)
    fabric.hear(3, 10_000)  # ten ticks, by somebody else
    heard_ns = fabric.now_ns
    fabric.run(30)
    (closed_ns, opened_ns) = (now for now, _, _ in fabric.moves)
    assert closed_ns == heard_ns + DELAY_NS
    assert opened_ns == heard_ns + DELAY_NS + 10_000 * QUANTUM_NS
    assert fabric.flow.expired_pauses == 1


def test_gate_moves_the_delay_after_the_threshold_was_crossed() -> None:
    fabric = Fabric()
    fabric.run(5)
    fabric.cross(3, xoff=True)
    fabric.ingress["changed_ns"][RECEIVER, 3] = fabric.now_ns - TICK_NS  # seen a tick late
    fabric.run(3)
    assert fabric.moves[0][0] == fabric.now_ns - 2 * TICK_NS
    assert fabric.flow.lateness_ns == [0]


def test_priorities_pause_each_for_itself() -> None:
    fabric = Fabric(priorities=(3, 4))
    fabric.run(1)
    fabric.cross(4, xoff=True)
    fabric.run(10)
    assert {(port, priority) for _, port, priority, _ in fabric.sent} == {(RECEIVER, 4)}
    assert fabric.flow.closed[SENDER, 4]
    assert not fabric.flow.closed[SENDER, 3]
    fabric.cross(3, xoff=True)
    fabric.cross(4, xoff=False)
    fabric.run(10)
    assert fabric.flow.closed[SENDER, 3]
    assert not fabric.flow.closed[SENDER, 4]
    assert fabric.flow.paused_until(fabric.now_ns)[SENDER].nonzero()[0].tolist() == [3, 4]


@pytest.mark.parametrize("drops", [True, False])
def test_watchdog_steps_in_for_the_priority_that_stays_paused(drops: bool) -> None:
    fabric = Fabric(priorities=(3, 4), watchdog=WatchdogSetup(20 * TICK_NS, 30 * TICK_NS, drops))
    fabric.run(1)
    fabric.cross(4, xoff=True)
    fabric.run(18)
    assert fabric.flow.watchdog_releases == 0
    fabric.run(10)
    assert fabric.flow.watchdog_releases == 1
    assert not fabric.flow.closed.any()
    discards = fabric.queues["discard"][SENDER] != 0
    assert discards.tolist() == [drops and priority == 4 for priority in range(8)]
    # The storm goes on, refreshed: pauses are not obeyed. A while after its end they are again.
    fabric.run(200)
    assert not fabric.flow.closed.any()
    fabric.cross(4, xoff=False)
    fabric.run(40)
    assert not fabric.queues["discard"].any()
    fabric.cross(4, xoff=True)
    fabric.run(5)
    assert fabric.flow.closed[SENDER, 4]


# --- how a NIC shares its rate -------------------------------------------------------------------------------------------


def shares(weights: Mapping[int, int | None], sendable: Sequence[int], budget: int, ticks: int) -> list[int]:
    """Return what each lane of one NIC was given over some ticks."""
    data = DataQueues(np.zeros((2, 8), layout.QUEUE), np.array([1]), weights)
    total = np.zeros(len(weights), np.int64)
    for _ in range(ticks):
        given = data.share(np.array([budget]), np.array(sendable))
        assert given.sum() <= budget
        assert (given <= sendable).all()
        total += given
    return [int(one) for one in total]


@pytest.mark.parametrize("budget", [1, 3, 7, 10])
@pytest.mark.parametrize("weights", [{3: 1, 4: 1}, {0: 1, 3: 3}, {1: 1, 2: 2, 3: 5}])
def test_lanes_share_a_nic_by_weight_to_a_frame(weights: dict[int, int], budget: int) -> None:
    ticks = 400
    given = shares(weights, [1000] * len(weights), budget, ticks)
    total = sum(weights.values())
    for one, weight in zip(given, weights.values(), strict=True):
        assert abs(one - budget * ticks * weight / total) <= len(weights) + 1


def test_frames_due_together_beside_an_idle_lane_stay_within_the_budget() -> None:
    assert shares({1: 1, 2: 1, 3: 1}, [0, 1000, 1000], 1, 100) == pytest.approx([0, 50, 50], abs=1)


def test_strict_lanes_go_first_and_the_higher_number_before_the_lower() -> None:
    weights = {0: 1, 1: None, 3: 3, 5: None}
    assert shares(weights, [1000, 1000, 1000, 1000], 10, 100) == [0, 0, 0, 1000]
    assert shares(weights, [1000, 1000, 1000, 4], 10, 100) == [0, 600, 0, 400]
    assert shares(weights, [1000, 1, 1000, 1], 10, 100) == [200, 100, 600, 100]
    # Negative control: with weights instead, the lane of 5 does not get the 4 that it has.
    assert shares({0: 1, 1: 1, 3: 3, 5: 1}, [1000, 1000, 1000, 4], 10, 100)[3] == pytest.approx(1000 / 6, abs=5)


def test_what_one_lane_cannot_use_the_others_get() -> None:
    assert shares({3: 1, 4: 1}, [1000, 0], 10, 100) == [1000, 0]
    assert shares({3: 1, 4: 1}, [1000, 2], 10, 100) == [800, 200]
