"""Unmodified verbs applications from scenario files: perftest, rping, Open MPI over rxe, their frames counted on the spines."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed import api
from testbed.results import ApplicationResult, Result

pytestmark = pytest.mark.root

SCENARIOS = Path(__file__).parents[2] / "scenarios" / "applications"
RATE_GBIT_PER_S = 100.0


def run_application(name: str, output: Path, *overrides: str) -> tuple[Result, ApplicationResult]:
    result = api.run(api.load(SCENARIOS / f"{name}.yaml", overrides), output=output)
    (row,) = result.applications
    assert [command.exit_code for command in row.commands] == [0] * len(row.commands)
    return result, row


def figure_of(row: ApplicationResult, name: str) -> float:
    (value,) = [figure.value for figure in row.figures if figure.name == name]
    assert value is not None
    return value


def spine_counts(result: Result) -> tuple[int, int]:
    """Return bytes and packets that the spines sent."""
    ways = [way for link in result.fabric.links for way in link.directions if way.src.startswith("spine")]
    return sum(way.bytes or 0 for way in ways), sum(way.packets or 0 for way in ways)


@pytest.mark.parametrize(("uplink", "share"), [("100 Gbit/s", 1.0), ("50 Gbit/s", 0.5)])
def test_perftest_writes_at_the_rate_of_its_path(uplink: str, share: float, tmp_path: Path) -> None:
    result, row = run_application("perftest", tmp_path, f"fabric.uplink.rate={uplink}", "expect=[]")
    # Frames of 4 KiB are 98 % payload; a queue pair has at most 128 of them under way.
    assert figure_of(row, "bandwidth") == pytest.approx(0.98 * share * RATE_GBIT_PER_S, rel=0.1)
    payload = 256 * 65536
    nbytes, packets = spine_counts(result)
    assert payload <= nbytes <= 1.2 * payload  # headers, ACKs, and what perftest tells first
    assert packets >= payload // 4096


def test_rping_connects_by_the_connection_manager(tmp_path: Path) -> None:
    result, row = run_application("rping", tmp_path)
    assert figure_of(row, "last_ping") == 4
    assert spine_counts(result)[1] >= 2 * 5  # each ping is a READ and a WRITE


def test_open_mpi_reduces_right_numbers_across_the_spines(tmp_path: Path) -> None:
    result, row = run_application("open-mpi", tmp_path)
    assert figure_of(row, "wrong") == 0
    assert "ranks 4 elements 65536" in (tmp_path / "applications" / row.commands[0].output).read_text()
    # Half of the four ranks' buffers at least must cross from leaf to leaf, however they are reduced.
    sent = [way for link in result.fabric.links for way in link.directions if way.src.startswith("spine")]
    assert sum(way.bytes or 0 for way in sent) >= 2 * 65536 * 8
    assert all(check.verdict == "pass" for check in result.checks), result.checks
