"""Loss recovery of the engine without a fabric: the timer, what is lost and what is only late."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from testbed.carriers.engine import describe_connection, explained_error
from testbed.engine.recovery import RETRY_LIMIT, GoBackN, Selective
from testbed.errors import RunError
from testbed.kernel.layout import QP, WINDOW
from testbed.plan.compile import compile_plan
from testbed.scenario import load_scenario

TICK, LOOP, REORDER, TIMEOUT = 10, 100, 50, 1000


class Writer:
    """Stands for the frames."""

    def __init__(self) -> None:
        self.again: list[int] = []

    def rewind(self, qps: npt.NDArray[np.int64], sent: npt.NDArray[np.int64]) -> None:
        """Do nothing."""

    def write_again(self, qp: int, packets: npt.NDArray[np.int64]) -> int:
        self.again += packets.tolist()
        return 0

    def wire_bytes(self, qp: int, packets: npt.NDArray[np.int64]) -> int:
        return 100 * len(packets)


class Bench:
    """One QP under selective recovery, and what its responder has told."""

    def __init__(self) -> None:
        self.table, self.windows = np.zeros(1, QP), np.zeros(1, WINDOW)
        self.writer = Writer()
        self.recovery = Selective(
            1,
            self.writer,  # type: ignore[arg-type]
            TIMEOUT,
            lambda qp: f"QP {qp}",
            table=self.table,
            windows=self.windows["received"],
            send=lambda qp, slot, frames: frames,
            wall_delay_ns=np.array([LOOP + REORDER]),
            wall_tick_ns=TICK,
        )
        self.now = 0
        self.recovery.restart(0, np.zeros(1, np.int64), np.zeros((4, 1), np.int64))
        self.run(TICK)  # the first snapshot counts at once

    def send(self, packets: int) -> None:
        self.recovery.note_sent(np.array([packets]))

    def tell(self, in_order: int, named: Sequence[int] = ()) -> None:
        self.table["acked_packets"] = in_order
        for number in named:
            self.windows["received"][0, number >> 6] |= np.uint64(1 << (number & 63))
        self.table["sacked_until"] = max(int(self.table["sacked_until"][0]), *(one + 1 for one in named), 0)

    def run(self, until: int) -> list[int]:
        """Let time pass; return the packets that were sent again."""
        self.writer.again.clear()
        while self.now < until:
            self.now += TICK
            self.recovery.hear(self.now, np.array([[int(self.table["acked_packets"][0])], [0], [0], [0]]))
            if self.now % (8 * TICK) == 0:
                self.recovery.check_timeouts(self.now, self.recovery.sent)
            if self.recovery.resending:
                self.recovery.resend(np.array([8]))
        return list(self.writer.again)


def test_a_gap_is_resent_once_and_only_after_the_reorder_time() -> None:
    bench = Bench()
    bench.send(100)
    bench.tell(10, [11, 12, 14])
    assert bench.run(LOOP + REORDER - TICK) == []
    assert bench.run(LOOP + REORDER + 3 * TICK) == [10, 13]
    assert bench.run(LOOP + REORDER + 20 * TICK) == []
    assert bench.recovery.retransmitted_packets == 2


def test_what_comes_late_is_not_resent() -> None:
    bench = Bench()
    bench.send(100)
    bench.tell(10, [11, 12])
    bench.run(LOOP)
    bench.tell(13)  # 10 has come: only overtaken
    assert bench.run(LOOP + 8 * REORDER) == []


def test_a_lost_retransmission_is_found_by_what_left_behind_it() -> None:
    bench = Bench()
    bench.send(100)
    bench.tell(10, [11])
    assert bench.run(LOOP + REORDER + 2 * TICK) == [10]
    bench.send(20)
    bench.tell(10, [99])  # left before
    assert bench.run(2 * (LOOP + REORDER) + 2 * TICK)[:1] == [12]
    bench.tell(10, [101])  # left after
    assert 10 in bench.run(3 * (LOOP + REORDER) + 4 * TICK)


def test_timer_probes_with_the_first_missing_packet_and_the_last() -> None:
    bench = Bench()
    bench.send(64)
    bench.tell(10)
    assert bench.run(TIMEOUT + 20 * TICK) == [10, 63]
    assert bench.recovery.timeouts == 1


def test_more_than_the_window_is_never_under_way() -> None:
    bench = Bench()
    released = np.array([10_000])
    assert bench.recovery.wants(released).tolist() == [4096]
    bench.send(4096)
    assert bench.recovery.wants(released).tolist() == [0]


def test_retries_end_in_an_error_that_names_the_queue_pair() -> None:
    bench = Bench()
    bench.send(64)
    with pytest.raises(RunError, match=rf"QP 0: no ACK after {RETRY_LIMIT} retries"):
        bench.run((RETRY_LIMIT + 3) * (TIMEOUT + 20 * TICK))


def go_back_n() -> GoBackN:
    recovery = GoBackN(1, Writer(), TIMEOUT, lambda qp: f"QP {qp}")  # type: ignore[arg-type]
    recovery.restart(0, np.zeros(1, np.int64), np.zeros((4, 1), np.int64))
    return recovery


def test_no_timer_runs_while_no_ack_was_asked_for() -> None:
    recovery = go_back_n()
    for now in range(TICK, 5 * TIMEOUT, TICK):  # a packet now and then: slower than the timeout for 32 of them
        if now % (TIMEOUT // 2) == 0:
            recovery.note_sent(np.array([1]))
        recovery.check_timeouts(now, np.array([1000]))
    assert recovery.timeouts == 0


def test_one_that_may_not_send_on_goes_back_without_losing_a_retry() -> None:
    recovery = go_back_n()
    recovery.note_sent(np.array([5]))
    for now in range(TICK, 20 * TIMEOUT, TICK):
        recovery.check_timeouts(now, np.array([1000]))
        recovery.note_sent(5 - recovery.sent)
    assert recovery.timeouts > RETRY_LIMIT
    assert recovery.retransmitted_packets == 5 * recovery.timeouts


# --- the automatic timeout, and what an error names ----------------------------------------------------------------------

SCENARIO = """
name: timeout
fabric: {kind: clos, leaves: 2, spines: 1, hosts_per_leaf: 8, host_link: {rate: 400 Gbit/s}, switch: {buffer: 256 KiB}}
workload: [{pattern: incast, fan_in: 15, size: 1 MiB}]
time_dilation: 400
"""


def test_automatic_timeout_outlasts_a_stalled_machine_and_paused_nics() -> None:
    plain = compile_plan(load_scenario(SCENARIO), capacity_packets_per_s=None)
    assert plain.retransmit_timeout_ns * plain.dilation.value >= 64 * plain.dilation.wall_tick_ns
    slow = compile_plan(load_scenario(SCENARIO, ["time_dilation=100000"]), capacity_packets_per_s=None)
    paused = compile_plan(
        load_scenario(SCENARIO, ["time_dilation=100000", "qos.pfc.enabled=true", "qos.pfc.headroom=1 KiB"]),
        capacity_packets_per_s=None,
    )
    # What 15 NICs hold in their queues goes through one link.
    frame_ns = 8 * plain.frame_wire_bytes / 400
    assert paused.retransmit_timeout_ns - slow.retransmit_timeout_ns == pytest.approx(15 * 48 * frame_ns, rel=0.01)


def test_error_names_ranks_queue_pair_and_the_link_that_lost_most() -> None:
    plan = compile_plan(load_scenario(SCENARIO), capacity_packets_per_s=None)
    lost = np.zeros(len(plan.topology.ports) + 1, np.int64)
    uplink, other = plan.topology.link("leaf1:spine0"), plan.topology.link("host1:leaf0")
    lost[uplink.a], lost[other.a] = 5, 50
    index = next(
        index
        for index, connection in enumerate(plan.workloads[0].connections)
        if connection.requester.local.rank == 12  # under the other leaf
    )
    text = describe_connection(plan, 0, index, lost)
    assert "rank 12 to 0, QP 0x" in text
    assert text.endswith("most frames were lost on leaf1:spine0, 5 from leaf1/up0")
    assert "lost" not in describe_connection(plan, 0, index, np.zeros_like(lost))


def test_error_says_when_full_buffers_dropped_frames() -> None:
    plan = compile_plan(load_scenario(SCENARIO), capacity_packets_per_s=None)
    error = RunError("rank 12 to 0: no ACK after 7 retries")
    explained = explained_error(error, plan, None, drops_packets=5)
    assert explained.message == "rank 12 to 0: no ACK after 7 retries; full buffers dropped 5 frames"
    assert "qos.pfc.enabled" in (explained.hint or "")
    assert explained_error(error, plan, None, drops_packets=0) is error
