"""Kinds of scalar values in a scenario: how each is read from YAML, written back, and described to editors.

A kind annotates a pydantic field, ``Annotated[int, SIZE]``. Reading raises `RuleError` with the sentence that the
user sees, so that no wording of pydantic ever does.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from testbed import units
from testbed.scenario.expect import Expectation, ExpectationError, parse_expectation

RULE_ERROR = "rule"
"""The pydantic error type under which a `RuleError` travels; its context holds ``rule`` and ``hint``."""


class RuleError(ValueError):
    """A value breaks the rule of its key."""

    def __init__(self, rule: str, hint: str = "") -> None:
        super().__init__(rule)
        self.rule = rule
        self.hint = hint


@dataclass(frozen=True)
class Kind:
    """One kind of value.

    Attributes:
        parse: From the plain YAML value to the program's; raises `RuleError` or `units.UnitError`.
        render: From the program's value to the plain YAML value that `parse` reads back.
        json_schema: What editors are told.
    """

    parse: Callable[[object], Any]
    render: Callable[[Any], Any]
    json_schema: dict[str, Any] = field(default_factory=dict)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema by which pydantic reads and writes this kind."""
        return core_schema.no_info_plain_validator_function(
            self._validate, serialization=core_schema.plain_serializer_function_ser_schema(self._serialize)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the JSON schema of the value as it stands in the file."""
        return dict(self.json_schema)

    def _validate(self, value: object) -> Any:
        try:
            return self.parse(value)
        except RuleError as error:
            raise PydanticCustomError(RULE_ERROR, "{rule}", {"rule": error.rule, "hint": error.hint}) from None
        except units.UnitError as error:
            raise PydanticCustomError(RULE_ERROR, "{rule}", {"rule": str(error), "hint": ""}) from None

    def _serialize(self, value: Any) -> Any:
        return None if value is None else self.render(value)


def _unchanged(value: Any) -> Any:
    return value


def _joined(value: object) -> object:
    """Return a text with the surrogate pairs joined that JSON's escapes leave; anything else as it is."""
    if not isinstance(value, str):
        return value
    pairs = re.compile("[\ud800-\udbff][\udc00-\udfff]")
    return pairs.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), value)


def _require_plain(value: str, rule: str, where: str = "") -> None:
    """Raise RuleError for a character that no command line, variable or file of text can have."""
    found = re.search("[\0\ud800-\udfff]", value)
    if found:
        kind = "NUL" if found[0] == "\0" else "half of a surrogate pair"
        raise RuleError(rule, f"remove U+{ord(found[0]):04X} ({kind}), character {found.start() + 1}{where}")


def text(max_length: int, pattern: str | None = None, rule: str | None = None) -> Kind:
    """Return the kind of texts of at most ``max_length`` characters that match ``pattern``."""
    rule = rule or f"must be text of at most {max_length} characters"

    def parse(value: object) -> str:
        value = _joined(value)
        if not isinstance(value, str) or len(value) > max_length or (pattern and not re.fullmatch(pattern, value)):
            raise RuleError(rule)
        _require_plain(value, rule)
        return value

    schema: dict[str, Any] = {"type": "string", "maxLength": max_length}
    if pattern:
        schema["pattern"] = f"^{pattern}$"
    return Kind(parse, _unchanged, schema)


def texts(key_pattern: str, key_name: str, max_length: int) -> Kind:
    """Return the kind of mappings from names to texts; names match ``key_pattern`` and are called ``key_name`` in messages."""
    rule = f"must be a mapping from {key_name} to text of at most {max_length} characters"

    def parse(value: object) -> dict[str, str]:
        if not isinstance(value, dict):
            raise RuleError(rule)
        plain: dict[str, str] = {}
        for key, raw in value.items():
            text = _joined(raw)
            if not isinstance(key, str) or not re.fullmatch(key_pattern, key):
                raise RuleError(rule, f"{key!r} is not {key_name}")
            if not isinstance(text, str) or len(text) > max_length:
                raise RuleError(rule, f"quote the value of {key}" if isinstance(text, int | float) else "")
            _require_plain(text, rule, f" from the value of {key}")
            plain[key] = text
        return plain

    described = {"type": "string", "maxLength": max_length}
    return Kind(
        parse,
        dict,
        {"type": "object", "propertyNames": {"pattern": f"^{key_pattern}$"}, "additionalProperties": described},
    )


def regex(groups: int) -> Kind:
    """Return the kind of regular expressions with ``groups`` groups, any number of them with 0."""
    counted = f" with {groups} group{'s' * (groups != 1)}" if groups else ""
    rule = f"must be a regular expression of at most 500 characters{counted}"

    def parse(value: object) -> str:
        value = _joined(value)
        if not isinstance(value, str) or len(value) > 500:
            raise RuleError(rule)
        _require_plain(value, rule)
        try:
            compiled = re.compile(value)
        except re.error as error:
            raise RuleError(rule, f"Python says: {error}") from None
        if groups and compiled.groups != groups:
            raise RuleError(rule, "put the number alone in ( ), all else in (?: )")
        return value

    return Kind(parse, _unchanged, {"type": "string", "maxLength": 500})


def flag() -> Kind:
    """Return the kind of ``true`` and ``false``."""

    def parse(value: object) -> bool:
        if not isinstance(value, bool):
            raise RuleError("must be true or false")
        return value

    return Kind(parse, _unchanged, {"type": "boolean"})


def integer(low: int, high: int) -> Kind:
    """Return the kind of integers from ``low`` to ``high``."""

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RuleError(f"must be an integer from {low} to {high}")
        return value

    return Kind(parse, int, {"type": "integer", "minimum": low, "maximum": high})


def one_of(choices: Sequence[int]) -> Kind:
    """Return the kind of integers that are one of ``choices``."""

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value not in choices:
            raise RuleError(f"must be one of {', '.join(map(str, choices))}")
        return value

    return Kind(parse, int, {"type": "integer", "enum": list(choices)})


def name(known: Sequence[str]) -> Kind:
    """Return the kind of names that are one of ``known``."""

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in known:
            near = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) else []
            raise RuleError(f"must be one of {', '.join(known)}", f"did you mean {near[0]}?" if near else "")
        return value

    return Kind(parse, str, {"type": "string", "enum": list(known)})


def choice(names: type[StrEnum]) -> Kind:
    """Return the kind of names that are a member of ``names``."""
    kind = name([str(one) for one in names])
    return replace(kind, parse=lambda value: names(kind.parse(value)))


def only(kind: Kind, name: str) -> Kind:
    """Return ``kind``, of which editors are told that only ``name`` fits here."""
    return replace(kind, json_schema={"type": "string", "enum": [name]})


_NUMBER = r"[0-9]+(\.[0-9]+)?"


def rate(low: int, high: int) -> Kind:
    """Return the kind of rates; bounds in bits per second."""

    def parse(value: object) -> int:
        parsed = units.parse_rate(value)
        if not low <= parsed <= high:
            raise RuleError(f"must be from {units.format_rate(low)} to {units.format_rate(high)}")
        return parsed

    pattern = rf"^{_NUMBER}\s*[kMGT]?bit/s$"
    return Kind(parse, units.format_rate, {"type": "string", "pattern": pattern, "examples": ["400 Gbit/s"]})


def size(low: int, high: int) -> Kind:
    """Return the kind of sizes; bounds in bytes."""

    def parse(value: object) -> int:
        parsed = units.parse_size(value)
        if not low <= parsed <= high:
            raise RuleError(f"must be from {units.format_size(low)} to {units.format_size(high)}")
        return parsed

    pattern = rf"^{_NUMBER}\s*(B|[kKMGT]B|[KMGT]iB)?$"
    forms = [{"type": "integer", "minimum": low, "maximum": high}, {"type": "string", "pattern": pattern}]
    return Kind(parse, units.format_size, {"anyOf": forms, "examples": ["64 MiB"]})


def time(low: int, high: int) -> Kind:
    """Return the kind of times; bounds in nanoseconds."""

    def parse(value: object) -> int:
        parsed = units.parse_time(value)
        if not low <= parsed <= high:
            raise RuleError(f"must be from {units.format_time(low)} to {units.format_time(high)}")
        return parsed

    pattern = rf"^(0|{_NUMBER}\s*(ns|us|µs|μs|ms|s))$"
    forms: list[dict[str, Any]] = [{"type": "string", "pattern": pattern}]
    if low == 0:
        forms.append({"type": "integer", "enum": [0]})
    return Kind(parse, units.format_time, {"anyOf": forms, "examples": ["600 ns"]})


def fraction(high: Fraction) -> Kind:
    """Return the kind of fractions from 0 to ``high``."""

    def parse(value: object) -> Fraction:
        parsed = units.parse_fraction(value)
        if parsed > high:
            raise RuleError(f"must be from 0 to {units.format_fraction(high)}")
        return parsed

    pattern = rf"^({_NUMBER}\s*%?|[0-9]+\s*/\s*[0-9]+)$"
    forms = [{"type": "number", "minimum": 0, "maximum": float(high)}, {"type": "string", "pattern": pattern}]
    return Kind(parse, units.format_fraction, {"anyOf": forms, "examples": ["1/8", 0.2, "20 %"]})


def number(low: float, high: float) -> Kind:
    """Return the kind of plain numbers from ``low`` to ``high``."""

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise RuleError(f"must be a number from {low} to {high}")
        return float(value)

    def render(value: float) -> float | int:
        return int(value) if math.isfinite(value) and value.is_integer() else value

    return Kind(parse, render, {"type": "number", "minimum": low, "maximum": high})


@dataclass(frozen=True)
class WordKind(Kind):
    """A kind that may also be a word, which is ``None`` in the program."""

    word: str = "auto"

    def _serialize(self, value: Any) -> Any:
        return self.word if value is None else self.render(value)


def auto_or(kind: Kind) -> Kind:
    """Return ``kind`` with ``auto`` beside it."""
    return word_or("auto", kind)


def word_or(word: str, kind: Kind) -> Kind:
    """Return ``kind`` with a word beside it."""

    def parse(value: object) -> Any:
        if value == word:
            return None
        try:
            return kind.parse(value)
        except (RuleError, units.UnitError) as error:
            raise RuleError(f'{error}, or "{word}"') from None

    forms = kind.json_schema.get("anyOf", [kind.json_schema])
    return WordKind(parse, kind.render, {"anyOf": [{"type": "string", "enum": [word]}, *forms]}, word)


def integers_or(kind: Kind, low: int, high: int, max_items: int, rule: str) -> Kind:
    """Return ``kind`` with a list of integers from ``low`` to ``high`` beside it; a tuple in the program."""

    def parse(value: object) -> Any:
        if not isinstance(value, list | tuple):
            try:
                return kind.parse(value)
            except RuleError as error:
                raise RuleError(rule, error.hint) from None
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                raise RuleError(rule)
        if not 1 <= len(value) <= max_items:
            raise RuleError(rule)
        return tuple(value)

    def render(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else kind.render(value)

    items = {"type": "integer", "minimum": low, "maximum": high}
    array = {"type": "array", "items": items, "minItems": 1, "maxItems": max_items}
    return Kind(parse, render, {"anyOf": [dict(kind.json_schema), array]})


def expectation() -> Kind:
    """Return the kind of one line of ``expect:``."""

    def parse(value: object) -> Expectation:
        if not isinstance(value, str):
            raise RuleError('must be a line such as "cct_ratio <= 1.05"')
        try:
            return parse_expectation(value)
        except ExpectationError as error:
            raise RuleError(error.rule, error.hint) from None

    def render(value: Expectation) -> str:
        return value.text

    return Kind(parse, render, {"type": "string", "pattern": r"^\s*[a-z][A-Za-z0-9_.-]*\s*(==|!=|<=|<|>=|>)\s*[0-9]"})
