"""What a rule between keys says that does not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from testbed.scenario.keypath import KeyPath


class Violation(NamedTuple):
    """A rule that does not hold: the key to name, the rule in words, a hint."""

    path: KeyPath
    rule: str
    hint: str = ""


Valid = Callable[..., bool]
"""``valid(*paths)``: whether none of these keys is itself mistaken."""
