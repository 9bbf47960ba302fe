"""The messages for mistaken scenarios: ``errors/<case>.yml`` gives exactly ``errors/<case>.log``.

A line ``# set: key=value`` in a case is an override, as ``--set`` would give it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.errors import ScenarioError
from testbed.scenario import load_scenario

CASES = Path(__file__).parent / "errors"
OVERRIDE = "# set: "


@pytest.mark.parametrize("case", sorted(CASES.glob("*.yml")), ids=lambda path: path.stem)
def test_mistakes_are_reported_as_expected(case: Path, update_golden: bool) -> None:
    content = case.read_bytes().decode("utf-8", errors="replace")
    overrides = [line.removeprefix(OVERRIDE) for line in content.splitlines() if line.startswith(OVERRIDE)]
    with pytest.raises(ScenarioError) as caught:
        load_scenario(case, overrides, file_name=case.name)
    found = f"{caught.value}\n"
    expected = case.with_suffix(".log")
    if update_golden:
        expected.write_text(found, encoding="utf-8")
    assert found == expected.read_text(encoding="utf-8")


def test_every_file_has_its_partner() -> None:
    inputs = {path.stem for path in CASES.glob("*.yml")}
    outputs = {path.stem for path in CASES.glob("*.log")}
    assert inputs
    assert inputs == outputs
