"""Plain values with their places in the file: YAML 1.2 read into dicts, lists and scalars.

Only ruamel's parser is used, not its constructors: scalars are resolved here by the YAML 1.2 core schema, so a date or
``yes`` is text, and nothing in a file can create an object. Work on hostile input is bounded.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from testbed.errors import Mistake
from testbed.scenario.keypath import KeyPath, render_path, render_printable

MAX_CHARACTERS = 256 * 1024
"""A scenario of 1024 hosts with explicit flows fits; ruamel's parser needs about ten seconds for it."""

MAX_VALUES = 50_000
"""Values after aliases are expanded: bounds the "billion laughs"."""

MAX_DEPTH = 64

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_DECIMAL = re.compile(r"[-+]?[0-9]{1,40}", re.ASCII)
_OCTAL = re.compile(r"0o[0-7]{1,40}", re.ASCII)
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]{1,40}", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,40}|[0-9]{1,40}(\.[0-9]{0,40})?)([eE][-+]?[0-9]{1,10})?", re.ASCII)
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "timestamp", "merge", "value")}
_TEXT_TAG = "tag:yaml.org,2002:str"
_CONTAINER_TAGS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


@dataclass
class Document:
    """The values of a scenario and where each was written.

    Attributes:
        data: Dicts with text keys, lists, text, integers, floats, booleans, ``None``; no two places share a container.
        lines: Line of each value, 1-based; 0 for what came from ``--set``.
        texts: Each scalar as it was written.
        mistakes: What could not be read.
    """

    data: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def line_of(self, path: KeyPath) -> int:
        """Return the line of the value at ``path``, or of the nearest thing around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return 0

    def contains(self, path: KeyPath) -> bool:
        """Return whether there is a value at ``path``."""
        return path in self.lines

    def render_value(self, path: KeyPath) -> str:
        """Return the value at ``path`` as it was written, on one line, or ``""`` when there is none."""
        if path not in self.lines:
            return ""
        origin = "" if self.lines[path] else " (from --set)"
        return self._render_value(path) + origin

    def _render_value(self, path: KeyPath) -> str:
        value = self.data
        for step in path:
            value = value[step]
        if value is None:
            return "nothing"
        if isinstance(value, dict):
            return "a mapping"
        if isinstance(value, list):
            shown = ", ".join(str(item) for item in value[:20])
            is_short = all(isinstance(item, int | str) for item in value) and len(value) <= 20
            return render_printable(f"[{shown}]") if is_short else "a list"
        shown = render_printable(self.texts.get(path, str(value)))
        return f'"{shown}"' if isinstance(value, str) else shown


def read_document(text: str) -> Document:
    """Return the document that YAML text holds; what cannot be read is among its mistakes."""
    document = Document()
    if len(text) > MAX_CHARACTERS:
        document.mistakes.append(Mistake(0, "", f"must be at most {MAX_CHARACTERS // 1024} Ki characters long"))
        return document
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a redefined anchor is legal in YAML 1.2; ruamel warns
            root = YAML(typ="safe", pure=True).compose(text)
    except RecursionError:
        document.mistakes.append(Mistake(0, "", "is nested too deeply"))
        return document
    except YAMLError as error:
        document.mistakes.append(_describe_syntax_error(error, text))
        return document
    except Exception:  # ruamel lets ValueError, OverflowError and others escape on malformed escapes and directives
        document.mistakes.append(Mistake(0, "", "is not valid YAML"))
        return document
    document.lines[()] = 1
    if root is not None:
        _Reader(document).read_root(root)
    return document


def place_value(document: Document, path: KeyPath, source: Document) -> None:
    """Replace the value at ``path``, whose container exists, by all of ``source``; its line becomes 0."""
    container = document.data
    for step in path[:-1]:
        container = container[step]
    if isinstance(container, list) and path[-1] == len(container):
        container.append(source.data)
    else:
        container[path[-1]] = source.data
    for places in (document.lines, document.texts):
        for stale in [place for place in places if place[: len(path)] == path]:
            del places[stale]
    document.lines.update({path + place: 0 for place in source.lines})
    document.texts.update({path + place: written for place, written in source.texts.items()})


def _describe_syntax_error(error: YAMLError, text: str) -> Mistake:
    line = 0
    problem = ""
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 0
        problem = error.problem or error.context or ""
    elif isinstance(position := getattr(error, "position", None), int):  # ReaderError: a forbidden character
        line = text.count("\n", 0, position) + 1
        problem = "it holds a control character"
    problem = render_printable(" ".join(str(problem).split()))
    return Mistake(line, "", f"is not valid YAML: {problem}" if problem else "is not valid YAML")


class _TooLargeError(Exception):
    """The document expands beyond `MAX_VALUES` or `MAX_DEPTH`."""


class _Reader:
    """Turns ruamel's nodes into plain values, counting them."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._count = 0

    def read_root(self, root: Node) -> None:
        try:
            self._document.data = self._read(root, ())
        except _TooLargeError as error:
            self._document.data = None
            self._document.lines = {(): 1}
            self._document.texts = {}
            self._document.mistakes = [Mistake(root.start_mark.line + 1, "", str(error))]

    def _read(self, node: Node, path: KeyPath) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise _TooLargeError(f"must hold at most {MAX_VALUES} values, aliases expanded")
        if len(path) > MAX_DEPTH:  # also ends an alias that refers to what contains it
            raise _TooLargeError(f"must be nested at most {MAX_DEPTH} deep")
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, MappingNode) and node.tag in _CONTAINER_TAGS:
            return self._read_mapping(node, path)
        if isinstance(node, SequenceNode) and node.tag in _CONTAINER_TAGS:
            return [self._read(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and (node.tag == _TEXT_TAG or node.tag in _PLAIN_TAGS):
            self._document.texts[path] = node.value
            return node.value if node.tag == _TEXT_TAG else _resolve_scalar(node.value)
        self._add_mistake(node, path, "must not have a YAML tag", hint="remove the tag")
        return None

    def _read_mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._add_mistake(key_node, path, "must have plain text as its keys")
                continue
            key = str(key_node.value)
            if key in mapping:
                first = self._document.lines[(*path, key)]
                self._add_mistake(key_node, (*path, key), f"is given twice, first on line {first}")
                continue
            self._document.lines[(*path, key)] = key_node.start_mark.line + 1
            mapping[key] = self._read(value_node, (*path, key))
        return mapping

    def _add_mistake(self, node: Node, path: KeyPath, rule: str, hint: str = "") -> None:
        self._document.mistakes.append(Mistake(node.start_mark.line + 1, render_path(path), rule, hint=hint))


def _resolve_scalar(text: str) -> Any:
    """Return the value of a plain scalar by the YAML 1.2 core schema; absurdly long numbers stay text."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEXADECIMAL.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text
