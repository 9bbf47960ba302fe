"""Paths of keys in a scenario: ``workload[0].size`` as text, ``("workload", 0, "size")`` as a tuple."""

from __future__ import annotations

import re
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]

_STEP = re.compile(r"([^.\[\]]+)((?:\[[0-9]{1,6}\])*)")
_MAX_SHOWN = 60


def render_path(path: KeyPath) -> str:
    """Return a path as users write it, such as ``workload[0].size``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = render_printable(step) or '""'
            text += f".{name}" if text else name
    return text


def parse_path(text: str) -> KeyPath | None:
    """Return the path that ``text`` names, or ``None`` if it names none.

    List items are written ``workload[0].size`` or ``workload.0.size``.
    """
    steps: list[str | int] = []
    for part in text.strip().split("."):
        match = _STEP.fullmatch(part)
        if match is None:
            return None
        name = match[1]
        steps.append(int(name) if steps and re.fullmatch("[0-9]{1,6}", name) else name)
        steps.extend(int(index) for index in re.findall("[0-9]+", match[2]))
    return tuple(steps)


def render_printable(text: str) -> str:
    """Return text that is safe to show on one line: short, with control characters escaped."""
    if len(text) > _MAX_SHOWN:
        text = text[: _MAX_SHOWN - 1] + "…"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode("ascii")
        for char in text
    )
