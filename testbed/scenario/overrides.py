"""``--set key=value``: changes to a scenario's values before they are checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from testbed.errors import Mistake
from testbed.scenario.document import MAX_DEPTH, Document, place_value, read_document
from testbed.scenario.keypath import KeyPath, parse_path, render_path, render_printable


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Apply overrides to a document, in order; what cannot be applied becomes a mistake of the document.

    The key is a full path, ``fabric.spines`` or ``workload[0].size`` (also ``workload.0.size``); sections that the file
    leaves out are added. The value is read as YAML. Whether the key exists and the value fits is left to the checks
    that the file's own values go through.

    Args:
        document: Changed in place.
        overrides: Texts such as ``"fabric.spines=8"``.
    """
    for override in overrides:
        mistake = _apply_override(document, override)
        if mistake is not None:
            document.mistakes.append(mistake)


def _apply_override(document: Document, override: str) -> Mistake | None:
    name, equals, text = override.partition("=")
    path = parse_path(name)
    if not equals or path is None or len(path) > MAX_DEPTH:
        rule = 'must be a key and a value such as "fabric.spines=8"'
        return Mistake(0, "--set", rule, f'"{render_printable(override)}"')
    source = read_document(text)
    if source.mistakes:
        return Mistake(0, render_path(path), f"{source.mistakes[0].rule} (--set)", f'"{render_printable(text)}"')
    if not isinstance(document.data, dict):
        return None  # the file itself is no mapping, which is reported
    reached = _open_containers(document, path)
    if isinstance(reached, Mistake):
        return reached
    place_value(document, path, source)
    return None


def _open_containers(document: Document, path: KeyPath) -> Mistake | None:
    """Add the mappings and list items that lead to ``path``, or say why they cannot be."""
    value: Any = document.data
    for depth, step in enumerate(path):
        where = render_path(path[: depth + 1])
        if isinstance(step, int):
            if not isinstance(value, list):
                return Mistake(0, where, "does not exist: there is no list here (--set)")
            if step > len(value):
                return Mistake(0, where, f"does not exist: the list has {len(value)} items (--set)")
            is_present = step < len(value)
        else:
            if not isinstance(value, dict):
                return Mistake(0, where, "does not exist: there is no mapping here (--set)")
            is_present = step in value
        if depth == len(path) - 1:
            return None
        if not is_present:
            section = Document(data=[] if isinstance(path[depth + 1], int) else {}, lines={(): 0})
            place_value(document, path[: depth + 1], section)
        value = value[step]
    return None
