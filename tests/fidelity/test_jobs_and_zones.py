"""Jobs that share uplinks, and flows that share links between zones, slow down as predicted; where nothing is shared, not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fidelity.runs import trusted_run

pytestmark = [pytest.mark.root, pytest.mark.fidelity]

SCENARIOS = Path(__file__).parents[2] / "scenarios"
# Switch ports are 0.3 % fast, and their buckets hold some ticks' worth: a shared link may be that much faster than predicted.
TOLERANCE = 0.04


def jobs_smaller(jobs: int) -> list[str]:
    return [f"jobs[{job}].workload[0].size=8MiB" for job in range(jobs)]


def test_jobs_on_half_racks_slow_each_other_down_under_pinning_as_predicted() -> None:
    result = trusted_run(SCENARIOS / "jobs/fragmented.yaml", *jobs_smaller(4))
    alone = [row for row in result.results if not row.beside]
    together = [row for row in result.results if row.beside]
    assert len(alone) == len(together) == 4
    for row in alone:  # the negative control: the same paths, nobody else on them
        assert row.cct_ratio == pytest.approx(1.0, abs=0.01)
    for row in together:
        assert row.predicted_cct_ratio == pytest.approx(2.0)  # precondition: they share links
        assert row.slowdown == pytest.approx(2.0, rel=TOLERANCE)


@pytest.mark.parametrize("file", ["jobs/fragmented-doubled.yaml", "jobs/full-racks.yaml"])
def test_jobs_with_paths_of_their_own_do_not_notice_each_other(file: str) -> None:
    jobs = 4 if "doubled" in file else 2
    for row in trusted_run(SCENARIOS / file, *jobs_smaller(jobs)).results:
        assert row.cct_ratio is not None
        assert row.cct_ratio <= 1.03


@pytest.mark.parametrize(
    ("polarises", "cures"),
    [
        ("routing.hash_seed_per_tier=false", "routing.hash_seed_per_tier=true"),
        pytest.param("routing.spine_hash_function=crc32", "routing.spine_hash_function=crc16", marks=pytest.mark.slow),
    ],
    ids=["another seed", "another function"],
)
def test_one_hash_for_all_tiers_slows_down_what_crosses_between_zones_as_predicted(polarises: str, cures: str) -> None:
    # Shared ports are a little fast and begin with full buckets; that must be small beside what a flow carries.
    slow = ["workload[0].warmup_iters=0", "time_dilation=4000"]
    if "function" in cures:  # a seed per tier is no cure for a CRC
        slow += ["routing.hash_function=crc32", "routing.hash_seed_per_tier=true"]
    polarised, cured = (
        trusted_run(SCENARIOS / "zones/polarised.yaml", *slow, setting).results[0] for setting in (polarises, cures)
    )
    for row in (polarised, cured):
        assert row.cct_ratio is not None
        assert row.predicted_cct_ratio is not None
        # Pauses hold up flows that the model lets pass: slower than predicted, not faster.
        assert row.predicted_cct_ratio * (1 - TOLERANCE) <= row.cct_ratio <= row.predicted_cct_ratio * 1.25
    assert polarised.cct_ratio > 1.3 * cured.cct_ratio  # type: ignore[operator]
