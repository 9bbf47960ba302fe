"""What go-back-N makes of Bernoulli loss on data: the expected value, and the same packet by packet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def expected_slots(packets: int, loss: float, rewind_packets: float, timeout_slots: float) -> float:
    """Return the expected time to deliver a stream by go-back-N, in packet times, without its latency.

    Every packet fails ``p / (1 - p)`` times before it arrives in order. A failure costs what is sent from the lost packet to the
    rewind, and is repaired quickly however often it happens, for the responder refuses anew. Behind the last packet nothing comes
    that could be refused: its failures cost a timeout.

    Args:
        packets: Packets of the stream.
        loss: Probability ``p`` that a data packet is lost.
        rewind_packets: Packets from a lost one to the rewind, it included: ``W`` and one.
        timeout_slots: Retransmission timeout, in packet times.
    """
    failures = loss / (1.0 - loss)
    return packets + (packets - 1) * failures * rewind_packets + failures * timeout_slots


@dataclass(frozen=True)
class Delivered:
    """What a simulation counted: packet times, packets sent again, rewinds by NAK, losses."""

    slots: int
    resent: int
    rewinds: int
    lost: int


def simulate_go_back_n(
    packets: int, loss: float, loop_slots: int, timeout_slots: int, rng: np.random.Generator
) -> Delivered:
    """Deliver a stream packet by packet: one is sent in each packet time, NAKs and ACKs take ``loop_slots``."""
    sent = expected = highest = high_water = armed = 0
    resent = rewinds = lost = 0
    acked, progress = 0, 0
    feedback: list[tuple[int, int, bool]] = []  # when it arrives, packets in order, whether it is a NAK
    slot = 0
    while expected < packets:
        while feedback and feedback[0][0] <= slot:
            _, position, refused = feedback.pop(0)
            if position > acked:
                acked, progress = position, slot
            sent = max(sent, acked)
            if refused and position < sent:
                sent, progress = position, slot
                rewinds += 1
        if sent > acked and slot - progress > timeout_slots:
            sent, progress = acked, slot
        if sent < packets:
            resent += sent < high_water
            if rng.random() < loss:
                lost += 1
            elif sent == expected:
                expected += 1
                feedback.append((slot + loop_slots, expected, False))
            elif sent > expected:
                if armed != expected + 1 or sent + 1 <= highest:
                    armed = expected + 1
                    feedback.append((slot + loop_slots, expected, True))
                highest = sent + 1
            sent += 1
            high_water = max(high_water, sent)
        slot += 1
    return Delivered(slot, resent, rewinds, lost)
