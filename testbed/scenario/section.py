"""What all sections of the file format share: a frozen, strict model and fields named after their keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_NO_DEFAULT = object()


def key(name: str, description: str, *, default: Any = _NO_DEFAULT, example: Any = None) -> Any:
    """Return the field of one key.

    Args:
        name: The key in the file.
        description: What it means; shown by editors.
        default: As a user would write it; ``None`` for absent. Without a default the key is required.
        example: A valid value as a user would write it; required keys and lists must have one.
    """
    extra: dict[str, Any] = {"examples": [example]} if example is not None else {}
    if default is _NO_DEFAULT:
        return Field(alias=name, description=description, json_schema_extra=extra)
    if default is None:
        return Field(default=None, validate_default=False, alias=name, description=description, json_schema_extra=extra)
    return Field(default=default, alias=name, description=description, json_schema_extra=extra)


def list_key(name: str, description: str, *, example: list[Any], required: bool = False) -> Any:
    """Return the field of a key that holds a list, empty by default; a tuple in the program."""
    extra: dict[str, Any] = {"examples": [example]}
    if required:
        return Field(alias=name, description=description, strict=False, json_schema_extra=extra)
    return Field(default=(), alias=name, description=description, strict=False, json_schema_extra=extra)


def derived_key(name: str, description: str) -> Any:
    """Return the field of a key whose default a model fills in from other keys."""
    return Field(default_factory=lambda: None, alias=name, description=description)


class Section(BaseModel):
    """A mapping of the file. Unknown keys are mistakes; defaults are read as a user's text would be."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)
