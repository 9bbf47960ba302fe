"""docs/scenario.md says what the models say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from testbed.scenario import reference
from testbed.scenario.model import Scenario
from testbed.scenario.reference import render_reference
from testbed.scenario.schema import find_keys, find_sections

DOCUMENT = Path(__file__).parents[2] / "docs" / "scenario.md"


def every_key() -> set[str]:
    """Every key of the format, from the pydantic models, a list's items behind ``[]``."""
    found: set[str] = set()

    def visit(model: type, prefix: str) -> None:
        for name, field in find_keys(model).items():
            path = prefix + name
            found.add(path)
            listed = "tuple" in str(field.annotation) and bool(find_sections(field.annotation))
            if path != "jobs[].workload":
                for section in find_sections(field.annotation):
                    visit(section, f"{path}[]." if listed else f"{path}.")

    visit(Scenario, "")
    return found


def test_document_is_current(update_golden: bool) -> None:
    if update_golden:
        DOCUMENT.write_text(render_reference(), encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == render_reference(), "run: scripts/docs"


def test_every_key_has_a_block_with_meaning_and_type() -> None:
    blocks = re.findall(
        r"^##+ `([^`]+)`[^\n]*\n\n(\S[^\n]*)\n\n- Required: (yes|no)\n", DOCUMENT.read_text(), re.MULTILINE
    )
    assert {path for path, _, _ in blocks} == every_key()
    assert len(re.findall(r"^- Type: \S", DOCUMENT.read_text(), re.MULTILINE)) == len(blocks)


def test_a_note_about_a_key_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_IS_NOT", {"fabric.colour": "a key"})
    with pytest.raises(AssertionError, match=r"fabric\.colour"):
        render_reference()
