"""The models as others read them: their keys, their sections, their JSON schema."""

from __future__ import annotations

import json
import types
import typing
from typing import Annotated, Any

from pydantic import BaseModel

from testbed.scenario.model import Scenario


def find_keys(model: type[BaseModel]) -> dict[str, Any]:
    """Return the pydantic fields of a section by their keys in the file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def find_sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field may hold, itself or as list items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return find_sections(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType, tuple):
        return [section for part in typing.get_args(annotation) for section in find_sections(part)]
    return []


def render_json_schema() -> str:
    """Return the JSON schema of the file format, as shipped in ``schema.json``."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "testbed scenario",
        **Scenario.model_json_schema(by_alias=True),
    }
    return json.dumps(_readable(schema), indent=2, ensure_ascii=False) + "\n"


def _readable(schema: Any) -> Any:
    """Drop generated titles and absent defaults from a JSON schema."""
    if isinstance(schema, list):
        return [_readable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        is_generated_title = key == "title" and isinstance(value, str) and value != "testbed scenario"
        is_absent_default = key == "default" and value is None
        if not is_generated_title and not is_absent_default:
            kept[key] = _readable(value)
    return kept
