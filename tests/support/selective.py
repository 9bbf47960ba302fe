"""A selective responder and the requester's note of its SACKs, packet by packet with sets: the reference for the eBPF program."""

from __future__ import annotations

from dataclasses import dataclass, field

from testbed.roce.sack import SACK_PACKETS

WINDOW = 4096
LATE = 64


@dataclass(frozen=True)
class Answer:
    """One ACK: packets received in order, messages of these, and the first and the named packets of a SACK."""

    in_order: int
    messages: int
    first: int | None = None
    named: frozenset[int] = frozenset()


@dataclass
class Responder:
    """Takes packets by number in any order.

    Attributes:
        ends: Numbers of the last packets of messages.
    """

    ends: frozenset[int]
    received: set[int] = field(default_factory=set)
    in_order: int = 0
    out_of_order: int = 0
    duplicates: int = 0
    beyond: int = 0
    highest: int = 0  # packets up to the highest of those that came when something was missing

    @property
    def messages(self) -> int:
        return sum(1 for end in self.ends if end < self.in_order)

    def receive(self, number: int, asks: bool) -> Answer | None:
        """Take a packet; return the answer, if there is one."""
        if number - self.in_order >= WINDOW:
            self.beyond += 1
            return None
        acknowledged = number < self.in_order
        if number in self.received:
            self.duplicates += 1
        else:
            self.received.add(number)
            self.out_of_order += number != self.in_order
            if number != self.in_order or self.highest > self.in_order:
                self.highest = max(self.highest, number + 1)
                asks |= number + LATE < self.highest
            while self.in_order in self.received:
                self.in_order += 1
        if not asks:
            return None
        beyond = {one for one in self.received if one >= self.in_order}
        if not beyond:
            return Answer(self.in_order, self.messages)
        last = max(beyond) if acknowledged or number < self.in_order else number
        first = last - SACK_PACKETS + 1
        return Answer(self.in_order, self.messages, first, frozenset(one for one in beyond if first <= one <= last))


@dataclass
class Requester:
    """What a requester knows after some answers."""

    acked: int = 0
    named: set[int] = field(default_factory=set)
    sacked_until: int = 0

    def hear(self, answer: Answer) -> None:
        self.acked = max(self.acked, answer.in_order)
        self.named |= answer.named
        self.named = {one for one in self.named if one >= self.acked}
        if answer.first is not None and answer.first + SACK_PACKETS > self.acked:
            self.sacked_until = max(self.sacked_until, answer.first + SACK_PACKETS)
