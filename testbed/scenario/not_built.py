"""Keys and values that the format knows but this version does not act on yet.

One line per mechanism: whoever builds it deletes the line. A line names a key, the values that need the mechanism, and
what is missing. ``[*]`` stands for every item of a list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from testbed.scenario.keypath import KeyPath, parse_path


class NotBuilt(NamedTuple):
    """One mechanism that is not built yet: where it is asked for, by which values, and what it is."""

    key: str
    needs_it: Callable[[Any], bool]
    missing: str


def given(value: Any) -> bool:
    """Any value at all asks for the mechanism."""
    return value is not None


def filled(value: Any) -> bool:
    """A list asks for the mechanism unless it is empty."""
    return value is not None and value != []


def among(*values: object) -> Callable[[Any], bool]:
    """Return a predicate: one of ``values`` asks for the mechanism."""
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def metric(*names: str) -> Callable[[Any], bool]:
    """Return a predicate: an expectation about one of ``names`` asks for the mechanism."""
    return lambda value: isinstance(value, str) and re.split(r"[\s=!<>]", value.strip(), maxsplit=1)[0] in names


NOT_BUILT: tuple[NotBuilt, ...] = ()


def find_not_built(data: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yield what a scenario asks for and this version lacks.

    Args:
        data: The plain values of the file.

    Yields:
        Path of the value, and what is missing.
    """
    for row in NOT_BUILT:
        path = parse_path(row.key.replace("[*]", ".*"))
        assert path is not None, row.key
        for place, value in _find_values(data, path, ()):
            if row.needs_it(value):
                yield place, row.missing


def _find_values(data: Any, pattern: KeyPath, place: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if not pattern:
        yield place, data
    elif pattern[0] == "*":
        if isinstance(data, list):
            for index, item in enumerate(data):
                yield from _find_values(item, pattern[1:], (*place, index))
    elif isinstance(data, dict) and pattern[0] in data:
        yield from _find_values(data[pattern[0]], pattern[1:], (*place, pattern[0]))
