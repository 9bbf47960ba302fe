"""What breaks while traffic runs: a section per kind of fault."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from testbed.scenario import kinds
from testbed.scenario.loss import LinkLoss
from testbed.scenario.section import Section, key

_RATE = kinds.rate(10**6, 1_600 * 10**9)
_TIME = kinds.time(0, 3600 * 10**9)
_DURATION = kinds.time(1, 3600 * 10**9)
_LINK = kinds.text(40, r"[A-Za-z0-9:/._-]+", 'must be a link such as "leaf0:spine1"')
_NODE = kinds.text(40, r"[A-Za-z0-9:/._-]+", 'must be a node such as "spine1"')
_TARGET = kinds.text(40, r"[A-Za-z0-9:/._-]+", 'must be a node or link such as "leaf0" or "leaf0:spine1"')

MAX_FLAPS = 1000
"""Times that a fault may go up and down."""


class FaultKind(StrEnum):
    """What kinds of faults there are; an item of the list has exactly one of these keys."""

    LINK_DOWN = "link_down"
    SWITCH_DOWN = "switch_down"
    FLAP = "flap"
    LOSS = "loss"
    RATE = "rate"
    SLOW_RECEIVER = "slow_receiver"
    HEAL = "heal"


class LinkFlap(Section):
    """A link that goes down and up again, over and over."""

    link: Annotated[str, _LINK] = key("link", "The link.", example="leaf0:spine0")
    down_ns: Annotated[int, _DURATION] = key("down", "How long it is down each time.", example="50 us")
    up_ns: Annotated[int, _DURATION] = key("up", "How long it is up in between.", example="200 us")


class LinkRate(Section):
    """A link that has become slower, in either direction, as with a degraded optic: it stays up."""

    link: Annotated[str, _LINK] = key("link", "The link.", example="leaf0:spine0")
    rate_bits_per_s: Annotated[int, _RATE] = key("rate", "Its rate from now on.", example="100 Gbit/s")


class SlowReceiver(Section):
    """A host that takes frames more slowly than its link carries them: what waits stands in its leaf."""

    host: Annotated[str, _NODE] = key("host", "The host.", example="host0")
    rate_bits_per_s: Annotated[int, _RATE] = key("rate", "What it can take.", example="100 Gbit/s")


class Fault(Section):
    """Something that breaks while traffic runs, or that is repaired."""

    at_ns: Annotated[int, _TIME] = key(
        "at",
        "When, counted from the release of every measured iteration. What is broken at 0 and has no `for` is broken from the "
        "beginning: routing has reacted to it, and warm-up iterations have it too.",
        example="2 ms",
    )
    for_ns: Annotated[int | None, _DURATION] = key(
        "for", "For how long; without it, until it is healed or the iteration ends.", default=None
    )
    link_down: Annotated[str | None, _LINK] = key("link_down", "Link that goes down.", default=None)
    switch_down: Annotated[str | None, _NODE] = key(
        "switch_down",
        "Switch that goes down, and with it all its links and all that stands in its queues.",
        default=None,
    )
    flap: LinkFlap | None = key("flap", "Link that goes down and up; needs `for`.", default=None)
    loss: LinkLoss | None = key("loss", "Link that loses packets at random.", default=None)
    rate: LinkRate | None = key("rate", "Link that becomes slower.", default=None)
    slow_receiver: SlowReceiver | None = key("slow_receiver", "Host that receives slowly.", default=None)
    heal: Annotated[str | None, _TARGET] = key(
        "heal", "Link, switch or host all of whose faults end here; takes no `for`.", default=None
    )

    @property
    def kinds(self) -> tuple[FaultKind, ...]:
        """Return the kinds that are given: one, in a valid file."""
        return tuple(kind for kind in FaultKind if getattr(self, str(kind)) is not None)

    @property
    def target(self) -> str:
        """Return the link, switch or host that it is about."""
        value = getattr(self, str(self.kinds[0]))
        return value if isinstance(value, str) else str(getattr(value, "host", None) or value.link)
