"""Load a scenario: text to `Scenario`, or one `ScenarioError` with every mistake in it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from testbed.errors import Mistake, ScenarioError
from testbed.scenario.document import MAX_CHARACTERS, Document, read_document
from testbed.scenario.keypath import KeyPath, render_path
from testbed.scenario.kinds import RULE_ERROR
from testbed.scenario.model import UNION_TAGS, Scenario
from testbed.scenario.overrides import apply_overrides
from testbed.scenario.rules import find_violations
from testbed.scenario.schema import find_keys, find_sections

MAX_MISTAKES = 100
"""No more are explained: nobody reads on, and looking for near keys takes time."""
_LISTS = {"workload", "jobs", "faults", "flows", "commands", "figures"}
_RESULT_KEYS = {"schema_version", "scenario", "results"}  # what tells a result.json


def load_scenario(path_or_text: Path | str, overrides: Sequence[str] = (), file_name: str | None = None) -> Scenario:
    """Return the scenario that a file or text holds.

    Args:
        path_or_text: A `Path` is read. A string is the scenario's text, unless it is one line that ends in ``.yaml`` or
            ``.yml``: that is the name of a file.
        overrides: Changes such as ``"fabric.spines=8"``, applied in order.
        file_name: What messages call the file; by default its path, or ``scenario`` for text.

    Raises:
        ScenarioError: If the file cannot be read, or for all mistakes in it, in file order.
    """
    if isinstance(path_or_text, Path) or _is_file_name(path_or_text):
        name = file_name or str(path_or_text)
        text = _read_text(Path(path_or_text), name)
    else:
        name = file_name or "scenario"
        text = path_or_text
    document = read_document(text)
    if document.data is not None:
        apply_overrides(document, overrides)
    elif document.mistakes:
        raise ScenarioError(name, document.mistakes)
    scenario, mistakes = _check(document)
    if scenario is None or mistakes:
        mistakes.sort(key=lambda mistake: mistake.line)
        if len(mistakes) > MAX_MISTAKES:
            more = Mistake(0, "", f"has {len(mistakes) - MAX_MISTAKES} or more mistakes beside these")
            mistakes = [*mistakes[:MAX_MISTAKES], more]
        raise ScenarioError(name, mistakes)
    return scenario


def _is_file_name(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) and "\n" not in text and ": " not in text


def _read_text(path: Path, name: str) -> str:
    max_bytes = 4 * MAX_CHARACTERS
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or "no such file name"
        raise ScenarioError(name, [Mistake(0, "", f"cannot be read: {reason}")]) from None
    if len(content) > max_bytes:
        raise ScenarioError(name, [Mistake(0, "", f"must be at most {MAX_CHARACTERS // 1024} Ki characters long")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ScenarioError(name, [Mistake(line, "", "must be UTF-8 text")]) from None


def _check(document: Document) -> tuple[Scenario | None, list[Mistake]]:
    """Return the scenario if the document holds one, and every mistake."""
    mistakes = list(document.mistakes)
    named = {mistake.key for mistake in mistakes}

    def add(path: KeyPath, rule: str, hint: str = "", line: int | None = None) -> None:
        """Record a mistake unless its key has one already."""
        key = render_path(path)
        if key not in named or not key:
            named.add(key)
            at = document.line_of(path) if line is None else line
            mistakes.append(Mistake(at, key, rule, document.render_value(path), hint))

    if not isinstance(document.data, dict):
        add((), "must be a mapping with the keys name, fabric and workload")
        return None, mistakes
    if document.data.keys() >= _RESULT_KEYS:
        hint = "name the scenario.yaml beside it, or draw the run with `testbed graph --result`"
        return None, [Mistake(0, "", "is the result of a run, not a scenario", "", hint)]
    scenario, mistaken, errors = _validate(document.data)
    errors = errors[: MAX_MISTAKES + 1]
    unknown = [path for path, error in errors if error["type"] == "extra_forbidden"]
    for path, error in errors:
        if error["type"] == "missing":
            if any(place[:-1] == path[:-1] and _nearest_key(place) == path[-1] for place in unknown):
                continue  # given, but misspelt, which is reported
        elif not document.contains(path):
            continue  # a value derived from another key, which is reported itself
        add(path, *_explain(path, error))
    if errors and not mistakes:
        path, error = errors[0]
        add(path, *_explain(path, error))
    if scenario is not None:

        def valid(*paths: KeyPath) -> bool:
            return not any(_overlap(path, other) for path in paths for other in mistaken)

        for violation in find_violations(scenario, valid):
            add(violation.path, violation.rule, violation.hint)
    return scenario, mistakes


def _overlap(path: KeyPath, other: KeyPath) -> bool:
    shorter = min(len(path), len(other))
    return path[:shorter] == other[:shorter]


_Located = tuple[KeyPath, ErrorDetails]


def _validate(data: dict[str, Any]) -> tuple[Scenario | None, set[KeyPath], list[_Located]]:
    """Validate plain values; replace mistaken ones by stand-ins, so that the rules between keys can still be checked.

    Returns:
        A scenario (stand-ins included), the paths of mistaken values, and the errors that were found.
    """
    found: list[_Located] = []
    mistaken: set[KeyPath] = set()
    data = copy.deepcopy(data)
    for attempt in range(4):  # a replaced section may show what was wrong around it
        try:
            return Scenario.model_validate(data), mistaken, found
        except ValidationError as failure:
            located = [
                (_path_of(error["loc"]), error) for error in failure.errors(include_url=False, include_input=False)
            ]
        if attempt == 0:
            found = located
        if len(located) > MAX_MISTAKES:
            break
        for path, error in sorted(located, key=lambda item: len(item[0]), reverse=True):
            if error["type"] == "extra_forbidden":
                _remove(data, path)
            else:
                mistaken.add(path)
                _replace(data, path)
    return None, mistaken, found


def _path_of(location: tuple[int | str, ...]) -> KeyPath:
    """Return the path in the file of a pydantic location: without the tag that follows the place of a union."""
    path: list[str | int] = []
    previous: str | int = ""
    for step in location:
        is_tag = step in UNION_TAGS and (previous in ("fabric", "<message>") or isinstance(previous, int))
        if not is_tag:
            path.append(step)
        previous = step
    return tuple(path)


def _find_container(data: dict[str, Any], path: KeyPath) -> Any:
    """Return what holds the value at ``path``, or ``None``: it is derived, or was within what has been replaced."""
    container: Any = data
    for step in path[:-1]:
        try:
            container = container[step]
        except (KeyError, IndexError, TypeError):
            return None
    return container


def _remove(data: dict[str, Any], path: KeyPath) -> None:
    """Take away the unknown key at ``path``."""
    container = _find_container(data, path)
    if isinstance(container, dict):
        container.pop(path[-1], None)


def _replace(data: dict[str, Any], path: KeyPath) -> None:
    """Put a stand-in at ``path``: nothing where the key has a default, else the example of the key."""
    container = _find_container(data, path)
    last = path[-1]
    if isinstance(container, list) and isinstance(last, int) and last < len(container):
        field = _find_field(path[:-1])
        container[last] = copy.deepcopy(_example_of(field)[0])
    elif isinstance(container, dict):
        container.pop(last, None)
        field = _find_field(path)
        if field is not None and field.is_required():
            container[last] = copy.deepcopy(_example_of(field))


def _example_of(field: Any) -> Any:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return extra["examples"][0]


def _sections_at(path: KeyPath) -> list[type[BaseModel]]:
    """Return the sections that may stand at ``path``."""
    sections: list[type[BaseModel]] = [Scenario]
    for step in path:
        if isinstance(step, int):
            continue
        fields = [find_keys(section).get(str(step)) for section in sections]
        sections = [inner for field in fields if field is not None for inner in find_sections(field.annotation)]
    return sections


def _find_field(path: KeyPath) -> Any:
    """Return the pydantic field of the key at ``path``, or ``None``."""
    for section in _sections_at(path[:-1]):
        field = find_keys(section).get(str(path[-1]))
        if field is not None:
            return field
    return None


def _explain(path: KeyPath, error: ErrorDetails) -> tuple[str, str]:
    """Return rule and hint for a pydantic error, in words of ours."""
    kind = error["type"]
    if kind == RULE_ERROR:
        context = error.get("ctx", {})
        return str(context["rule"]), str(context["hint"])
    if kind == "missing":
        return "is required", _suggest_missing(path)
    if kind == "extra_forbidden":
        return _explain_unknown_key(path, error)
    if kind in ("tuple_type", "list_type"):
        return "must be a list", ""
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = _known_keys(path)
        return f"must be a mapping with keys such as {', '.join(keys[:4])}" if keys else "must be a mapping", ""
    return "is not valid", ""


def _suggest_missing(path: KeyPath) -> str:
    if path[-1] == "collective":
        return (
            "give `collective`, `pattern` or `application`"
            if path[0] == "workload"
            else "give `collective` or `pattern`"
        )
    field = _find_field(path)
    example = _example_of(field) if field is not None else None
    return f"add `{path[-1]}: {example}`" if isinstance(example, str | int) else ""


def _explain_unknown_key(path: KeyPath, error: ErrorDetails) -> tuple[str, str]:
    key = str(path[-1])
    sections = _sections_at(path[:-1])
    if any(key in find_keys(section) for section in sections):  # a key of another kind of the same thing
        if "<star>" in error["loc"]:
            return "does not exist in a star, which has one switch", "remove it, or use `kind: clos`"
        return "does not exist in this kind of item", "remove it"
    if near := _nearest_key(path):
        return "is not a known key", f"did you mean {near}?"
    elsewhere = next((render_path(place) for place in _walk_keys(Scenario, ()) if place[-1] == key), "")
    if elsewhere:
        return "is not a known key", f"write it as {elsewhere}"
    return "is not a known key", f"known here: {', '.join(_known_keys(path[:-1]))}"


def _known_keys(path: KeyPath) -> list[str]:
    return sorted({name for section in _sections_at(path) for name in find_keys(section)})


def _nearest_key(path: KeyPath) -> str:
    """Return the known key that an unknown one resembles, or ``""``."""
    near = difflib.get_close_matches(str(path[-1]), _known_keys(path[:-1]), n=1)
    return near[0] if near else ""


def _walk_keys(section: type[BaseModel], place: KeyPath) -> Iterator[KeyPath]:
    for key, field in find_keys(section).items():
        here: KeyPath = (*place, key)
        yield here
        items: KeyPath = (*here, 0) if key in _LISTS else here
        for inner in find_sections(field.annotation):
            yield from _walk_keys(inner, items)
