"""What the documentation names exists: files behind links, commands with their options, scripts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from testbed.cli.main import app
from testbed.measure.verdict import INVALID_ERROR_FRACTION, TRUSTED_ERROR_FRACTION
from testbed.plan.model import SHARED_SHAPER_SPEEDUP
from testbed.scenario import load_scenario

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def find_commands(text: str) -> list[list[str]]:
    """Return the arguments of every ``testbed …`` line in a code block, comments left out."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\.venv/bin/)?testbed ", line)]


COMMANDS = [command for path in DOCUMENTS for command in find_commands(path.read_text())]


def exit_code(arguments: list[str]) -> int:
    """Let the command line parse arguments and print help instead of running them."""
    name, *rest = arguments
    return CliRunner().invoke(app, [name, "--help", *rest]).exit_code


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_documented_command_is_one(arguments: list[str]) -> None:
    assert exit_code(arguments) == 0


@pytest.mark.parametrize("arguments", [["run", "scenarios/star.yaml", "--colour", "red"], ["fly", "away"]])
def test_a_wrong_command_is_found(arguments: list[str]) -> None:
    assert exit_code(arguments) == 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_and_scenarios_that_are_named_exist(path: Path) -> None:
    named = set(re.findall(r"\b(scripts/[a-z0-9-]+|scenarios/[a-z0-9-]+(?:/[a-z0-9-]+)*(?:\.yaml)?)", path.read_text()))
    # `scenarios/congestion/cts-*.yaml` are several.
    assert sorted(name for name in named if not [*ROOT.glob(f"{name}*" if name.endswith("-") else name)]) == []


# They fail and say why, or are there to be predicted.
WITHOUT_FIGURES = {"dead-leaf", "star-dies", "dc-24k"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("scenarios/**/*.yaml")), ids=lambda path: path.stem)
def test_every_scenario_is_read_and_expects_something_of_its_figures(path: Path) -> None:
    scenario = load_scenario(path)
    given = [line.text for line in scenario.expect if line.metric not in ("drops_packets", "headroom_drops_packets")]
    assert bool(given) == (path.stem not in WITHOUT_FIGURES)


def test_constants_in_the_documentation_are_those_of_the_code() -> None:
    shaper = f"{100 * (SHARED_SHAPER_SPEEDUP - 1):.2g} %"
    for name in ("README.md", "docs/limitations.md"):
        assert re.findall(r"Switch ports (?:run|are) ([0-9.]+ %)", (ROOT / name).read_text()) == [shaper]
    for name in ("README.md", "docs/fidelity.md"):
        text = (ROOT / name).read_text()
        assert f"{100 * TRUSTED_ERROR_FRACTION:g} %" in text
        assert f"{100 * INVALID_ERROR_FRACTION:g} %" in text
