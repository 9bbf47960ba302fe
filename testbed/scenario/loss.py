"""Random loss on links in the scenario: gray failures, where a link is up and loses frames."""

from __future__ import annotations

from enum import StrEnum
from fractions import Fraction
from typing import Annotated

from testbed.scenario import kinds
from testbed.scenario.section import Section, key

_FRACTION = kinds.fraction(Fraction(1))
_LINK = kinds.text(40, r"[A-Za-z0-9:/._-]+", 'must be a node or link such as "leaf0" or "leaf0:spine1"')


class LostFrames(StrEnum):
    """Which frames random loss takes."""

    ALL = "all"
    DATA = "data"


class LinkLoss(Section):
    """Random loss on a link."""

    link: Annotated[str, _LINK] = key("link", "The link.", example="leaf0:spine0")
    fraction: Annotated[Fraction, _FRACTION] = key("fraction", "Share of the packets that are lost.", example="1/100")
